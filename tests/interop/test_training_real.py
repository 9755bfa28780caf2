"""Losses and gradients of the penalised kinds beside those of other tools' trainers, on the same weights and rows.

Ours keep decoder rows at length 1, so the part of the decoder's gradient along its rows is left out on both sides.
"""

import importlib.util
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from wsae.sae import SAE
from wsae.sae.forward import (
    also_loss,
    penalty,
    pre_act_loss,
    training_forward,
    weighted_reconstruction_loss,
)
from wsae.train.config import MemberConfig, TrainConfig
from wsae.train.state import MemberState, anneal, make_member, price_at

MISSING = [n for n in ("sae_lens", "dictionary_learning") if importlib.util.find_spec(n) is None]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)} (extra interop)"),
    pytest.mark.filterwarnings("default"),
]
D, M, ROWS, STEPS = 12, 40, 64, 100


def rows() -> Tensor:
    return torch.randn(ROWS, D, generator=torch.Generator().manual_seed(2)) * 2 + 0.5


def member_of(
    kind: str, activation: dict[str, object] | None = None, **fields: object
) -> MemberState:
    """A member with weights of no special form, 7 of its latents dead."""
    cfg = {"d_sae": M, "activation": {"kind": kind, **(activation or {})}, "auxk": 0.0, **fields}
    parsed = MemberConfig.parse(cfg)
    run = run_of(parsed)
    member = make_member("m", parsed, run, torch.zeros(D, dtype=torch.float64), 1.0)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in member.sae.named_parameters():
            if name != "W_dec":
                p.add_(0.2 * torch.randn(p.shape, generator=g))
            if name == "threshold":
                p.copy_(0.5 + torch.rand(p.shape, generator=g))
    member.dead[:7] = True
    return member


def run_of(member: MemberConfig) -> TrainConfig:
    return TrainConfig.parse({"members": (member,), "tokens": STEPS * ROWS, "batch_size": ROWS})


def ours(member: MemberState, x: Tensor, step: int = STEPS - 1) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a step, and its gradients."""
    sae, run = member.sae, run_of(member.cfg)
    forward, price = training_forward(sae, x), price_at(member, run, step)
    loss = weighted_reconstruction_loss(x, forward.x_hat, sae.gamma) + also_loss(
        x, forward, sae.gamma
    )
    loss = loss + penalty(forward.entries, price, len(x))
    if price.pre_act:
        loss = loss + price.pre_act * pre_act_loss(forward.entries, member.dead, len(x))
    sae.zero_grad()
    loss.backward()
    anneal(member, forward.entries, run, step)
    return loss.detach(), gradients(sae, lambda p: p.grad)


def gradients(sae: SAE, grad: Callable[[Tensor], Tensor | None]) -> dict[str, Tensor]:
    found = {name: grad(p) for name, p in sae.named_parameters()}
    known = {name: g for name, g in found.items() if g is not None}
    return {name: tangent(sae, g) if name == "W_dec" else g for name, g in known.items()}


def tangent(sae: SAE, grad: Tensor) -> Tensor:
    """The part of a decoder's gradient across its rows."""
    along = torch.linalg.vecdot(grad, sae.W_dec.detach())
    return (grad - along[:, None] * sae.W_dec.detach()).clone()


def assert_same(
    mine: tuple[Tensor, dict[str, Tensor]], loss: Tensor, grads: dict[str, Tensor]
) -> None:
    torch.testing.assert_close(mine[0], loss.detach(), atol=1e-5, rtol=1e-5)
    assert mine[1].keys() >= grads.keys()
    for name, grad in grads.items():
        off = (mine[1][name] - grad).abs().max() / grad.abs().max().clamp_min(1)
        assert float(off) <= 1e-5, name


JUMP = {"bandwidth": 0.4, "threshold": 0.5}
SAELENS: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "step": ({"l0": 0.3}, {"l0_coefficient": 0.3}),
    "tanh": (
        {"l0": 0.3, "l0_penalty": "tanh"},
        {"l0_coefficient": 0.3, "jumprelu_sparsity_loss_mode": "tanh"},
    ),
    "quadratic": (
        {"l0": 0.3, "l0_penalty": "quadratic", "target_l0": 5},
        {"l0_coefficient": 0.3, "jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 5.0},
    ),
    "pre_act": (
        {"l0": 0.3, "pre_act": 0.1},
        {"l0_coefficient": 0.3, "pre_act_loss_coefficient": 0.1},
    ),
}


