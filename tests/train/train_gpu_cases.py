"""A step on the Triton kernels against autograd. `test_gpu` runs this file, under Triton's interpreter.

The interpreter is slow, so only a few steps take the kernels themselves; the others take their twins, to which
`triton_cases` holds the kernels.
"""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from wsae.acts.source import ArraySource
from wsae.core.progress import quiet
from wsae.kernels import eager
from wsae.kernels.eager import Plan, select_batch_topk, select_group_topk, select_topk
from wsae.kernels.triton.support import BUCKETS_PER_CHOICE
from wsae.sae.precondition import Preconditioner
from wsae.stats.moments import Covariance
from wsae.train import gpu, state
from wsae.train import step as dispatch
from wsae.train.config import MemberConfig, TrainConfig
from wsae.train.family import make_family
from wsae.train.loop import member_tensors, run_steps, set_member_tensors
from wsae.train.state import MemberState, Target, make_batch, make_member
from wsae.train.step import eager_step

D_IN, D_OUT, D_SAE, BATCH = 20, 13, 96, 17
STEPS = 2


def product(x: Tensor, W: Tensor, b: Tensor | None, dtype: torch.dtype) -> Tensor:
    pre = (x.to(dtype).double() @ W.to(dtype).double().T).float()
    return pre if b is None else pre + b


def topk_encode(x: Tensor, W: Tensor, b: Tensor | None, k: int, dtype: torch.dtype):
    indices = select_topk(product(x, W, b, dtype), k)
    return product(x, W, b, torch.float32).gather(1, indices), indices


TWINS = {
    "topk_encode": topk_encode,
    "group_topk_encode": lambda x, W, b, k, dtype: select_group_topk(product(x, W, b, dtype), k),
    "select_batch_topk": lambda x, W, b, k, dtype: select_batch_topk(product(x, W, b, dtype), k),
    "above": lambda x, W, b, limit, dtype: (product(x, W, b, dtype) > limit).nonzero().unbind(1),
    "products": lambda x, W, rows, indices: (x[rows] * W[indices]).sum(1),
    "decode": eager.decode,
    "scatter": Plan.scatter,
    "adam_rows_": eager.adam_rows_,
    "update_rows_": eager.update_rows_,
}


@pytest.fixture
def twins(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, function in TWINS.items():
        monkeypatch.setattr(gpu, name, function)
    monkeypatch.setattr(state, "LOOKED_AT", 1)  # every row, as autograd's step does


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("D_IN", 7), ("D_OUT", 5), ("D_SAE", 24), ("BATCH", 3)):
        monkeypatch.setitem(globals(), name, size)


def config(**fields: object) -> TrainConfig:
    setting = {"d_sae": D_SAE, "activation": {"kind": "topk", "k": 4}, "lr": 3e-3, **fields}
    dtype, out = setting.pop("dtype", "float32"), setting.pop("hook_out", None)
    data = {
        "hook_out": out,
        "members": (MemberConfig.parse(setting),),
        "tokens": 30 * BATCH,
        "batch_size": BATCH,
    }
    return TrainConfig.parse({**data, "dead_after": 60, "kernels": "triton", "dtype": dtype})


def rows(seed: int, batch: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    directions = torch.randn(60, D_IN, generator=torch.Generator().manual_seed(1))
    z = (torch.rand(batch, 60, generator=g) < 0.08) * torch.rand(batch, 60, generator=g)
    return 2 * z @ directions + 0.5


def member_of(run: TrainConfig, dead: bool = False) -> MemberState:
    """A member some way into training: biases, thresholds, moments and rows are not those of the start."""
    g = torch.Generator().manual_seed(2)
    target = None if run.hook_out is None else Target(torch.full((D_OUT,), 2.0), 4.0)
    mean = torch.full((D_IN,), 0.4)
    member = make_member("m", run.members[0], run, mean, 1.0, target=target)
    sae, width = member.sae, member.sae.cfg.width_out
    gamma = torch.rand(width, generator=g) + 0.5
    if run.members[0].gamma.rule == "whiten":
        gamma = gamma + torch.rand(width, width, generator=g) / 4
    if run.members[0].gamma.rule != "none":
        sae.set_gamma(gamma)
    for parameter in sae.parameters():
        noise = 0.1 * torch.randn(parameter.shape, generator=g)
        parameter.data += noise if parameter is not sae.W_dec or sae.cfg.tied else 0.0
    if sae.cfg.transcoder:  # its decoder starts at 0
        sae.W_dec.data = normalize(torch.randn(D_SAE, D_OUT, generator=g), dim=1)
    if cfg := run.members[0].precondition:
        seen = Covariance(D_IN)
        seen.update(rows(0, 500))
        member.inside = Preconditioner.of(cfg, seen).to(member.mean)
    if dead:
        member.dead = torch.rand(D_SAE, generator=g) < 0.3
    return member


def train(member: MemberState, run: TrainConfig, step, first: int = 0, last: int = STEPS) -> None:
    for number in range(first, last):
        x, y = rows(10 + number, BATCH), None
        if member.sae.cfg.transcoder:
            y = 3 * (x @ torch.linspace(-1, 1, D_IN * D_OUT).view(D_IN, D_OUT)).relu()
        step(member, make_batch(x, member, y), 3e-3, run, number)


def same(one: MemberState, two: MemberState) -> None:
    ours, theirs = member_tensors(one), member_tensors(two)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        why = f"{name}: {{}}".format
        atol = 1e-5 * max(1.0, float(tensor.double().abs().max()))  # sums cancel
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=atol, msg=why)


