"""The Python interface does what the command line does, on arrays in memory."""

import contextlib
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from test_train import files_of, world

import wsae
from wsae.acts.source import ArraySource
from wsae.core.errors import UserError
from wsae.sae import SAE, ReLU, SAEConfig, TopK
from wsae.sae.config import GammaConfig
from wsae.sae.gamma import gamma_from_proxy
from wsae.train.bank import fits_a_bank
from wsae.train.config import MemberConfig, TrainConfig
from wsae.train.run import start_family, train_run

QUICK = {"tokens": 8_000, "batch_size": 200, "seed": 3}


def test_fit_returns_an_sae_that_reconstructs() -> None:
    x = world()
    sae = wsae.fit(x, k=4, d_sae=64, lr=5e-3, tokens=40_000, batch_size=200)
    with torch.no_grad():
        fvu = float((sae(x) - x).square().sum() / (x - x.mean(0)).square().sum())
        assert int((sae.encode(x) != 0).sum(1).max()) <= 4
    assert fvu < 0.3
    assert torch.equal(sae.gamma, torch.ones(16))


def test_a_k_beside_an_activation_with_another_is_refused_not_ignored() -> None:
    for activation in (TopK(k=3), {"kind": "topk", "k": 3}, ReLU()):
        with pytest.raises(UserError, match="k is 9, the activation's own is (3|None)"):
            wsae.fit(world(), k=9, activation=activation, **QUICK)
    assert wsae.Member(k=3, activation=TopK(k=3)).activation == TopK(k=3)
    assert repr(wsae.fit(world(), k=5, d_sae=64, **QUICK)) == "SAE(topk, d_in=16, d_sae=64, k=5)"


class Array:
    """What NumPy makes an array of, as many packages' containers are."""

    def __init__(self, x: np.ndarray) -> None:
        self.x = x

    def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
        return self.x


