"""Penalties: what they sum, how they are steered, and what of them is refused."""

import pytest
import torch
from torch import Tensor

from wsae.acts.source import ArraySource
from wsae.core.errors import UserError
from wsae.core.progress import quiet
from wsae.sae import SAE, SAEConfig
from wsae.sae.config import MultiTopK, ReLU
from wsae.sae.forward import Price, penalty, pre_act_loss, training_forward
from wsae.train.config import MemberConfig, TrainConfig
from wsae.train.family import finished, make_family
from wsae.train.loop import run_steps
from wsae.train.state import annealing

ROWS = 200


def world() -> Tensor:
    g = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(160, 48, generator=g), dim=1)
    z = (torch.rand(8000, 160, generator=g) < 0.04) * torch.rand(8000, 160, generator=g)
    return 20 * z @ directions


X = ArraySource(world())


def test_a_wide_dense_sae_starts_at_the_scale_of_least_squared_error() -> None:
    x, d_sae = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)), 1536
    scale = MemberConfig.parse({"d_sae": d_sae, "activation": {"kind": "relu"}}).start_scale(64)
    assert scale == 1 / 13
    errors = {}
    for factor in (0.7, 1, 1.4):
        starts = [
            SAE(SAEConfig(d_in=64, d_sae=d_sae, activation=ReLU()), s, factor * scale)
            for s in range(8)
        ]
        with torch.no_grad():
            errors[factor] = sum(float((sae(x) - x).square().sum()) for sae in starts) / 8
    assert min(errors, key=errors.__getitem__) == 1
    assert errors[1] / float(x.square().sum()) == pytest.approx(
        scale, rel=0.06
    )  # FVU 1 / (1 + m) too


def l0_of(tokens: int = 16_000, batch_size: int = ROWS, **fields: object) -> float:
    """The mean L0 of a JumpReLU after training, on the data it was trained on."""
    setting = {"d_sae": 192, "activation": {"kind": "jumprelu"}, "lr": 1e-3, **fields}
    data = {"members": (setting,), "tokens": tokens, "batch_size": batch_size}
    cfg = TrainConfig.parse(data)
    family = make_family(cfg, X.stats())
    with quiet("train", None, "tokens") as tick:
        run_steps(cfg, family, X.stream(batch_size, 0), 0, tick, lambda _: None)
    ((_, member),) = family.all()
    with torch.no_grad():
        return float((finished(member).encode(world()) != 0).sum(1).float().mean())


@pytest.mark.parametrize(
    ("target", "fields"),
    [
        (4, {}),
        (12, {"lr": 1e-4}),
        (8, {"l0": 0.5, "seed": 1}),
        (8, {"l0": 0.1, "l0_penalty": "quadratic", "lr": 1e-2}),
        (6, {"batch_size": 50, "tokens": 8_000}),
    ],
)
def test_a_target_l0_is_met_to_five_percent(target: float, fields: dict[str, object]) -> None:
    assert l0_of(target_l0=target, **fields) == pytest.approx(target, rel=0.05)


def test_a_larger_coefficient_leaves_fewer_latents_over_a_factor_of_twenty() -> None:
    found = [l0_of(l0=coefficient) for coefficient in (0.0, 0.1, 1.0, 10.0)]
    assert found == sorted(found, reverse=True)
    assert found[0] > 20 * found[-1]