@pytest.mark.parametrize("ste", [False, True], ids=["thresholds", "ste_to_input"])
@pytest.mark.parametrize("case", SAELENS)
def test_jumprelu_has_saelens_losses_and_gradients(case: str, ste: bool) -> None:
    from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig

    fields, theirs = SAELENS[case]
    member = member_of("jumprelu", {**JUMP, "ste_to_input": ste}, **fields)
    cfg = JumpReLUTrainingSAEConfig(
        D, M, jumprelu_bandwidth=0.4, jumprelu_ste_to_input=ste, **theirs
    )
    assert_same(ours(member, rows()), *of_saelens(JumpReLUTrainingSAE(cfg), member, {"l0": 0.3}))


def of_saelens(
    other: torch.nn.Module, member: MemberState, coefficients: dict[str, float]
) -> tuple[Tensor, dict[str, Tensor]]:
    from sae_lens.saes.sae import TrainStepInput

    names = {"b_enc": "b_gate"} if member.cfg.activation.kind == "gated" else {}
    tensors = {names.get(k, k): v for k, v in member.sae.tensors().items() if k != "gamma"}
    tensors = {k: v.clone() for k, v in tensors.items() if v.ndim}
    other.load_state_dict(tensors)
    step = TrainStepInput(rows(), coefficients, member.dead, 0, False)
    loss = other.training_forward_pass(step).loss
    loss.backward()
    grads = {
        k: other.get_parameter(names.get(k, k)).grad for k in ("W_enc", "W_dec", "b_enc", "b_dec")
    }
    grads |= {k: other.get_parameter(k).grad for k in member.sae.arch.parameters}
    grads["W_enc_t"] = grads.pop("W_enc").T
    grads["W_dec"] = tangent(member.sae, grads["W_dec"])
    return loss, grads


@pytest.mark.parametrize("kind", ["relu", "gated"])
def test_l1_has_saelens_losses_and_gradients(kind: str) -> None:
    from sae_lens.saes.gated_sae import GatedTrainingSAE, GatedTrainingSAEConfig
    from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig

    made = {
        "relu": lambda: StandardTrainingSAE(StandardTrainingSAEConfig(D, M)),
        "gated": lambda: GatedTrainingSAE(GatedTrainingSAEConfig(D, M)),
    }
    member = member_of(kind, l1=0.2)
    loss, grads = of_saelens(made[kind](), member, {"l1": 0.2})
    if (
        kind == "gated"
    ):  # theirs does not hold the decoder fixed where it reconstructs from the gate
        del grads["W_dec"], grads["b_dec"]
    assert_same(ours(member, rows()), loss, grads)


def set_linear(other: torch.nn.Module, sae: SAE, names: dict[str, str]) -> None:
    with torch.no_grad():
        for mine, theirs in names.items():
            source = sae.get_parameter(mine)
            target = other.get_parameter(theirs)
            target.copy_(source.T if target.shape != source.shape else source)


def of_linear(
    loss: Tensor, other: torch.nn.Module, sae: SAE, names: dict[str, str]
) -> tuple[Tensor, dict[str, Tensor]]:
    loss.backward()
    grads = {}
    for mine, theirs in names.items():
        grad = other.get_parameter(theirs).grad
        grads[mine] = grad.T if grad.shape != sae.get_parameter(mine).shape else grad
    grads["W_dec"] = tangent(sae, grads["W_dec"])
    return loss, grads


STANDARD = {"W_enc_t": "encoder.weight", "W_dec": "decoder.weight"}
RELU = {**STANDARD, "b_enc": "encoder.bias", "b_dec": "bias"}
GATED = {
    **STANDARD,
    "b_enc": "gate_bias",
    "b_dec": "decoder_bias",
    "r_mag": "r_mag",
    "b_mag": "mag_bias",
}
COMMON = {"activation_dim": D, "dict_size": M, "layer": 0, "lm_name": "none"}


def test_gated_has_dictionary_learnings_losses_and_gradients() -> None:
    from dictionary_learning.trainers.gdm import GatedSAETrainer

    member = member_of("gated", l1=0.2)
    other = GatedSAETrainer(
        steps=STEPS,
        l1_penalty=0.2,
        warmup_steps=1,
        sparsity_warmup_steps=None,
        device="cpu",
        **COMMON,
    )
    set_linear(other.ae, member.sae, GATED)
    assert_same(
        ours(member, rows()), *of_linear(other.loss(rows(), 5), other.ae, member.sae, GATED)
    )