class Somewhere:
    """A path of another kind than pathlib's."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


def forms(x: torch.Tensor, folder: Path) -> dict[str, object]:
    """Return the same rows in every form that a call may bring."""
    a = x.numpy()
    np.save(folder / "x.npy", a)
    frame, cells = pd.DataFrame(a), pd.DataFrame({"row": list(a)})
    column = datasets.Dataset.from_dict({"x": a.tolist()})
    return {
        "numpy": a,
        "float64": a.astype(np.float64),
        "big-endian": a.astype(">f4"),
        "fortran": np.asfortranarray(a),
        "backwards": a[::-1].copy()[::-1],
        "map": np.load(folder / "x.npy", mmap_mode="r"),
        "strided": x.repeat_interleave(2, 1)[:, ::2],
        "gradient": x.clone().requires_grad_(),
        "three axes": x.view(20, 50, 16),
        "lists": a.tolist(),
        "list of arrays": list(a),
        "list of tensors": list(x),
        "frame": frame,
        "frame of objects": frame.astype(object),
        "nullable frame": frame.convert_dtypes(),
        "cells": cells,
        "series": cells["row"],
        "arrow": pa.table(frame),
        "column": column["x"],
        "numpy column": column.with_format("numpy")["x"],
        "array": Array(a),
        "source": ArraySource(x, heldout_fraction=0.0),
        "str": str(folder / "x.npy"),
        "Path": folder / "x.npy",
        "PathLike": Somewhere(folder / "x.npy"),
    }


def test_every_form_of_the_same_data_gives_the_same_sae_and_scores(tmp_path: Path) -> None:
    x = world(1000)
    options = {"k": 4, "d_sae": 32, "gamma": "variance", "tokens": 800, "batch_size": 200}
    reference = wsae.fit(x, **options)
    z, fvu = reference.encode(x), wsae.evaluate(reference, x)["metrics"]["fvu"]
    for name, form in forms(x, tmp_path).items():
        assert torch.equal(wsae.fit(form, **options).W_enc, reference.W_enc), name
        if name != "source":  # all of its rows are for training
            found = wsae.evaluate(reference, form)["metrics"]["fvu"]
            assert found["value"] == fvu["value"], name
            assert (found == fvu) == (name != "three axes"), name  # whose sequences are drawn whole
        if name not in ("source", "str", "Path", "PathLike"):
            assert torch.equal(reference.encode(form).reshape(z.shape), z), name


def test_rows_that_a_sequence_repeats_make_no_interval_narrower() -> None:
    x = world(300)
    sae = wsae.fit(x, k=4, d_sae=32, **QUICK)
    once, often = (
        wsae.evaluate(sae, form)["metrics"] for form in (x, x[:, None].expand(-1, 9, -1).clone())
    )
    for name in ("fvu", "l0"):
        assert often[name] == pytest.approx(once[name], rel=1e-6), name


def test_an_unknown_key_is_named_with_the_nearest_of_the_members_and_the_runs() -> None:
    for option, near in (("batchsize", "batch_size"), ("expanson", "expansion")):
        with pytest.raises(UserError, match=rf"unknown key '{option}' \(nearest: {near}"):
            wsae.fit(world(50), k=2, d_sae=32, **{option: 5})


def test_a_source_with_several_hooks_is_refused() -> None:
    source = ArraySource(world(100), heldout_fraction=0.0)
    source.hooks = {"a": 16, "b": 16}
    with pytest.raises(UserError, match=r"2 hooks \(a, b\); give one"):
        wsae.fit(source, **QUICK)


NOT_NUMBERS = {
    "nothing": (None, "given as NoneType"),
    "dict": ({"a": 1}, "given as (dict|int)"),  # of several activations it makes a crosscoder
    "number": (3, "given as int"),
    "generator": ((row for row in [[1.0]]), "given as generator"),
    "bytes": (b"x.npy", "given as bytes"),
    "text": (np.array([["a"]]), "real numbers"),
    "frame of text": (pd.DataFrame({"a": ["x", "y"]}), r"cells that are no numbers \(str\)"),
    "bool": (np.ones((3, 16), dtype=bool), "real numbers"),
    "complex": (np.ones((3, 16), dtype=complex), "real numbers"),
    "unequal rows": ([[1.0, 2.0], [1.0]], r"rows of unequal lengths \(1, 2\)"),
    "records": ([{"a": 1.0}], "rows that are dicts"),
    "masked": (np.ma.masked_greater(np.ones((3, 16)), 0), "masked values"),
    "sparse": (torch.eye(16).to_sparse(), "to_dense"),
}


@pytest.mark.parametrize("kind", NOT_NUMBERS)
def test_what_is_no_array_is_refused_by_its_type(kind: str) -> None:
    value, says = NOT_NUMBERS[kind]
    sae, x = SAE(SAEConfig(d_in=16, d_sae=32, activation=TopK(k=2))), world(50)
    calls = [
        lambda: wsae.fit(value, k=2, d_sae=32, **QUICK),
        lambda: wsae.evaluate(sae, value),
        lambda: sae.encode(value),
        lambda: wsae.recovery(sae, x.abs(), value),
        lambda: wsae.Member(gamma=value),
    ]
    for call in calls[: 3 if kind == "nothing" else 5]:
        with pytest.raises(UserError, match=says) as caught:
            call()
        assert "\n" not in str(caught.value)


NO_SAES = """
import sys, torch, wsae, wsae.interop
x, model = torch.randn(50, 16), torch.nn.Linear(16, 16)
calls = {
    "evaluate": lambda sae: wsae.evaluate(sae, x),
    "recovery": lambda sae: wsae.recovery(sae, x.abs(), x),
    "probe": lambda sae: wsae.probe(sae, x, [0, 1] * 25),
    "probe by name": lambda sae: wsae.probe({"a": sae}, x, [0, 1] * 25),
    "attach": lambda sae: wsae.attach(model, {"": sae}).__enter__(),
    "save": lambda sae: wsae.interop.save(sae, sys.argv[1]),
    "of_sae": lambda sae: wsae.Run.of_sae(sae, sys.argv[2], force=True),
    "fit": lambda sae: wsae.fit(x, k=2, d_sae=32, tokens=100, init_from=[sae]),
}
sae = wsae.fit(x, k=2, d_sae=32, tokens=100)
compiled = torch.compile(sae, backend="eager")
assert wsae.evaluate(compiled, x)["metrics"]["fvu"] == wsae.evaluate(sae, x)["metrics"]["fvu"]
for name, call in calls.items():
    for value in ("path", x, None, wsae.SAE):
        try:
            call(value)
        except wsae.UserError as error:
            assert "in place of an SAE" in str(error), (name, error)
        else:
            raise AssertionError(name)
