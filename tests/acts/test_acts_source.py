"""Every source keeps the same contract with the trainer: epochs, restore, held-out rows, statistics."""

import json
import subprocess
import sys
import threading
from collections import Counter
from itertools import islice

import numpy as np
import pyarrow as pa
import pytest
import torch
from acts_models import WIDTH, make_model, make_text
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from wsae.acts.config import HarvestConfig, LiveConfig, TextConfig
from wsae.acts.harvest import harvest
from wsae.acts.language import load_language
from wsae.acts.live import LiveSource
from wsae.acts.source import ActivationSource, ArraySource, StoreSource, open_source
from wsae.acts.stream import ShuffledStream
from wsae.core.errors import UserError
from wsae.core.seeds import Permutation, seed_for
from wsae.core.tensors import save_tensors

TRAIN, HELDOUT = 500, 90
HOOKS = ("layers.0", "layers.1.mlp.up_proj")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    make_model(path / "model")
    make_text(path / "a.jsonl", documents=120)
    return path


@pytest.fixture(scope="module")
def language(base):
    return load_language(str(base / "model"))


def config(base, **values) -> HarvestConfig:
    return HarvestConfig(
        **{
            "model": str(base / "model"),
            "text": TextConfig(path=str(base / "a.jsonl")),
            "hooks": HOOKS,
            "seq_len": 16,
            "batch_seqs": 3,
            "skip_first": 4,
            "tokens": TRAIN,
            "heldout_tokens": HELDOUT,
            "heldout_fraction": 0.2,
            "shard_tokens": 130,
            **values,
        }
    )


@pytest.fixture(scope="module")
def store(base, language):
    return harvest(config(base), base / "store", language=language)


def matrix(rows: int = TRAIN + HELDOUT) -> torch.Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(3))


@pytest.fixture(
    params=["store", "one hook", "live", "numpy", "torch", "npy", "safetensors", "bf16"]
)
def source(request, base, language, store, tmp_path) -> ActivationSource:
    x, fraction = matrix(), HELDOUT / (TRAIN + HELDOUT)
    match request.param:
        case "store":
            return StoreSource(store.path)
        case "one hook":
            return StoreSource(store.path, HOOKS[1:])
        case "live":
            return LiveSource(
                config(base), LiveConfig(shuffle_tokens=120, stats_tokens=TRAIN), language
            )
        case "numpy":
            return ArraySource(x.numpy(), fraction)
        case "torch":
            return ArraySource(x.double(), fraction)
        case "npy":
            np.save(tmp_path / "x.npy", x.numpy())
            return open_source(tmp_path / "x.npy", heldout_fraction=fraction)
        case "safetensors":
            save_tensors(tmp_path / "x.safetensors", {"x": x, "labels": torch.arange(len(x))})
            return open_source(tmp_path / "x.safetensors", heldout_fraction=fraction)
        case _:
            save_tensors(tmp_path / "x.safetensors", {"x": x.bfloat16()})
            return open_source(str(tmp_path / "x.safetensors"), heldout_fraction=fraction)


def key(row: torch.Tensor) -> bytes:
    return row.numpy().tobytes()


def rows_of(batches, hook) -> Counter:
    return Counter(key(row) for batch in batches for row in batch[hook])


def heldout_rows(source, hook) -> Counter:
    return Counter(key(row) for chunk in source.heldout(37) for row in chunk.x[hook])


def test_batches_are_full_float32_and_aligned_by_hook(source):
    stream = source.stream(32, seed=0)
    for _ in range(40):
        batch = stream.next()
        assert list(batch) == list(source.hooks)
        for hook, x in batch.items():
            assert x.shape == (32, source.hooks[hook])
            assert x.dtype == torch.float32


