"""Compiled training against autograd: every activation function, form and loss, to float32's rounding."""

import logging

import pytest
import torch
from test_train_transcoder import CASES as TRANSCODERS
from test_train_transcoder import trained as transcoder
from torch import Tensor

import wsae
from wsae.acts.source import ArraySource
from wsae.core.errors import UserError
from wsae.core.progress import quiet
from wsae.kernels.native.build import why_not
from wsae.kernels.native.slices import Centred, to_slices
from wsae.sae import SAE
from wsae.sae.forward import weigh
from wsae.train import native
from wsae.train import step as dispatch
from wsae.train.config import MemberConfig, TrainConfig
from wsae.train.family import finished, make_family
from wsae.train.loop import run_steps
from wsae.train.run import start_family
from wsae.train.state import make_batch
from wsae.train.step import Crew

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"compiled kernels: {why_not()}")


def world() -> Tensor:
    g = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(160, 48, generator=g), dim=1)
    z = (torch.rand(4000, 160, generator=g) < 0.04) * torch.rand(4000, 160, generator=g)
    x = 20 * z @ directions + 3
    x[:, 5] *= 10
    return x


X = ArraySource(world())


def trained(kernels: str, **fields: object) -> tuple[SAE, dict[str, float]]:
    steps = 30
    setting = {"d_sae": 192, "activation": {"kind": "topk", "k": 6}, "lr": 1e-3, **fields}
    cfg = TrainConfig.parse(
        {
            "members": (MemberConfig.parse(setting),),
            "tokens": steps * 200,
            "batch_size": 200,
            "kernels": kernels,
            "dead_after": 800,
        }
    )
    family = start_family(cfg, X, X.stats())
    (member,) = family.members["acts"]
    member.sparse.fill_(True)  # ReLU kinds take the compiled step from the start
    with quiet("train", None, "tokens") as tick:
        run_steps(cfg, family, X.stream(200, 0), 0, tick, lambda _: None)
    sums = {name: float(value) for name, value in member.sums.items()}
    return finished(member), sums


CASES = {
    "topk": {},
    "topk, dead latents": {"lr": 3e-2},
    "variance": {"gamma": {"rule": "variance"}},
    "whiten": {"gamma": {"rule": "whiten"}},
    "outlier left out": {"gamma": {"rule": "variance", "robust": "drop"}},
    "outlier left out, dead latents": {
        "gamma": {"rule": "variance", "robust": "drop", "alpha": 0},
        "lr": 3e-2,
    },
    "latent variance": {"gamma": {"rule": "latent_variance"}},
    "l1": {"l1": 0.05},
    "group": {"activation": {"kind": "group_topk", "k": 6}},
    "batch": {"activation": {"kind": "batch_topk", "k": 6}},
    "relu": {"activation": {"kind": "relu"}, "l1": 0.3},
    "jumprelu": {
        "activation": {"kind": "jumprelu", "threshold": 0.3, "bandwidth": 0.2},
        "l0": 3e-3,
    },
    "multi": {"activation": {"kind": "multi_topk", "k": 6}},
    "multi, whiten": {"activation": {"kind": "multi_topk", "k": 6}, "gamma": {"rule": "whiten"}},
    "matryoshka": {"activation": {"kind": "matryoshka", "k": 6, "widths": (20, 90)}},
    "matryoshka of one level": {"activation": {"kind": "matryoshka", "k": 6, "widths": (192,)}},
    "matryoshka over topk, dead latents": {
        "activation": {"kind": "matryoshka", "k": 6, "over": "topk"},
        "lr": 3e-2,
    },
    "matryoshka by level, dead latents": {
        "activation": {"kind": "matryoshka", "k": 6, "widths": (40, 90), "level_auxk": True},
        "lr": 3e-2,
    },
    "gated": {"activation": {"kind": "gated"}, "l1": 0.3},
    "jumprelu, held, quadratic": {
        "activation": {
            "kind": "jumprelu",
            "threshold": 0.3,
            "bandwidth": 0.2,
            "ste_to_input": True,
        },
        "l0": 1e-2,
        "l0_penalty": "quadratic",
        "target_l0": 9,
        "penalty_warmup": 0.5,
    },
    "jumprelu, tanh": {
        "activation": {"kind": "jumprelu", "threshold": 0.3, "bandwidth": 0.2},
        "encoder_scale": 1.0,
        "l0": 0.1,
        "l0_penalty": "tanh",
    },
    "relu, annealed": {"activation": {"kind": "relu"}, "l1": 0.3, "p_end": 0.5, "anneal_from": 0.2},
    "gated, annealed": {"activation": {"kind": "gated"}, "l1": 0.3, "p_end": 0.5},
    "tied": {"tied": True},
    "tied, l1": {"tied": True, "l1": 0.1},
    "tied relu": {"tied": True, "activation": {"kind": "relu"}, "l1": 0.3},
}