OUT = {"in": "out"}
KINDS = {
    "topk": {},
    "l0": {"l0": 0.01},
    "variance": {"gamma": {"rule": "variance"}},
    "whiten": {"gamma": {"rule": "whiten"}},
    "whitened input": {"precondition": {"kind": "whiten", "power": 0.5}},
    "latent variance": {"gamma": {"rule": "latent_variance"}},
    "l1": {"l1": 0.05},
    "group": {"activation": {"kind": "group_topk", "k": 4}},
    "batch": {"activation": {"kind": "batch_topk", "k": 4}},
    "relu": {"activation": {"kind": "relu"}, "l1": 0.1},
    "jumprelu": {"activation": {"kind": "jumprelu", "threshold": 0.3, "bandwidth": 0.2}, "l0": 0.01},
    "jumprelu, held": {
        "activation": {"kind": "jumprelu", "bandwidth": 0.2, "ste_to_input": True},
        "l0": 0.01, "l0_penalty": "quadratic", "target_l0": 6,
    },
    "relu, annealed": {"activation": {"kind": "relu"}, "l1": 0.1, "p_end": 0.5},
    "multi": {"activation": {"kind": "multi_topk", "k": 3}, "gamma": {"rule": "variance"}},
    "matryoshka": {
        "activation": {"kind": "matryoshka", "k": 4, "widths": (10, 20)}, "gamma": {"rule": "whiten"},
    },
    "matryoshka over topk": {
        "activation": {"kind": "matryoshka", "k": 4, "over": "topk"},
        "precondition": {"kind": "whiten", "power": 0.5}, "l1": 0.1,
    },
    "matryoshka by level": {
        "activation": {"kind": "matryoshka", "k": 4, "widths": (10, 20), "level_auxk": True},
    },
    "gated": {"activation": {"kind": "gated"}, "l1": 0.1, "gamma": {"rule": "variance"}},
    "gated, annealed": {"activation": {"kind": "gated"}, "l1": 0.1, "p_end": 0.5},
    "transcoder": {"hook_out": OUT, "skip": True, "gamma": {"rule": "whiten"}},
    "transcoder, latent variance": {"hook_out": OUT,
        "activation": {"kind": "batch_topk", "k": 4}, "gamma": {"rule": "latent_variance"},
        "precondition": {"kind": "whiten", "power": 0.5},
    },
    "transcoder, multi": {"hook_out": OUT, "activation": {"kind": "multi_topk", "k": 3}},
    "transcoder, nested": {"hook_out": OUT, "activation": {"kind": "matryoshka", "k": 4}, "skip": True},
    "transcoder, gated": {"hook_out": OUT, "activation": {"kind": "gated"}, "l1": 0.1, "skip": True},
    "transcoder, jumprelu": {"hook_out": OUT,
        "activation": {"kind": "jumprelu", "threshold": 0.3, "bandwidth": 0.2}, "l0": 0.01,
    },
    "tied": {"tied": True},
    "tied, l1": {"tied": True, "l1": 0.1},
    "tied jumprelu": {"tied": True, "activation": {"kind": "jumprelu", "threshold": 0.3}, "l0": 0.01},
}  # fmt: skip