def some(kind: str = "jumprelu", tied: bool = False) -> tuple[SAE, Tensor]:
    activation = {"kind": kind, **({"k": 3} if kind == "topk" else {"bandwidth": 0.5})}
    sae = SAE(SAEConfig.parse({"d_in": 6, "d_sae": 20, "activation": activation, "tied": tied}))
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.5, 2, 20)[:, None] if tied else 1)
    return sae.double(), torch.randn(9, 6, dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "tied"), [("jumprelu", False), ("jumprelu", True), ("topk", True)]
)
def test_penalties_sum_what_they_say(kind: str, tied: bool) -> None:
    sae, x = some(kind, tied)
    entries = training_forward(sae, x).entries
    z, lengths = sae.encode(x), sae.W_dec.norm(dim=1)
    tanh = 0.7 * torch.tanh(4 * z * lengths).sum(1).mean()
    torch.testing.assert_close(penalty(entries, Price(l0=0.7, form="tanh"), 9), tanh)
    annealed = 0.7 * ((z * lengths) ** 0.4).sum(1).mean()
    torch.testing.assert_close(penalty(entries, Price(l1=0.7, p=0.4), 9), annealed)
    inputs = [parameter for name, parameter in sae.named_parameters() if name != "W_dec" or tied]
    unchanged = [  # p at its start of 1 is the penalty without: thresholds below feel it too
        torch.autograd.grad(penalty(entries, Price(l1=0.7, p=p), 9), inputs, retain_graph=True)
        for p in (None, 1.0)
    ]
    torch.testing.assert_close(*unchanged)
    if kind == "topk":  # nothing moves its L0
        assert float(penalty(entries, Price(l0=0.7), 9)) == 0
        return
    L0 = (z > 0).double().sum(1)
    quadratic = 0.7 * (2 / 5 * (L0 - 5) ** 2).mean()
    torch.testing.assert_close(
        penalty(entries, Price(l0=0.7, form="quadratic", target=5), 9), quadratic
    )
    dead = torch.arange(20) < 4
    centred = x if sae.b_dec is None else x - sae.b_dec
    below = (sae.threshold - sae.pre(centred)).relu() * lengths
    torch.testing.assert_close(pre_act_loss(entries, dead, 9), below[:, :4].sum(1).mean())


def test_annealing_falls_in_equal_parts_and_starts_where_it_is_told() -> None:
    cfg = MemberConfig.parse(
        {"activation": {"kind": "relu"}, "l1": 1, "p_end": 0.1, "anneal_from": 0.25}
    )
    powers = [annealing(cfg, step, 400).p for step in range(400)]
    assert set(powers[:101]) == {1.0}
    assert sorted({round(p, 9) for p in powers}) == pytest.approx(
        [0.2, *(0.1 * i for i in range(3, 11))]
    )
    assert powers == sorted(powers, reverse=True)


def test_thresholds_stay_float32_in_half_precision() -> None:
    sae, x = some()
    exact = sae.threshold.clone()
    half = sae.bfloat16()
    assert (half.threshold.dtype, half.W_dec.dtype) == (torch.float64, torch.bfloat16)
    assert torch.equal(half.threshold, exact)
    assert half.encode(x).dtype == torch.bfloat16
    assert half.float().threshold.dtype == torch.float32


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"target_l0": 8}, "target_l0 8: is held by thresholds, and topk has none"),
        ({"activation": {"kind": "relu"}, "target_l0": 8}, "use jumprelu, or the coefficient l1"),
        ({"activation": {"kind": "jumprelu"}, "target_l0": 0.5}, "greater than or equal to 1"),
        (
            {"activation": {"kind": "jumprelu"}, "l0": 1, "l0_penalty": "quadratic"},
            "needs target_l0",
        ),
        ({"l0_penalty": "tanh"}, "costs nothing without a coefficient, l0"),
        ({"activation": {"kind": "relu"}, "p_end": 0.5}, "give its coefficient, l1"),
        ({"activation": {"kind": "relu"}, "anneal_from": 0.5}, "goes with p_end"),
        ({"pre_act": 1e-6}, "topk has no thresholds"),
    ],
)
def test_penalties_that_move_nothing_are_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        MemberConfig.parse(fields)


def test_a_target_beyond_all_latents_is_refused_before_training() -> None:
    with pytest.raises(UserError, match="target_l0 200: more than all d_sae = 192 latents"):
        l0_of(target_l0=200)


def test_multi_topk_of_more_than_all_latents_is_refused_before_training() -> None:
    member = MemberConfig(d_sae=16, activation=MultiTopK(k=5))
    with pytest.raises(UserError, match="trained with 20 active latents too, of only d_sae = 16"):
        member.sae_config(8)