def apart(one: tuple[SAE, dict[str, float]], two: tuple[SAE, dict[str, float]]) -> float:
    """Return by what share two trained SAEs and their sums differ at most."""
    (one, sums), (two, others) = one, two
    names = ("loss", "auxk", "sse", "l0", "rows")
    found = [abs(others[name] - sums[name]) / (abs(sums[name]) + 1e-9) for name in names]
    for name, tensor in one.tensors().items():
        difference = float((two.tensors()[name] - tensor).double().norm())
        found.append(difference / max(1.0, float(tensor.double().norm())))
    return max(found)


NEAR = 1e-3


@pytest.mark.parametrize("case", CASES)
def test_compiled_training_follows_autograd(case: str) -> None:
    """By rounding alone. A row whose k-th and next latent are equal but for rounding may go either way: not thrice."""
    found: list[float] = []
    while len(found) < 3 and min(found, default=1.0) > NEAR:
        sae, sums = trained("eager", seed=len(found), **CASES[case])
        found.append(apart((sae, sums), trained("native", seed=len(found), **CASES[case])))
        if case.startswith("outlier"):
            assert sae.gamma.nonzero()[:, 0].tolist() == [i for i in range(48) if i != 5]
        if case.endswith("dead latents"):
            assert sums["auxk"] > 0
    assert min(found) <= NEAR, found


def test_batch_topk_of_all_latents_takes_every_pair_that_is_positive() -> None:
    """No threshold that leaves as many as are wanted is below all of them."""
    setting = {"d_sae": 4, "activation": {"kind": "batch_topk", "k": 4}}
    cfg = TrainConfig.parse({"members": (setting,), "tokens": 200, "batch_size": 200})
    (member,) = make_family(cfg, X.stats()).members["acts"]
    assert member.sae.b_enc is not None
    member.sae.b_enc.data.fill_(1e3)
    x = make_batch(world()[:200], member).x
    found = native.find_pairs(member.sae, native.enter(member), Centred.of(x, member.sae.b_in))
    assert len(found.values) == 4 * 200


DENSE = {
    **{case: CASES[case] for case in ("relu", "jumprelu", "jumprelu, tanh", "gated", "tied relu")},
    "quadratic": CASES["jumprelu, held, quadratic"] | {"target_l0": 60},
    "variance of latents": {"activation": {"kind": "relu"}, "gamma": {"rule": "latent_variance"}},
    "whiten": {
        "activation": {"kind": "gated"},
        "gamma": {"rule": "whiten"},
        "precondition": {"kind": "whiten"},
    },
}


