"""Training on several processes: every layout equals one process, and continues on any other."""

import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from halting import Halting as Interrupted
from torch import Tensor

from wsae.acts.flow import Tally
from wsae.acts.source import ArraySource, StoreSource
from wsae.core.artifact import write_manifest
from wsae.core.errors import UserError
from wsae.core.files import write_json
from wsae.core.tensors import MappedTensor, save_tensors
from wsae.kernels.native.build import why_not
from wsae.sae import SAE
from wsae.sae.config import SAEConfig
from wsae.train.config import MemberConfig, TrainConfig
from wsae.train.family import inputs_of
from wsae.train.loggers import read_json_lines
from wsae.train.loop import Stopped, checkpoints
from wsae.train.parallel import run as loop
from wsae.train.parallel import step as choose
from wsae.train.parallel.config import Layout, chunk_part, even_part, parse_layout
from wsae.train.parallel.run import train_parallel
from wsae.train.parallel.step import (
    among_largest,
    choose_groups,
    choose_topk,
    initial_rows,
    make_shard,
)
from wsae.train.parallel.world import (
    ALIVE_S,
    MAX,
    MIN,
    HostMemory,
    Mesh,
    MeshAxis,
    MeshPlace,
    joined,
    lay_out,
)
from wsae.train.run import load_run, train_run

STEPS, HALF, ROWS = 12, 10, 62
LAYOUTS = {
    "data4": Layout(data=4),
    "latents4": Layout(latents=4),
    "data2-latents2": Layout(data=2, latents=2),
    "layers2-data2": Layout(layers=2, data=2),
}
SIDES = ("eager", "auto")
"""What trains transcoders."""
RELATIVE = 1e-5
"""Largest difference to one process, as a share of the largest entry: fp32 sums in another order, nothing else."""


def features(n: int = 3000, d_in: int = 16, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(40, d_in, generator=g), dim=1)
    z = (torch.rand(n, 40, generator=g) < 0.06) * torch.rand(n, 40, generator=g)
    x = 20 * z @ directions + 3
    x[:, 5] *= 10
    return x


def member(kind: str, label: str, **fields: object) -> MemberConfig:
    activation: dict[str, object] = {"kind": kind}
    if kind not in ("relu", "gated", "jumprelu"):
        activation["k"] = fields.pop("k", 4)
    if kind == "matryoshka":
        activation["widths"] = (40, 150)  # the second exceeds what one of four ranks has
    defaults: dict[str, object] = {"d_sae": 230, "lr": 3e-3, "auxk": 0.25, "label": label}
    return MemberConfig.parse({"activation": activation, **defaults, **fields})


def config(**fields: object) -> TrainConfig:
    """230 latents, 62 rows, groups of 46: nothing divides evenly; most latents soon count as dead."""
    members = [
        member("topk", "topk", gamma={"rule": "latent_variance"}),
        member("batch_topk", "batch", k_aux=300),
        member("jumprelu", "jump", l0=0.05, l0_penalty="quadratic", target_l0=9, pre_act=1e-3),
        member("group_topk", "group", k=5, gamma={"rule": "variance"}),
        member("relu", "tied", tied=True, l1=0.01, p_end=0.5),
        member("matryoshka", "nested"),
        member("multi_topk", "multi"),
        member("gated", "gated", l1=0.01),
        member("topk", "white", gamma={"rule": "whiten"}, precondition={"kind": "whiten"}),
    ]
    data = {"members": members, "tokens": STEPS * ROWS, "batch_size": ROWS, "log_every": 6}
    return TrainConfig.parse({**data, "dead_after": 100, "kernels": "eager", "seed": 1, **fields})


def compiled() -> TrainConfig:
    """Members that the compiled kernels train from the start, ranks that share rows and latents alike."""
    members = [
        member("topk", "topk", gamma={"rule": "latent_variance"}),
        member("batch_topk", "batch", k_aux=300),
        member("topk", "tied", tied=True, l1=0.01),
        member("matryoshka", "nested"),
        member("multi_topk", "multi", k=1),  # 4 of the 56 latents of the last rank
        member("group_topk", "group", k=8, d_sae=240),
        member("topk", "white", gamma={"rule": "whiten"}, precondition={"kind": "whiten"}),
    ]
    return config(members=members, kernels="native")