def test_an_epoch_visits_each_training_row_once_except_a_dropped_tail(source):
    hook, size = next(iter(source.hooks)), 20
    stream = source.stream(size, seed=1)
    per_epoch = TRAIN // size
    first = rows_of((stream.next() for _ in range(per_epoch)), hook)
    second = rows_of((stream.next() for _ in range(per_epoch)), hook)
    assert sum(first.values()) == TRAIN
    assert first == second
    tail = source.stream(33, seed=1)
    seen = rows_of((tail.next() for _ in range(TRAIN // 33)), hook)
    assert not seen - first, "a batch size that does not divide visits no row twice"


def test_epochs_differ_and_seeds_differ(source):
    hook, size = next(iter(source.hooks)), 50
    streams = [source.stream(size, seed=s) for s in (0, 0, 1)]
    one, again, other = ([s.next()[hook] for _ in range(20)] for s in streams)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.equal(one[0], one[TRAIN // size])


@settings(max_examples=12, deadline=None)
@given(position=st.integers(0, 60), size=st.sampled_from([7, 32, 100]))
def test_a_restored_store_stream_continues_bit_identically(store, position, size):
    check_restore(StoreSource(store.path, verify=False), position, size)


@pytest.mark.parametrize("size", [7, 120, 200])
def test_a_restored_live_stream_continues_bit_identically(base, language, size):
    source = LiveSource(config(base), LiveConfig(shuffle_tokens=120), language)
    for position in (0, 1, 2, 5, 13):
        check_restore(source, position, size)


def test_a_restored_stream_of_any_source_continues_bit_identically(source):
    for position in (0, 3, 11, 24):
        check_restore(source, position, 20)


def check_restore(source, position, size):
    stream = source.stream(size, seed=9)
    for _ in range(position):
        stream.next()
    state = stream.state()
    expected = [stream.next() for _ in range(6)]
    again = source.stream(size, seed=9, state=json_round_trip(state))
    assert again.state() == state
    for batch in expected:
        for hook, x in again.next().items():
            assert torch.equal(x, batch[hook])
    assert again.state() == stream.state()


def json_round_trip(value):
    return json.loads(json.dumps(value))


@pytest.mark.parametrize(("rows", "size"), [(70_000, 300), (10, 10), (7, 2)])
def test_rows_read_ahead_are_those_of_the_epoch_s_order(rows, size):
    seen: list[int] = []

    def gather(index):
        seen.append(threading.get_ident())
        return {"x": torch.from_numpy(index[:, None].astype(np.float32))}

    stream = ShuffledStream(rows, gather, size, seed=5)
    for step in range(2 * (rows // size) + 1):
        epoch, batch = divmod(step, rows // size)
        at = np.arange(batch * size, (batch + 1) * size)
        expected = Permutation(rows, seed_for(5, "epoch", epoch))(at)
        assert np.array_equal(stream.next()["x"][:, 0].numpy(), expected)
        stream.begin()
        stream.begin()
        assert (stream.state()["epoch"], stream.state()["batch"]) == (epoch, batch + 1)
    assert seen[0] == threading.get_ident()
    assert threading.get_ident() not in seen[1:]


def test_a_batch_that_cannot_be_read_ahead_fails_when_it_is_asked_for_and_can_be_asked_for_again():
    broken = [False]

    def gather(index):
        if broken[0]:
            raise OSError("the disk is gone")
        return {"x": torch.from_numpy(index[:, None].astype(np.float32))}

    stream, whole = (ShuffledStream(40, gather, 4, seed=1) for _ in range(2))
    expected = [whole.next()["x"] for _ in range(4)]
    assert torch.equal(stream.next()["x"], expected[0])
    stream.begin()
    assert stream._begun.exception(timeout=10) is None
    broken[0] = True
    assert torch.equal(stream.next()["x"], expected[1])
    stream.begin()
    with pytest.raises(OSError, match="the disk is gone"):
        stream.next()
    broken[0] = False
    assert torch.equal(stream.next()["x"], expected[2])
    assert stream.state()["batch"] == 3


def test_heldout_rows_come_once_in_one_order_and_are_never_trained_on(source):
    for hook in source.hooks:
        held = heldout_rows(source, hook)
        assert sum(held.values()) == HELDOUT
        stream = source.stream(20, seed=0)
        trained = rows_of((stream.next() for _ in range(2 * TRAIN // 20)), hook)
        assert not held & trained
    small = torch.cat([c.x[hook] for c in source.heldout(11)])
    large = torch.cat([c.x[hook] for c in source.heldout(10_000)])
    assert torch.equal(small, large)
    assert all(len(c.seq) == len(c.pos) == 11 for c in islice(source.heldout(11), HELDOUT // 11))


def test_statistics_are_those_of_the_training_rows(source):
    stream = source.stream(20, seed=0)
    batches = [stream.next() for _ in range(TRAIN // 20)]
    for hook, stats in source.stats().items():
        x = torch.cat([b[hook] for b in batches]).double()
        assert stats.kept.n == TRAIN
        torch.testing.assert_close(stats.kept.mean, x.mean(0), rtol=1e-11, atol=1e-15)
        torch.testing.assert_close(stats.kept.variance, x.var(0, correction=0), rtol=1e-9, atol=0)
        assert stats.all.n >= stats.kept.n


def test_tokens_lie_under_the_heldout_rows(source):
    table = source.tokens()
    if table is None:
        assert list(source.hooks) in (["acts"], ["x"])
        return
    chunk = next(source.heldout(1000))
    ids = table.ids[chunk.seq, chunk.pos]
    assert not set(ids.tolist()) & {0, 1, 2}
    assert all(table.decode(ids))


def test_a_digest_names_the_data(source):
    assert source.digest() == source.digest()
    assert len(source.digest()) == 64


def test_a_batch_larger_than_the_data_is_refused(source):
    with pytest.raises(UserError, match="no full batch"):
        source.stream(TRAIN + 1, seed=0).next()


def test_a_state_of_another_run_is_refused(source):
    state = source.stream(20, seed=0).state()
    with pytest.raises(UserError, match="saved with batch_size 20, not 10"):
        source.stream(10, seed=0, state=state)
    with pytest.raises(UserError, match="saved with seed 0, not 1"):
        source.stream(20, seed=1, state=state)
    with pytest.raises(UserError, match="damaged"):
        source.stream(20, seed=0, state={**state, "batch": -1})


# ---- live against stored


def test_how_rows_are_mixed_is_part_of_the_data(base, language):
    one, other = (LiveSource(config(base), LiveConfig(stats_tokens=n), language) for n in (64, 32))
    assert one.digest() != other.digest()


def test_a_live_block_mixes_the_rows_of_the_text(base, language, store):
    source = LiveSource(config(base), LiveConfig(shuffle_tokens=120), language)
    straight = [key(row) for row in store.rows("train", np.arange(TRAIN))[HOOKS[0]]]
    batch = source.stream(20, seed=0).next()[HOOKS[0]]
    places = [straight.index(key(row)) for row in batch]
    assert max(places) < 120
    assert max(places) - min(places) > 60
    assert places != sorted(places)


def test_a_live_source_gives_the_rows_of_the_store(base, language, store):
    live, stored = (
        LiveSource(config(base), LiveConfig(shuffle_tokens=100), language),
        StoreSource(store.path),
    )
    for a, b in zip(live.heldout(40), stored.heldout(40), strict=True):
        assert torch.equal(a.seq, b.seq)
        assert torch.equal(a.pos, b.pos)
        assert all(torch.equal(a.x[h], b.x[h]) for h in HOOKS)
    assert torch.equal(live.tokens().ids, stored.tokens().ids)
    streams = [s.stream(20, seed=0) for s in (live, stored)]
    one, other = (rows_of((s.next() for _ in range(25)), HOOKS[0]) for s in streams)
    assert one == other


def test_a_live_source_whose_text_ends_starts_again(base, language):
    source = LiveSource(config(base, tokens=10**6), LiveConfig(shuffle_tokens=200), language)
    stream = source.stream(50, seed=0)
    epochs = []
    for _ in range(60):
        stream.next()
        epochs.append(stream.state()["epoch"])
    assert max(epochs) >= 1
    assert epochs == sorted(epochs)


def test_a_live_text_shorter_than_a_batch_is_refused_not_looped_on(base, language):
    source = LiveSource(config(base, tokens=10**6), LiveConfig(shuffle_tokens=200), language)
    with pytest.raises(UserError, match="lower --batch-size"):
        source.stream(900_000, seed=0).next()


# ---- arrays


def test_labels_follow_their_rows():
    x = matrix(100)
    source = ArraySource(x, 0.3, labels=np.arange(100) % 7)
    for chunk in source.heldout(8):
        assert torch.equal(chunk.x["acts"], x[chunk.seq])
        assert source.labels is not None
        assert source.labels[chunk.seq.numpy()].tolist() == [int(i) % 7 for i in chunk.seq]
    with pytest.raises(UserError, match="5 labels for 100 rows"):
        ArraySource(x, labels=np.zeros(5, dtype=int))


@given(rows=st.integers(2, 120), fraction=st.floats(0.0, 0.9))
@settings(max_examples=20, deadline=None)
def test_every_row_is_trained_on_or_held_out(rows, fraction):
    x = torch.arange(rows, dtype=torch.float32)[:, None]
    try:
        source = ArraySource(x, fraction)
    except UserError:
        assert round(rows * fraction) >= rows or rows == 1
        return
    stream = source.stream(1, seed=0)
    trained = [int(stream.next()["acts"]) for _ in range(source.n_rows)]
    held = [int(i) for chunk in source.heldout(5) for i in chunk.seq]
    assert sorted(trained + held) == list(range(rows))
    assert held == sorted(held)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("row", [0, 411, 589])
def test_a_nan_in_an_array_names_row_and_dimension(value, row):
    x = matrix()
    x[row, 5] = value
    with pytest.raises(UserError, match=rf"row {row}, dimension 5"):
        ArraySource(x.numpy()).stats()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 3, 4, 5)), r"shape \(2, 3, 4, 5\)"),
        (np.zeros(3), r"shape \(3,\)"),
        (np.zeros((0, 5)), "no activations"),
        (np.zeros((5, 4), dtype=complex), "real numbers"),
        (torch.zeros(5, 4, dtype=torch.complex64), "real numbers"),
        (np.zeros((1, 4)), "leave none to train on"),
    ],
)
def test_arrays_that_are_no_activations_are_refused(array, message):
    with pytest.raises(UserError, match=message):
        ArraySource(array)


def test_files_that_are_no_activations_are_refused(tmp_path):
    (tmp_path / "bad.npy").write_bytes(b"not an array")
    np.save(tmp_path / "objects.npy", np.array([[{}]], dtype=object), allow_pickle=True)
    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 40)
    save_file({"a": torch.zeros(2, 2), "b": torch.zeros(2, 2)}, tmp_path / "two.safetensors")
    for name in ("x.pt", "x.csv", "x.h5", "x.pkl"):
        (tmp_path / name).touch()
    torch.save({"a": torch.zeros(2, 2), "b": torch.zeros(2, 2)}, tmp_path / "two.pt")
    torch.save({"a": {"b": torch.zeros(2, 2)}}, tmp_path / "deep.pt")
    torch.save(np.zeros((3, 3)), tmp_path / "pickled.pt")
    np.savez(tmp_path / "two.npz", a=np.zeros((2, 2)), b=np.zeros((2, 2)))
    np.savez(tmp_path / "objects.npz", np.array([[{}]], dtype=object))
    whole = tmp_path / "cut.npy"
    np.save(whole, np.zeros((50, 4)))
    whole.write_bytes(whole.read_bytes()[:-8])
    (tmp_path / "bad.arrow").write_bytes(b"hello")
    ragged = pa.table({"x": [[1.0], [1.0, 2.0]]})
    with pa.ipc.new_file(str(tmp_path / "ragged.arrow"), ragged.schema) as stream:
        stream.write_table(ragged)
    for name, message in [
        ("bad.npy", "not a readable .npy"),
        ("objects.npy", "not a readable .npy"),
        ("cut.npy", "not a readable .npy"),
        ("bad.safetensors", "not a readable safetensors"),
        ("two.safetensors", r"exactly one tensor .* found a \[2, 2\], b \[2, 2\]"),
        ("x.pt", "not a zip as torch.save writes it"),
        ("x.csv", r"unknown kind of array file; use .npy.*np.loadtxt"),
        ("x.h5", "unknown kind of array file.*h5py"),
        ("x.pkl", "unknown kind of array file.*can run code"),
        ("pickled.pt", "neither a tensor nor a dict or list of tensors"),
        ("two.pt", r"exactly one tensor .* found a \[2, 2\], b \[2, 2\]"),
        ("deep.pt", "a is a dict, not a tensor"),
        ("two.npz", "found a, b"),
        ("objects.npz", "not a readable .npy"),
        ("bad.arrow", "not a readable Arrow file"),
        ("ragged.arrow", "column x: lists of several lengths"),
        ("none.npy", "no such"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            open_source(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="an empty folder"):
        open_source(tmp_path / "folder")
    (tmp_path / "folder" / "notes.md").touch()
    with pytest.raises(UserError, match="not a finished wsae store"):
        open_source(tmp_path / "folder")
    for mark in (
        "progress.json",
        "config.json",
    ):  # an unfinished store, a run: no arrays of a user's
        np.save(tmp_path / "folder" / "x.npy", np.zeros((5, 4)))
        (tmp_path / "folder" / mark).touch()
        with pytest.raises(UserError, match="not a finished wsae store"):
            open_source(tmp_path / "folder")
        (tmp_path / "folder" / mark).unlink()


def written(x: torch.Tensor, folder) -> dict[str, object]:
    """Write the same rows in every form that is read; returns the paths."""
    arrays, half = x.numpy(), x.bfloat16()
    folder.mkdir()
    np.save(folder / "fortran.npy", np.asfortranarray(arrays.astype(">f8")))
    np.savez(folder / "one.npz", arrays)
    np.savez_compressed(folder / "named.npz", labels=np.zeros(len(x)), acts=arrays)
    torch.save(x, folder / "tensor.pt")
    torch.save({"activations": half, "mask": torch.ones(3, 3)}, folder / "dict.pth")
    torch.save(list(x.split(17)), folder / "batches.bin")
    save_file({"hidden": half.reshape(10, -1, x.shape[1])}, folder / "three_axes.safetensors")
    cells = {"hook": arrays.reshape(10, -1, x.shape[1]).tolist(), "token_ids": [[1, 2]] * 10}
    kind = pa.list_(
        pa.list_(pa.float32())
    )  # as datasets keeps Array2D, and SAELens' cached activations
    table = pa.table(cells, schema=pa.schema([("hook", kind), ("token_ids", pa.list_(pa.int32()))]))
    with (
        pa.OSFile(str(folder / "cached.arrow"), "wb") as file,
        pa.ipc.new_stream(file, table.schema) as stream,
    ):
        stream.write_table(table, max_chunksize=4)
    paths: dict[str, object] = {path.name: path for path in folder.iterdir()}
    shards = folder / "shards"
    shards.mkdir()
    for i, part in enumerate(x.split(6)):  # 9 comes before 10
        np.save(shards / f"acts-{i}.npy", part.numpy())
    mixed = folder / "mixed"
    mixed.mkdir()
    np.save(mixed / "a1.npy", arrays[:5])
    torch.save(x[5:30], mixed / "a2.pt")
    save_file({"x": x[30:].contiguous()}, mixed / "a10.safetensors")
    return paths | {"shards": str(shards), "mixed": mixed}


def test_every_form_on_disk_holds_the_same_rows(tmp_path, caplog):
    x = matrix(120).bfloat16().float()  # so that half precision loses nothing
    digests = set()
    for name, path in written(x, tmp_path / "forms").items():
        source = open_source(path)
        index = np.array([119, 0, 17, 17, 64, 5, 29, 30])
        assert torch.equal(source._take(index), x[index]), name
        assert torch.equal(
            torch.cat([chunk.x[source._name] for chunk in source.heldout(7)]),
            x[source.heldout_rows],
        )
        assert source.n_rows == 108
        again = open_source(source.describe()["path"])
        assert again.digest() == source.digest()
        assert list(again.hooks) == list(source.hooks)
        digests.add(source.digest())
    assert len(digests) == 10
    (note,) = caplog.messages
    assert "arrays [n, 12, 16], read as rows of width 16" in note


def test_of_sequences_whole_ones_are_held_out():
    """A row tells much of its neighbours: held out by itself it would be known, and count as independent."""
    x = matrix(240)
    source = ArraySource(x.view(40, 6, 16))
    rows = source.heldout_rows.reshape(-1, 6)
    assert len(rows) == 4
    assert (rows == rows[:, :1] // 6 * 6 + np.arange(6)).all()
    chunks = list(source.heldout(5))
    assert torch.cat([chunk.seq for chunk in chunks]).tolist() == (rows // 6).ravel().tolist()
    assert torch.cat([chunk.pos for chunk in chunks]).tolist() == [*range(6)] * 4
    trained = source.stream(216, seed=0).next()["acts"]
    everything = torch.cat([trained, *(chunk.x["acts"] for chunk in chunks)])
    assert torch.equal(everything.sort(0).values, x.sort(0).values)
    assert (
        ArraySource(x.view(2, 120, 16)).n_rows == ArraySource(x).n_rows
    )  # too few to hold one out


def test_a_folder_of_arrays_says_what_does_not_fit(tmp_path, caplog):
    np.save(tmp_path / "1.npy", np.zeros((5, 4)))
    np.save(tmp_path / "2.npy", np.zeros((5, 3)))
    with pytest.raises(UserError, match=r"2.npy: rows of width 3 where 1.npy has 4"):
        open_source(tmp_path)
    np.save(tmp_path / "2.npy", np.zeros((0, 4)))  # an empty shard is no fault
    (tmp_path / "README.md").touch()
    (tmp_path / ".hidden").touch()
    (tmp_path / "more").mkdir()
    assert open_source(tmp_path, heldout_fraction=0.0).n_rows == 5
    assert caplog.messages == [f"{tmp_path}: not read: 2 that are no array files (README.md, more)"]
    before = open_source(tmp_path).digest()
    (tmp_path / "1.npy").rename(tmp_path / "3.npy")
    assert open_source(tmp_path).digest() != before  # the order of the rows


def test_integers_and_half_precision_are_read_as_float32():
    x = torch.arange(40).reshape(20, 2)
    for array in (x.numpy().astype(np.int16), x.half(), x.numpy().astype(np.float64)):
        source = ArraySource(array, 0.0)
        got = source.stream(20, seed=0).next()["acts"]
        assert got.dtype == torch.float32
        assert sorted(got[:, 0].tolist()) == [float(v) for v in x[:, 0]]
    assert source.digest() != ArraySource(x.numpy() + 1, 0.0).digest()


def test_a_process_that_trains_and_measures_loads_no_transformers_and_no_compiler() -> None:
    """Either takes as long to load as PyTorch itself, and a run on arrays needs neither."""
    code = """
import sys, numpy, wsae, wsae.serve.build
x = numpy.random.default_rng(0).normal(size=(200, 8)).astype("float32")
for kernels in ("auto", "eager"):
    wsae.evaluate(wsae.fit(x, d_sae=16, k=2, tokens=800, kernels=kernels), x)
assert not {"transformers", "torch._dynamo"} & {*sys.modules}
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