class Waits(TorchDispatchMode):
    """Notes the operations for which a host waits for its device (those a step might take)."""

    KNOWN = ("nonzero", "_local_scalar_dense", "bincount", "masked_select", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ARG002
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put_") and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        if masks or name in self.KNOWN:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


WAITLESS = ("transcoder, multi", "matryoshka over topk", "group", "tied", "tied, l1")
LONG = ("matryoshka by level", "transcoder, multi", "transcoder, gated")


@pytest.mark.usefixtures("twins")
@pytest.mark.parametrize("kind", KINDS)
def test_steps_without_and_with_dead_latents_are_autograds(kind: str) -> None:
    both(kind, [False, *[True] * (19 if kind in LONG else 1)])


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("kind", "dead"),
    [
        ("transcoder, multi", True), ("matryoshka by level", True), ("group", False),
        ("gated", False), ("jumprelu", True), ("tied", True), ("tied, l1", False),
    ],
)  # fmt: skip
def test_the_step_on_the_kernels_is_autograds(kind: str, dead: bool) -> None:
    waits = both(kind, [dead])
    if kind in WAITLESS:  # for the dead latents, and Adam's count
        assert sorted(waits.found) == ["_local_scalar_dense", "nonzero"]


def both(kind: str, dead: list[bool]) -> Waits:
    """Train by both steps, at each one with some dead latents or none; returns when the kernels' step waited."""
    run, waits = config(**KINDS[kind], auxk=0.3, k_aux=5), Waits()
    one, two = (member_of(run) for _ in range(2))
    mask = torch.rand(D_SAE, generator=torch.Generator().manual_seed(4)) < 0.3
    for number, some in enumerate(dead):
        one.dead = two.dead = mask & some
        with waits:
            train(one, run, gpu.triton_step, number, number + 1)
        train(two, run, eager_step, number, number + 1)
        assert (float(one.sums["auxk"]) > 0) == any(dead[: number + 1])
    same(one, two)
    return waits


@pytest.mark.usefixtures("twins")
@pytest.mark.parametrize("gamma", ["none", "whiten"])
def test_many_dead_latents_are_chosen_by_parts(gamma: str, monkeypatch) -> None:
    """With too many candidates for the fused kernel; and every dead latent wanted, as k_aux exceeds them."""
    run = config(gamma={"rule": gamma}, auxk=0.3, k_aux=50)
    monkeypatch.setattr(gpu, "MAX_CANDIDATES", 2 * BUCKETS_PER_CHOICE)
    monkeypatch.setattr(gpu, "ROWS", 7)
    one, two = (member_of(run, dead=True) for _ in range(2))
    train(one, run, gpu.triton_step)
    train(two, run, eager_step)
    same(one, two)


@pytest.mark.usefixtures("twins")
def test_bf16_rounds_the_inputs_of_the_choice_alone() -> None:
    run = config(dtype="bfloat16", auxk=0.0)
    one, two = (member_of(run) for _ in range(2))
    sae, x = one.sae, rows(5, BATCH)
    centred = (x - sae.b_dec).detach()
    low = product(centred, sae.encoder_rows.detach(), sae.b_enc.detach(), torch.bfloat16)
    wanted = low.topk(4).indices.sort().values
    values = (centred @ sae.encoder_rows.T + sae.b_enc).gather(1, wanted).relu().detach()
    batch = make_batch(x, one)
    code = gpu.triton_step(one, batch, 3e-3, run, 0)
    order = code.indices.view(-1, 4).argsort(1)
    assert torch.equal(code.indices.view(-1, 4).gather(1, order), wanted)
    torch.testing.assert_close(code.values.view(-1, 4).gather(1, order), values)
    eager_step(two, batch, 3e-3, run, 0)
    assert float(one.sums["sse"]) == pytest.approx(float(two.sums["sse"]), rel=0.01)


@pytest.mark.usefixtures("twins")
def test_either_step_continues_the_other() -> None:
    """The moments and counts are where torch's Adam keeps them, so checkpoints are the same."""
    run = config()
    one, two, three = (member_of(run) for _ in range(3))
    train(one, run, gpu.triton_step, 0, 2)
    train(two, run, eager_step, 0, 2)
    set_member_tensors(three, {k: v.clone() for k, v in member_tensors(one).items()}, "here")
    train(one, run, eager_step, 2, 4)
    train(two, run, gpu.triton_step, 2, 4)
    train(three, run, gpu.triton_step, 2, 4)
    same(one, two)
    same(three, two)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch, twins: None) -> list[int]:  # noqa: ARG001
    """The steps that the kernels take of runs, which may have them here."""
    steps: list[int] = []
    monkeypatch.setattr(dispatch, "unfit_triton", lambda *_: None)
    monkeypatch.setattr(
        gpu, "triton_step", lambda *a, old=gpu.triton_step: steps.append(a[-1]) or old(*a)
    )
    return steps


def go(run: TrainConfig, family, first: int, last: int, place=None):
    """Take a run's steps from one to another; returns its place in the data."""
    stream = ArraySource(rows(3, 200)).stream(BATCH, 0, place)
    short = run.model_copy(update={"tokens": last * BATCH, "warmup": 0.0, "decay": 0.0})
    with quiet("train", None, "tokens") as tick:
        run_steps(short, family, stream, first, tick, lambda _: None)
    return stream.state()