def two_hooks() -> TrainConfig:
    members = [member("topk", "topk"), member("batch_topk", "batch", d_sae=None, expansion=4)]
    return config(members=members)


def two_sides(kernels: str) -> TrainConfig:
    """Transcoders from the store's hook a to its hook b, of so few latents that each is active in several rows.

    A row of the decoder that starts along one row's errors has a gradient of rounding alone, and Adam makes much of it.
    """
    members = [
        member("topk", "topk", d_sae=66, skip=True, gamma={"rule": "whiten"}),
        member("batch_topk", "batch", d_sae=66, precondition={"kind": "whiten"}),
    ]
    return config(members=members, kernels=kernels, hook_out={"a": "b"})


def write_store(place: Path) -> None:
    """A store of two hooks in two shards each, as a harvest leaves it."""
    acts = {"a": features(600), "b": features(600, 12, seed=1)}
    tally, names, none = Tally({"a": 16, "b": 12}), ["stats.safetensors", "tokens.json"], {}
    tally.update(acts, none, {"kept": 600})
    save_tensors(place / "stats.safetensors", tally.tensors())
    write_json(place / "tokens.json", {})
    for hook, x in acts.items():
        for shard, rows in enumerate((x[:250], x[250:])):
            names.append(f"train/{hook}/acts-{shard:05d}.safetensors")
            save_tensors(place / names[-1], {"acts": rows})
    info = {
        "hooks": {"a": 16, "b": 12},
        "rows": {"train": 600, "heldout": 0},
        "shard_rows": {"train": [250, 350], "heldout": []},
        "skipped": {"train": {}, "heldout": {}},
        "seq_len": 1,
    }
    write_manifest(place, "store", {"model": "none"}, names, info=info)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def run_ranks(work: Callable[..., None], ranks: int, *arguments: object) -> None:
    """Run work(rank, *arguments) in as many processes, forked from one that has imported the package."""
    mp.set_forkserver_preload(["pytest", "wsae.train.run", "wsae.train.parallel.run"])
    mp.start_processes(work, arguments, ranks, start_method="forkserver")


def again(world: Mesh, name: str, layout: Layout) -> Mesh:
    """The same ranks in another layout, with a corner of the store of its own."""
    return lay_out(layout, world.rank, "cpu", dist.PrefixStore(name, world.store))


class Halting(loop.MeshTeam):
    """One rank is asked to stop, as by a signal, after step HALF."""

    def agree(self, stop: bool, due: bool) -> tuple[bool, bool]:
        last = self.world.rank == self.world.layout.ranks - 1
        return super().agree(stop or (last and self.done + 1 >= HALF), due)


@contextmanager
def halting() -> Iterator[None]:
    plain = loop.MeshTeam
    loop.MeshTeam, loop.AGREE_S = Halting, 0.0  # type: ignore[misc]
    try:
        yield
    finally:
        loop.MeshTeam, loop.AGREE_S = plain, 1.0