for name, value in {"progress": True, "activation": 5}.items():
    try:
        wsae.fit(x, k=2, d_sae=32, tokens=100, **{name: value})
    except wsae.UserError as error:
        assert name in str(error) and str(value) in str(error)
    else:
        raise AssertionError(name)
"""


def test_what_is_no_sae_is_refused_by_its_type(tmp_path: Path) -> None:
    # in a process of its own: the checks of types that run in the tests would see it first
    kept = SAE(SAEConfig(d_in=16, d_sae=32, activation=TopK(k=2)))
    kept.save(tmp_path / "kept")
    words = [sys.executable, "-c", NO_SAES, tmp_path / "sae", tmp_path / "kept"]
    subprocess.run(words, check=True, timeout=250)
    assert torch.equal(SAE.load(tmp_path / "kept").W_dec, kept.W_dec)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


SETTINGS = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta": lambda: default_device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference": torch.inference_mode,
    "no gradients": torch.no_grad,
    "numpy raises": lambda: np.errstate(all="raise"),
}
KINDS = [
    {"activation": "topk"},
    {"activation": "batch_topk", "kernels": "eager"},
    {"activation": "jumprelu", "l0": 0.01},
]


SMALL = {"k": 4, "d_sae": 48, "tokens": 300, "batch_size": 100}


@functools.cache
def as_usual(number: int) -> tuple[SAE, dict[str, float], dict[str, float]]:
    x = world(300)
    sae = wsae.fit(x, **SMALL, **KINDS[number])
    found = wsae.evaluate(sae, x)["metrics"]["fvu"]
    return sae, found, wsae.recovery(sae, x.abs(), x).scores


@pytest.mark.parametrize("setting", SETTINGS)
def test_what_is_set_for_the_process_changes_no_number(setting: str, tmp_path: Path) -> None:
    x = world(300)
    for number, kind in enumerate(KINDS):
        usual, metric, recovered = as_usual(number)
        with SETTINGS[setting]():
            sae = wsae.fit(x, **SMALL, **kind)
            x_hat, z = sae(x), sae.encode(x)
            found = wsae.evaluate(sae, x)["metrics"]["fvu"]
            scores = wsae.recovery(sae, x.abs(), x).scores
            sae.save(tmp_path / str(number))
            loaded = SAE.load(tmp_path / str(number))
        for name, tensor in usual.tensors().items():
            assert torch.equal(sae.tensors()[name], tensor), name
            assert torch.equal(loaded.tensors()[name], tensor), name
            assert loaded.tensors()[name].dtype == tensor.dtype
        assert torch.equal(x_hat, usual(x))
        assert torch.equal(z, usual.encode(x))
        assert found == metric
        assert scores == recovered
        loaded(x).sum().backward()  # its parameters can be trained


def test_a_family_shares_batches_and_equals_the_run_on_disk(tmp_path: Path) -> None:
    members = [
        wsae.Member(gamma="none", k=4, d_sae=48),
        wsae.Member(gamma="variance", alpha=0.5, k=4, d_sae=48),
    ]
    source = ArraySource(world(), heldout_fraction=0.1)
    family = wsae.fit_family(source, members, **QUICK)
    assert family.names == ["plain", "variance-a0.5"]
    cfg = TrainConfig(members=tuple(members), **QUICK)
    on_disk = train_run(cfg, source, tmp_path / "run").saes["acts"]
    for name, sae in zip(family.names, family.saes, strict=True):
        assert torch.equal(sae.W_dec, on_disk[name].W_dec)
    assert "members/acts/plain/sae.safetensors" in files_of(tmp_path / "run")
    assert family.gamma["variance-a0.5"]["heaviest"][0][0] == 5


def test_a_config_or_what_a_file_says_of_it_stands_for_the_words() -> None:
    words = wsae.Member(gamma="variance", alpha=0.5, k=4)
    gamma, kind = GammaConfig(rule="variance", alpha=0.5), {"kind": "topk", "k": 4}
    assert wsae.Member(gamma=gamma, activation=kind) == words
    assert wsae.Member(gamma=GammaConfig(rule="variance"), alpha=0.5, activation=TopK(k=4)) == words
    with pytest.raises(UserError, match=r"unknown key .activation.*kk"):
        wsae.Member(activation={"kind": "topk", "kk": 4})


def test_gamma_may_be_a_vector_or_come_from_labels() -> None:
    x = world(1000)
    proxy = np.linspace(1, 2, 16)
    sae = wsae.fit(x, k=4, d_sae=32, gamma=proxy, alpha=2.0, normalise="none", **QUICK)
    torch.testing.assert_close(sae.gamma.double(), torch.from_numpy(proxy) ** 2, rtol=1e-6, atol=0)
    labels = (x[:, 0] > x[:, 0].median()).long().numpy()
    positive = x.clone()
    positive[:, 3] = torch.from_numpy(labels).float()  # active on one class alone: beta = 1
    fitted = wsae.fit(
        positive, k=4, d_sae=32, gamma="consistency", normalise="none", labels=labels, **QUICK
    )
    assert float(fitted.gamma[3]) == 1
    assert float(fitted.gamma[7]) < 0.7


def test_evaluate_measures_held_out_rows() -> None:
    x = world()
    sae = wsae.fit(x[:3000], k=4, d_sae=48, **QUICK)
    metrics = wsae.evaluate(sae, x[3000:])["metrics"]
    y = x[3000:].double()
    with torch.no_grad():
        error = (sae(x[3000:]).double() - y).square().sum()
    fvu = float(error / (y - y.mean(0)).square().sum())
    assert metrics["fvu"]["value"] == pytest.approx(fvu, rel=1e-5)
    assert metrics["fvu"]["low"] < fvu < metrics["fvu"]["high"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"k": 40}, "k = 40 active latents of only d_sae = 32"),
        ({"activation": "topp"}, "activation 'topp' is unknown"),
        ({"gamma": "variances"}, "rule"),
        ({"alhpa": 1.0}, r"unknown key 'alhpa'"),
        ({"gamma": np.ones(3)}, "3 entries, the activations 16"),
        ({"gamma": "consistency"}, "needs labels"),
        ({"labels": np.zeros(7, dtype=np.int64)}, "7 labels for 500 rows"),
        ({"labels": np.full(500, 0.5)}, "one whole number a row"),
        ({"k": 0}, r"k: .* greater than 0 \(got 0\)"),
        ({"d_sae": 2**63}, "more than any machine holds"),
        ({"tokens": 0}, r"tokens: .* greater than 0 \(got 0\)"),
        ({"batch_size": 501}, "batch size 501 with 500 training rows"),
        ({"device": "gpu"}, "device gpu: not on this machine; it has cpu"),
        ({"device": "cuda:77"}, "device cuda:77: not on this machine"),
        ({"device": "meta"}, "holds no values"),
        ({"auxk": float("inf")}, "auxk: .* finite"),
        ({"gamma": np.ones((16, 16))}, r"one value per dimension, \[d_in\]"),
        ({"gamma": np.full(16, np.nan)}, "must be finite"),
    ],
)
def test_wrong_options_are_one_clear_line(options: dict[str, object], says: str) -> None:
    defaults: dict[str, object] = {"d_sae": 32, "k": 4}
    with pytest.raises(UserError, match=says) as caught:
        wsae.fit(world(500), **{**defaults, **QUICK, **options})
    assert "\n" not in str(caught.value)


def test_gamma_from_proxy_is_what_a_run_uses() -> None:
    x = world(1000)
    sae = wsae.fit(x, k=4, d_sae=32, gamma="variance", alpha=0.5, robust="winsor", **QUICK)
    cfg = wsae.Member(gamma="variance", alpha=0.5, robust="winsor").gamma
    expected = gamma_from_proxy(cfg, x.double().var(0, correction=0))
    torch.testing.assert_close(sae.gamma.double(), expected, rtol=1e-6, atol=0)


def many(**fields: object) -> list[MemberConfig]:
    rules = [("none", 1.0), ("variance", 1.0), ("variance", 0.5), ("gap", 1.0)]
    return [
        wsae.Member(gamma=rule, alpha=alpha, k=4, d_sae=48, lr=3e-3, seed=seed, **fields)
        for rule, alpha in rules
        for seed in range(3)
    ]


def batched(members: list[MemberConfig], **data: object) -> bool:
    cfg = TrainConfig(members=tuple(members), **data)
    source = ArraySource(world(), heldout_fraction=0.0)
    stats = source.stats()
    family = start_family(cfg, source, stats)
    return fits_a_bank(cfg, family, source)


def test_many_small_members_train_together_as_they_would_in_turn() -> None:
    x, data = world(), {"tokens": 12_000, "batch_size": 200, "seed": 3, "dead_after": 400}
    together = wsae.fit_family(x, many(), **data)
    in_turn = wsae.fit_family(x, many(), kernels="eager", **data)
    assert batched(many(), **data)
    for mine, other, name in zip(together.saes, in_turn.saes, together.names, strict=True):
        for key, tensor in other.tensors().items():
            torch.testing.assert_close(
                mine.tensors()[key], tensor, rtol=5e-3, atol=2e-3, msg=lambda m, n=name: n + m
            )
    for mine, other in zip(together.metrics, in_turn.metrics, strict=True):
        assert mine.keys() == other.keys()
        assert mine["fvu"] == pytest.approx(other["fvu"], rel=0.2)  # last batch, last window
        assert abs(mine["dead_frac"] - other["dead_frac"]) < 0.05


@pytest.mark.parametrize(
    "change",
    [{"kernels": "eager"}, {"dtype": "bfloat16"}, {"batch_size": 4000}],
)
def test_members_that_ask_for_more_than_a_bank_has_train_in_turn(change: dict[str, object]) -> None:
    assert not batched(many(), **({"tokens": 12_000, "batch_size": 200} | change))


def test_members_with_a_learning_rate_each_train_in_turn() -> None:
    each = [m.model_copy(update={"lr": 1e-3 * (1 + i)}) for i, m in enumerate(many())]
    assert not batched(each, tokens=12_000, batch_size=200)


class Counted(ArraySource):
    """Counts the batches read."""

    reads = 0

    def stream(self, *args: object, **kwargs: object) -> object:
        stream = super().stream(*args, **kwargs)
        read = stream.next

        def counted() -> object:
            self.reads += 1
            return read()

        stream.next = counted
        return stream


class Endless(ArraySource):
    """Does not know how many rows it has, as a live model."""

    @property
    def n_rows(self) -> None:
        return


def test_a_bank_reads_the_data_once_and_none_of_a_live_source() -> None:
    members = [m for m in many() if m.gamma.rule != "gap"]  # a covariance reads the data too
    run = {"tokens": 12_000, "batch_size": 200}
    source = Counted(world(), heldout_fraction=0.0)
    wsae.fit_family(source, members, **run)
    assert source.reads == 60 + 1  # one group of members; its first batch is looked at before
    assert batched(members, **run)
    live, cfg = Endless(world(), heldout_fraction=0.0), TrainConfig(members=tuple(members), **run)
    assert not fits_a_bank(cfg, start_family(cfg, live, live.stats()), live)