def test_p_annealing_has_dictionary_learnings_losses_and_gradients_at_every_step() -> None:
    from dictionary_learning.trainers.p_anneal import PAnnealTrainer

    member = member_of("relu", l1=0.2, p_end=0.3, anneal_from=0.1, penalty_warmup=0.3)
    other = PAnnealTrainer(
        steps=STEPS,
        warmup_steps=1,
        sparsity_warmup_steps=30,
        sparsity_function="Lp^p",
        initial_sparsity_penalty=0.2,
        anneal_start=10,
        p_end=0.3,
        device="cpu",
        **COMMON,
    )
    set_linear(other.ae, member.sae, RELU)
    seen = set()
    for step in range(STEPS):
        x = rows().roll(step, 1) * (1 + 0.02 * step)
        other.ae.zero_grad()
        p, loss = other.p, other.loss(x, step)
        assert_same(ours(member, x, step), *of_linear(loss, other.ae, member.sae, RELU))
        seen.add(round(p, 6))
    assert len(seen) == 9


def test_jumprelu_has_dictionary_learnings_reconstruction_and_its_gradients() -> None:
    """Its penalty is another: (mean L0 / target - 1)^2 of a batch, counted on z, so from below no gradient comes."""
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer

    member = member_of("jumprelu", JUMP)
    sae = member.sae
    with torch.no_grad():
        sae.b_dec.zero_()  # theirs is not taken from the input
    other = JumpReluTrainer(
        steps=STEPS,
        bandwidth=0.4,
        sparsity_penalty=0.0,
        warmup_steps=1,
        sparsity_warmup_steps=None,
        device="cpu",
        **COMMON,
    )
    names = {"W_enc_t": "W_enc", **{n: n for n in ("W_dec", "b_enc", "threshold")}}
    set_linear(other.ae, sae, names)
    assert_same(ours(member, rows()), *of_linear(other.loss(rows(), 5), other.ae, sae, names))


WIDTHS = (6, 18, M)


def test_matryoshka_has_saelens_losses_and_gradients() -> None:
    from sae_lens.saes.matryoshka_batchtopk_sae import (
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
    )
    from sae_lens.saes.sae import TrainStepInput

    member, x = member_of("matryoshka", {"k": 5, "widths": WIDTHS}), rows()
    cfg = MatryoshkaBatchTopKTrainingSAEConfig(
        d_in=D,
        d_sae=M,
        k=5,
        matryoshka_widths=list(WIDTHS),
        rescale_acts_by_decoder_norm=False,
        apply_b_dec_to_input=True,
    )
    theirs = MatryoshkaBatchTopKTrainingSAE(cfg)
    names = ("W_enc", "W_dec", "b_enc", "b_dec")
    tensors = member.sae.tensors()
    with torch.no_grad():
        for name in names:
            getattr(theirs, name).copy_(tensors[name])
    given = TrainStepInput(
        sae_in=x,
        coefficients={},
        dead_neuron_mask=None,
        n_training_steps=0,
        is_logging_step=False,
    )
    loss = theirs.training_forward_pass(given).loss
    loss.backward()
    grads = {name: getattr(theirs, name).grad for name in names}
    assert_same(ours(member, x), loss, in_our_form(member.sae, grads))


def test_matryoshka_has_dictionary_learnings_losses_and_gradients_but_for_its_weights() -> None:
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer

    member, x = member_of("matryoshka", {"k": 5, "widths": WIDTHS}), rows()
    made = MatryoshkaBatchTopKTrainer(
        steps=10_000,
        activation_dim=D,
        dict_size=M,
        k=5,
        layer=0,
        lm_name="none",
        group_fractions=[6 / M, 12 / M, 22 / M],
        device="cpu",
    )
    names = ("W_enc", "W_dec", "b_enc", "b_dec")
    tensors = member.sae.tensors()
    with torch.no_grad():
        for name in names:
            getattr(made.ae, name).copy_(tensors[name])
    loss = 9 * made.loss(x, step=0)  # the mean over 3 levels of a third of each
    loss.backward()
    grads = {name: getattr(made.ae, name).grad for name in names}
    assert_same(ours(member, x), loss, in_our_form(member.sae, grads))


def in_our_form(sae: SAE, grads: dict[str, Tensor]) -> dict[str, Tensor]:
    named = dict(grads)
    named["W_enc_t"] = named.pop("W_enc").T
    named["W_dec"] = tangent(sae, named["W_dec"])
    return named