def work(rank: int, port: int, out: Path) -> None:
    """What each of four processes does: all in one job, for starting processes is most of the time."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "4"}
    cfg, source = config(), ArraySource(features())
    with joined(None) as world:
        check_choices(world)
        check_memory(world)
        for name, layout in LAYOUTS.items():
            train_parallel(cfg, source, out / name, again(world, name, layout))
        if why_not() is None:
            both = again(world, "compiled", LAYOUTS["data2-latents2"])
            train_parallel(compiled(), source, out / "compiled", both)
        for kernels in SIDES:
            both = again(world, f"sides {kernels}", LAYOUTS["data2-latents2"])
            store = StoreSource(out / "store")
            train_parallel(two_sides(kernels), store, out / f"sides-{kernels}", both)
        moved = out / "latents4+layers2-data2"
        with halting(), pytest.raises(Stopped, match=f"step {HALF} of"):
            train_parallel(cfg, source, moved, again(world, "begin", LAYOUTS["latents4"]))
        if world.first:
            shutil.copytree(moved, out / "latents4+1")
        two = again(world, "end", LAYOUTS["layers2-data2"])
        train_parallel(cfg, source, moved, two, resume=True)
        four = again(world, "from 1", LAYOUTS["latents4"])
        train_parallel(cfg, source, out / "1+latents4", four, resume=True)
        check_reads(world, out)


def check_reads(world: Mesh, out: Path) -> None:
    """Train two hooks on layers=2,data=2: a rank reads its own hook and its own rows of each batch."""
    source, read = StoreSource(out / "store"), []
    whole = MappedTensor.read

    def noting(self, index, out):  # noqa: ANN001, ANN202
        read.append((self.path.parent.name, len(index)))
        whole(self, index, out)

    MappedTensor.read = noting  # type: ignore[method-assign]
    train_parallel(
        two_hooks(), source, out / "hooks", again(world, "hooks", LAYOUTS["layers2-data2"])
    )
    MappedTensor.read = whole  # type: ignore[method-assign]
    assert {hook for hook, _ in read} == {"a" if world.rank < 2 else "b"}
    assert sum(rows for _, rows in read) == STEPS * ROWS // 2


def check_choices(world: Mesh) -> None:
    """Random matrices full of ties, cut over four ranks: what they choose together is what one would."""
    latents = again(world, "choose", Layout(latents=4)).place
    both = again(world, "choose both", Layout(data=2, latents=2)).place
    g, owner = torch.Generator().manual_seed(0), torch.arange(30) // 8
    for few, dtype in ((2048, torch.float32), (0, torch.float32), (0, torch.bfloat16)):
        choose._FEW = few  # gather all candidates, or count
        whole = torch.randint(-3, 9, (20, 30), generator=g).to(dtype)
        part = chunk_part(30, 4, world.rank)
        pairs = choose_topk(whole[:, part], 7, latents.latents)
        chosen = together(pairs, part.start, (20, 30))
        assert torch.equal(chosen.sum(1), torch.full((20,), 7))
        for row, mask in zip(whole, chosen.bool(), strict=True):
            assert torch.equal(row[mask].sort().values, row.topk(7).values.sort().values)
            last = row == row[mask].min()  # of equal ones the lower ranks' are taken
            assert max(owner[last & mask]) <= min([*owner[last & ~mask], 4])
        pairs = choose_groups(whole[:, part], part.start, 6, 5, latents.latents)
        chosen = together(pairs, part.start, (20, 30)).bool()
        groups = whole.view(20, 5, 6)
        assert torch.equal(chosen.view(20, 5, 6).sum(2), torch.ones(20, 5, dtype=torch.int64))
        best = torch.where(chosen, whole, -9).view(20, 5, 6)
        assert torch.equal(best.amax(2), groups.amax(2))
    choose._FEW = 2048
    values = torch.rand(400, generator=g).mul(50).round() / 7 + 1e-3
    part = even_part(400, 4, world.rank)
    for wanted in (1, 97, 399, 400, 1000):
        kept = among_largest(values[part], wanted, both)
        every = torch.zeros(400, dtype=torch.int64)
        every[part] = kept.long()
        dist.all_reduce(every)
        top = values.topk(min(wanted, 400)).values
        assert torch.equal(values[every.bool()].sort(descending=True).values, top)


def check_memory(world: Mesh) -> None:
    """Tensors go through the machine's memory, whatever their sizes, unless one rank cannot have it."""
    axis = again(world, "memory", Layout(latents=4)).place.latents
    assert axis.group is not None
    looks: list[int] = []
    without = HostMemory(axis.group, lambda: looks.append(1))
    real = getattr(os, "posix_fallocate", None)
    for size in (3000, 400, 9000, 5000):
        own = torch.arange(size).float() * (axis.index + 1)
        assert torch.equal(axis.gather(own), torch.arange(size) * torch.arange(1, 5)[:, None])
        assert torch.equal(axis.reduce_(own.clone()), torch.arange(size) * 10.0)
        assert axis.memory is not None
        able = hasattr(os, "memfd_create") and why_not() is None
        assert (axis.memory.exchange(own) is None) != able
    for op, found in ((MAX, 4.0), (MIN, 1.0)):
        assert float(axis.reduce_(torch.tensor(axis.index + 1.0), op)) == found

    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    if able:
        late = HostMemory(axis.group, lambda: looks.append(1))
        late.exchange(own)
        time.sleep(1.4 * ALIVE_S if axis.index == 2 else 0)
        every = late.exchange(own)
        assert every is not None
        assert torch.equal(torch.stack(every), torch.arange(size) * torch.arange(1, 5)[:, None])
        assert looks or axis.index == 2  # whether a rank is gone, while they waited

    os.posix_fallocate = full if axis.index == 2 else real
    for alone in (own, own.double()):
        assert without.exchange(alone) is None
        every = replace(axis, memory=without).gather(alone)
        assert torch.equal(every[0], torch.arange(len(own)).to(alone))
    os.posix_fallocate = real