def test_a_run_goes_through_the_kernels_and_resumes_bit_for_bit(taken) -> None:
    run, stats = config(k_aux=3), ArraySource(rows(3, 200)).stats()
    whole, cut = (make_family(run, stats) for _ in range(2))
    go(run, whole, 0, 14)
    place = go(run, cut, 0, 12)  # the dead latents were found after step 10
    again = make_family(run, stats)
    (old,), (new,), (one,) = (f.members["acts"] for f in (cut, again, whole))
    assert old.dead.any()
    set_member_tensors(new, {k: v.clone() for k, v in member_tensors(old).items()}, "here")
    go(run, again, 12, 14, place)
    assert taken == [*range(14), *range(12), 12, 13]
    for name, tensor in member_tensors(one).items():
        assert torch.equal(tensor, member_tensors(new)[name]), name


@pytest.mark.parametrize("kind", ["gated", "jumprelu"])
def test_kinds_without_a_k_move_to_the_kernels_once_sparse_and_back(
    kind: str, taken, monkeypatch
) -> None:
    run, stats = config(**KINDS[kind]), ArraySource(rows(3, 200)).stats()
    ours, eager = (make_family(run, stats) for _ in range(2))
    monkeypatch.setattr(dispatch, "LOOK_EVERY", 2)
    for first, few in ((0, 1.0), (4, 0.0)):
        monkeypatch.setattr(dispatch, "FEW_ON_GPU", few)
        go(run, ours, first, first + 4)
    assert taken == [2, 3, 4, 5]
    alone = run.model_copy(update={"kernels": "eager"})
    for first in (0, 4):
        go(alone, eager, first, first + 4)
    (one,), (two,) = (family.members["acts"] for family in (ours, eager))
    one.sparse = two.sparse
    same(one, two)


@pytest.mark.usefixtures("twins")
def test_the_benchmark_trains_the_same_member_both_ways() -> None:
    path = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
    spec = importlib.util.spec_from_file_location("gpu_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    size = benchmark.Size(d_in=9, d_sae=17, batch=3, k=2)
    one, two = (benchmark.make_training(size, "cpu") for _ in range(2))
    benchmark.kernels().train_step(*one)
    benchmark.plain().train_step(*two)
    assert one[3].dtype == "bfloat16"
    assert float(one[0].sums["sse"]) == pytest.approx(float(two[0].sums["sse"]), rel=0.05)


@pytest.mark.usefixtures("twins")
@pytest.mark.parametrize("kind", WAITLESS)
def test_later_steps_do_not_wait_for_the_device(kind: str) -> None:
    run = config(**KINDS[kind], k_aux=2)
    member = member_of(run, dead=True)
    train(member, run, gpu.triton_step, 0, 1)
    with Waits() as waits:
        train(member, run, gpu.triton_step, 1, 2)
    assert waits.found == []


def test_what_is_remembered_follows_its_tensor() -> None:
    mask = torch.tensor([True, False, True])
    (dead,) = gpu.dead_latents(mask)
    assert dead.latents[:2].tolist() == [0, 2]
    assert gpu.dead_latents(mask) is gpu.dead_latents(mask)
    mask[0] = False
    (dead,) = gpu.dead_latents(mask)
    assert (dead.number, dead.latents[0], len(dead.latents)) == (1, 2, 16)
    assert torch.equal(dead.floor.isinf(), torch.arange(16) > 0)


def test_pairs_are_sorted_as_a_plan_is() -> None:
    g = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 4, (18,), generator=g)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    indices = torch.randint(0, 6, (int(counts.sum()),), generator=g)
    rows = torch.arange(18).repeat_interleave(counts)
    plan, wanted = gpu.sorted_by_latent(indices, rows, 7), gpu.Plan.build(indices, offsets, 7)
    for name in ("indices", "rows", "order", "latent_offsets", "latent_rows"):
        assert torch.equal(getattr(plan, name), getattr(wanted, name)), name
    weights = torch.randn(len(indices), generator=g)
    torch.testing.assert_close(gpu.per_latent(plan, weights), plan.per_latent(weights))
    x = torch.randn(18, 3, generator=g)
    both = gpu.twice(plan, plan.latent_rows.flip(0))
    extra = torch.zeros(7, 3).index_add(
        0, indices[plan.order], weights[plan.order, None] * x[plan.latent_rows.flip(0)]
    )
    doubled = torch.cat([weights, weights])
    torch.testing.assert_close(both.scatter(doubled, x), plan.scatter(weights, x) + extra)