@pytest.mark.parametrize("case", DENSE)
def test_steps_of_dense_codes_follow_autograd(case: str) -> None:
    """Rows in parts, the last of them shorter."""
    assert 600 % dispatch.ROWS > 0
    setting = {"d_sae": 192, "lr": 1e-3, "auxk": 0, **DENSE[case]}
    fields = {"members": (MemberConfig.parse(setting),), "tokens": 3 * 600, "batch_size": 600}
    sides = []
    for kernels in ("eager", "native"):
        cfg = TrainConfig.parse({**fields, "kernels": kernels})
        (member,) = start_family(cfg, X, X.stats()).members["acts"]
        stream = X.stream(600, 0)
        for step in range(3):
            member.sparse.fill_(False)
            dispatch.train_step(member, make_batch(stream.next()["acts"], member), step, cfg)
        sides.append(member)
    one, two = sides
    torch.testing.assert_close(two.window, one.window, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(two.latent_moments, one.latent_moments, rtol=1e-5, atol=1e-9)
    for name, tensor in one.sae.tensors().items():
        difference = (two.sae.tensors()[name] - tensor).double().norm()
        assert float(difference) <= 1e-5 * max(1.0, float(tensor.double().norm())), name


@pytest.mark.parametrize("case", TRANSCODERS)
def test_compiled_training_of_transcoders_follows_autograd(case: str) -> None:
    one, sums = transcoder(kernels="eager", **TRANSCODERS[case])
    two, others = transcoder(kernels="native", **TRANSCODERS[case])
    for name in ("loss", "auxk", "sse", "l0", "rows"):
        assert others[name] == pytest.approx(sums[name], rel=2e-3, abs=1e-9), name
    for name, tensor in one.tensors().items():
        difference = (two.tensors()[name] - tensor).double().norm()
        assert float(difference) <= 5e-3 * max(1.0, float(tensor.double().norm())), name
    if case.endswith("dead latents"):
        assert sums["auxk"] > 0


@pytest.mark.parametrize("form", ["zero", "underflow", "singular matrix"])
def test_the_residual_for_revival_is_finite_and_right_wherever_the_loss_looks(form: str) -> None:
    cfg = TrainConfig.parse({"members": ({"d_sae": 192},), "tokens": 200})
    (member,) = make_family(cfg, X.stats()).members["acts"]
    g = torch.Generator().manual_seed(3)
    gamma = torch.rand(48, generator=g) + 0.5
    if form == "singular matrix":
        gamma = torch.randn(5, 48, generator=g).T @ torch.randn(5, 48, generator=g)
    else:
        gamma[7] = 0 if form == "zero" else 1e-30  # whose square is 0 in float32
    member.sae.set_gamma(gamma)
    x, x_hat = torch.randn(9, 48, generator=g), torch.randn(9, 48, generator=g)
    found = native._error(member, native._weighted_residual(to_slices(x_hat), x, gamma), x)
    assert torch.isfinite(found).all()
    weighed, wanted = weigh(found, gamma), weigh(x - x_hat, gamma)
    torch.testing.assert_close(weighed, wanted, rtol=1e-5, atol=1e-5)


def test_a_code_that_is_not_sparse_is_left_to_autograd(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UserError, match="k = 40 of 192 latents is not sparse.*use auto or eager"):
        trained("native", activation={"kind": "topk", "k": 40})
    dispatch._told.clear()
    with caplog.at_level(logging.WARNING, logger="wsae"):
        trained("auto", activation={"kind": "topk", "k": 40})
        trained("auto", activation={"kind": "topk", "k": 40})
    assert [r.message for r in caplog.records] == [
        "training plain with PyTorch's own kernels: k = 40 of 192 latents is not sparse (more than one in 8)"
    ]


def test_relu_moves_to_the_compiled_step_once_few_latents_are_active() -> None:
    cfg = TrainConfig.parse(
        {
            "members": (
                MemberConfig.parse(
                    {"d_sae": 192, "activation": {"kind": "relu"}, "l1": 6.0, "lr": 3e-3}
                ),
            ),
            "tokens": 400 * 200,
            "batch_size": 200,
        }
    )
    family = make_family(cfg, X.stats())
    (member,) = family.members["acts"]
    where = []
    with quiet("train", None, "tokens") as tick:
        run_steps(
            cfg,
            family,
            X.stream(200, 0),
            0,
            tick,
            lambda _: where.append(member.weights is not None),
        )
    assert not any(where[: dispatch.LOOK_EVERY])
    assert where[-1]


def took(threads: int, busy: int, cores: int) -> float:
    """What a step of work 1 takes where threads wait for the slowest, beside busy programs."""
    held_up = 2.0 if threads + busy > cores else 1.0
    return (0.1 + 0.9 / threads) * (1.0 if threads == 1 and busy < cores else held_up)


@pytest.mark.parametrize(("cores", "alone", "beside"), [(2, 2, 1), (8, 8, 4)])
def test_the_kernels_use_fewer_threads_while_those_are_faster(
    cores: int, alone: int, beside: int
) -> None:
    crew = Crew(cores)
    history = []
    for busy in (0, 1, 0):
        for _ in range(4 * Crew.LATE):
            history.append(crew.threads)
            crew.note(took(crew.threads, busy, cores))
    parts = [history[i : i + Crew.LATE] for i in range(0, len(history), Crew.LATE)]
    mostly = [max(set(part), key=part.count) for part in parts]
    assert [mostly[i] for i in (3, 7, 11)] == [alone, beside, alone]
    assert parts[3].count(alone) > 0.97 * Crew.LATE, "trials are rare where nothing changes"
    assert set(history) <= {2**i for i in range(4)}


def test_training_with_trials_of_threads_has_the_bits_of_one_and_gives_them_back() -> None:
    x = torch.randn(2000, 24, generator=torch.Generator().manual_seed(0))
    before, rows = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            member = wsae.Member(k=4, d_sae=128, lr=1e-2)
            run = {"tokens": 60 * 128, "batch_size": 128, "kernels": "native"}
            family = wsae.fit_family(x, member, dead_after=128, **run)
            assert torch.get_num_threads() == threads
            rows.append(family.saes[0].W_dec.detach())
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*rows)