def together(pairs: tuple[Tensor, Tensor], first: int, shape: tuple[int, int]) -> Tensor:
    chosen = torch.zeros(shape, dtype=torch.int64)
    chosen[pairs[0], pairs[1] + first] = 1
    dist.all_reduce(chosen)
    return chosen


@contextmanager
def a_world_of_one(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mesh]:
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in {**env, "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    with joined(None) as world:
        yield world


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("parallel")
    write_store(out / "store")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train_run(config(), ArraySource(features()), out / "one")
    train_run(two_hooks(), StoreSource(out / "store"), out / "one-hooks")
    if why_not() is None:
        train_run(compiled(), ArraySource(features()), out / "one-compiled")
    for kernels in SIDES:
        train_run(two_sides(kernels), StoreSource(out / "store"), out / f"one-sides-{kernels}")
    with pytest.raises(Stopped, match=f"step {HALF} of"):
        train_run(config(), Interrupted(features(), HALF), out / "1+latents4")
    torch.set_num_threads(threads)
    run_ranks(work, 4, free_port(), out)
    return out


def check_same(run: Path, other: Path) -> None:
    """The two runs have the same files, and the same numbers to RELATIVE.

    A run cut in halves has no window of steps long enough for `speed.jsonl`.
    """
    timing = {"speed.jsonl"}
    assert {*names(run)} - timing == {*names(other)} - timing
    here, there = load_run(run).saes, load_run(other).saes
    for hook, members in here.items():
        for name, sae in members.items():
            for key, tensor in there[hook][name].tensors().items():
                found, scale = sae.tensors()[key], float(tensor.abs().max())
                torch.testing.assert_close(
                    found, tensor, rtol=0, atol=RELATIVE * scale, msg=f"{run} {name} {key}"
                )
    rows, others = (read_json_lines(place / "metrics.jsonl") for place in (run, other))
    assert len(rows) == len(others)
    for row, expected in zip(rows, others, strict=True):
        assert list(row) == list(expected)
        for key, value in row.items():
            if isinstance(value, str):
                assert value == expected[key]
            else:
                near = pytest.approx(expected[key], rel=RELATIVE, abs=1e-9)
                assert value == near, (run, row["member"], key)


def names(run: Path) -> set[str]:
    found = (p.relative_to(run) for p in run.rglob("*") if p.is_file())
    return {str(name) for name in found}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_equals_one_process(runs: Path, name: str) -> None:
    check_same(runs / name, runs / "one")


def test_the_comparison_covers_dead_latents_in_both_ways(runs: Path) -> None:
    rows = {row["member"]: row for row in read_json_lines(runs / "one" / "metrics.jsonl")}
    for name, k_aux in (("topk", 8), ("batch", 300), ("group", 8)):
        assert rows[name]["auxk"] > 0, name
        assert (rows[name]["dead_frac"] * 230 > k_aux) == (k_aux == 8), name


def test_hooks_over_ranks_equal_one_process_and_read_their_own_rows(runs: Path) -> None:
    check_same(runs / "hooks", runs / "one-hooks")


@pytest.mark.skipif(why_not() is not None, reason=f"compiled kernels: {why_not()}")
def test_compiled_kernels_on_several_ranks_equal_those_of_one_process(runs: Path) -> None:
    check_same(runs / "compiled", runs / "one-compiled")
    rows = {row["member"]: row for row in read_json_lines(runs / "compiled" / "metrics.jsonl")}
    assert rows["topk"]["auxk"] > 0
    assert rows["batch"]["auxk"] > 0


@pytest.mark.parametrize("kernels", SIDES)
def test_transcoders_on_several_ranks_equal_those_of_one_process(runs: Path, kernels: str) -> None:
    check_same(runs / f"sides-{kernels}", runs / f"one-sides-{kernels}")


@pytest.mark.parametrize("name", ["latents4+layers2-data2", "1+latents4"])
def test_a_run_begun_on_one_layout_ends_on_another(runs: Path, name: str) -> None:
    check_same(runs / name, runs / "one")


def test_a_run_of_four_ranks_ends_on_one(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [p.name for p in checkpoints(runs / "latents4+1")] == [f"step-{HALF:09d}"]
    with a_world_of_one(monkeypatch) as world:
        train_parallel(config(), ArraySource(features()), runs / "latents4+1", world, resume=True)
    check_same(runs / "latents4+1", runs / "one")


def test_misfits_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ArraySource(features(200))
    with a_world_of_one(monkeypatch) as world:
        for layout, says in (
            (Layout(data=64), "data=64: a batch of 62 rows leaves a rank without"),
            (
                Layout(layers=10),
                "layers=10: there are 1 hooks of 9 members to divide; use at most 9",
            ),
        ):
            world.layout = layout
            with pytest.raises(UserError, match=says):
                train_parallel(config(), source, tmp_path / "run", world)
        world.layout = Layout()
        assert not (tmp_path / "run").exists()
        levels = member("matryoshka", "levels")
        apart = levels.activation.model_copy(update={"level_auxk": True})
        levels = levels.model_copy(update={"activation": apart})
        cut = replace(world, place=MeshPlace(latents=MeshAxis(size=2)))
        inputs = inputs_of(None, source.stats()["acts"].kept, None)
        with pytest.raises(
            UserError, match="levels by which m revives dead latents lie on several"
        ):
            make_shard("m", levels, config(), inputs, cut)


@pytest.mark.parametrize(
    ("text", "ranks", "layout"),
    [
        (None, 6, Layout(data=6)),
        ("data=2,latents=3", 6, Layout(data=2, latents=3)),
        ("latents", 6, Layout(latents=6)),
        ("layers=2, data", 6, Layout(layers=2, data=3)),
    ],
)
def test_meshes_are_read(text: str | None, ranks: int, layout: Layout) -> None:
    assert parse_layout(text, ranks) == layout


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("data=2,latent=3", "no axis .latent. .nearest: latents"),
        ("data=0,latents=6", "data=0 is no number of ranks"),
        ("data=4", "asks for 4 processes, 6 were started"),
        ("data=4,latents", "asks for 4 processes, 6 were started"),
        ("data,latents", "only one axis may come without a size"),
        ("data=2,data=3", "data is given twice"),
    ],
)
def test_meshes_that_cannot_be_are_refused(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        parse_layout(text, 6)


def test_parts_cover_everything_once() -> None:
    for total in (1, 7, 12, 62):
        for parts in (1, 2, 4, 7):
            for rule in (even_part, chunk_part):
                found = [i for p in range(parts) for i in range(total)[rule(total, parts, p)]]
                assert found == list(range(total))
            sizes = [len(range(total)[chunk_part(total, parts, p)]) for p in range(parts)]
            chunks = [len(c) for c in torch.arange(total).chunk(parts)]
            assert sizes == chunks + [0] * (parts - len(chunks))


@pytest.mark.parametrize(("d_sae", "d_in"), [(70, 7), (64, 16), (33, 3), (3, 2)])
def test_a_rank_starts_from_the_same_rows_without_drawing_all(d_sae: int, d_in: int) -> None:
    cfg = SAEConfig.parse({"d_in": d_in, "d_sae": d_sae, "activation": {"kind": "relu"}})
    whole = SAE(cfg, seed=3).W_dec.detach()
    coder = SAE(cfg.model_copy(update={"d_out": 5}), seed=3).encoder_rows.detach()
    for parts in (1, 3):
        for index in range(parts):
            part = chunk_part(d_sae, parts, index)
            assert torch.equal(initial_rows(d_sae, d_in, 3, part, block=16), whole[part])
            encoder = initial_rows(d_sae, d_in, 3, part, block=16, transcoder=True)
            assert torch.equal(encoder, coder[part])
