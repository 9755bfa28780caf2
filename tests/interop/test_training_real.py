"""Losses and gradients of one training step as SAELens' and dictionary_learning's own trainers have them.

pip install 'wsae[interop]'   (in an environment of its own: they pin older libraries), then pytest this file
"""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from wsae.sae import SAE, Gated, Matryoshka, SAEConfig
from wsae.sae.forward import training_forward
from wsae.sae.loss import also_loss, penalty, weighted_reconstruction_loss

MISSING = [n for n in ("sae_lens", "dictionary_learning") if importlib.util.find_spec(n) is None]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason="needs sae_lens, sparsify, dictionary_learning"),
    pytest.mark.filterwarnings("default"),
]
D, M, K = 6, 24, 4
WIDTHS = (4, 10, M)
G = torch.Generator().manual_seed(0)
X = torch.randn(40, D, generator=G) * 2 + 1


def ours(activation: object) -> SAE:
    sae = SAE(SAEConfig(d_in=D, d_sae=M, activation=activation))
    with torch.no_grad():
        for p in sae.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(p))))
    return sae


def loss_of(sae: SAE, l1: float = 0.0) -> Tensor:
    forward = training_forward(sae, X)
    fit = weighted_reconstruction_loss(X, forward.x_hat, sae.gamma) + also_loss(
        X, forward, sae.gamma
    )
    return fit + penalty(forward.entries, l1, 0.0, len(X))


def gradients(sae: SAE, loss: Tensor) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(sae.parameters()))
    named = dict(zip((name for name, _ in sae.named_parameters()), found, strict=True))
    return {**named, "W_enc": named.pop("W_enc_t").T}


def of_saelens(config: object, sae: SAE, names: dict[str, str]) -> tuple[Tensor, dict[str, Tensor]]:
    """Their loss and gradients at our weights; `names` are ours by theirs."""
    from sae_lens.saes.sae import TrainingSAE, TrainStepInput

    made = TrainingSAE.from_dict(config.to_dict())
    tensors = sae.tensors()
    with torch.no_grad():
        for theirs, our in names.items():
            getattr(made, theirs).copy_(tensors[our])
    loss = made.training_forward_pass(
        TrainStepInput(
            sae_in=X,
            coefficients={"l1": 0.3},
            dead_neuron_mask=None,
            n_training_steps=0,
            is_logging_step=False,
        )
    ).loss
    loss.backward()
    return loss, {our: getattr(made, theirs).grad for theirs, our in names.items()}


BASIC = {name: name for name in ("W_enc", "W_dec", "b_enc", "b_dec")}


def test_matryoshka_is_that_of_saelens():
    from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAEConfig

    sae = ours(Matryoshka(k=K, widths=WIDTHS))
    cfg = MatryoshkaBatchTopKTrainingSAEConfig(
        d_in=D,
        d_sae=M,
        k=K,
        matryoshka_widths=list(WIDTHS),
        rescale_acts_by_decoder_norm=False,
        apply_b_dec_to_input=True,
    )
    wanted, theirs = of_saelens(cfg, sae, BASIC)
    loss = loss_of(sae)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)
    found = gradients(sae, loss)
    for name, grad in theirs.items():
        torch.testing.assert_close(
            found[name], grad, rtol=1e-5, atol=1e-4 * float(grad.abs().max())
        )


def test_matryoshka_is_dictionary_learnings_but_for_its_weights():
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer

    sae = ours(Matryoshka(k=K, widths=WIDTHS))
    made = MatryoshkaBatchTopKTrainer(
        steps=10_000,
        activation_dim=D,
        dict_size=M,
        k=K,
        layer=0,
        lm_name="none",
        group_fractions=[4 / M, 6 / M, 14 / M],
        device="cpu",
    )
    with torch.no_grad():
        for name, tensor in sae.tensors().items():
            if name in BASIC:
                getattr(made.ae, name).copy_(tensor)
    theirs = made.loss(X, step=0)
    theirs.backward()
    loss = loss_of(sae) / 9  # they take the mean over 3 levels of a third of each
    torch.testing.assert_close(loss, theirs, rtol=1e-5, atol=0)
    found = gradients(sae, loss)
    for name in BASIC:
        grad = getattr(made.ae, name).grad
        torch.testing.assert_close(
            found[name], grad, rtol=1e-5, atol=1e-5 * float(grad.abs().max())
        )


def test_gated_is_dictionary_learnings():
    from dictionary_learning.trainers.gdm import GatedSAETrainer

    sae = ours(Gated())
    made = GatedSAETrainer(
        steps=10_000,
        activation_dim=D,
        dict_size=M,
        layer=0,
        lm_name="none",
        l1_penalty=0.3,
        sparsity_warmup_steps=None,
        device="cpu",
    )
    ae, t = made.ae, sae.tensors()
    at = SimpleNamespace(
        W_enc=ae.encoder.weight, W_dec=ae.decoder.weight, b_enc=ae.gate_bias, b_dec=ae.decoder_bias
    )
    with torch.no_grad():
        at.W_enc.copy_(t["W_enc"].T)
        at.W_dec.copy_(t["W_dec"].T)
        for theirs, name in ((at.b_enc, "b_enc"), (at.b_dec, "b_dec")):
            theirs.copy_(t[name])
        ae.r_mag.copy_(t["r_mag"])
        ae.mag_bias.copy_(t["b_mag"])
    theirs = made.loss(X, step=0)
    theirs.backward()
    loss = loss_of(sae, l1=0.3)
    torch.testing.assert_close(loss, theirs, rtol=1e-5, atol=0)
    found = gradients(sae, loss)
    wanted = {
        "W_enc": at.W_enc.grad.T,
        "W_dec": at.W_dec.grad.T,
        "b_enc": at.b_enc.grad,
        "b_dec": at.b_dec.grad,
        "r_mag": ae.r_mag.grad,
        "b_mag": ae.mag_bias.grad,
    }
    for name, grad in wanted.items():
        torch.testing.assert_close(
            found[name], grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max())
        )


def test_gated_is_that_of_saelens_whose_gate_moves_the_decoder_too():
    from sae_lens.saes.gated_sae import GatedTrainingSAEConfig

    sae = ours(Gated())
    sae.W_dec.data /= sae.W_dec.data.norm(dim=1, keepdim=True)  # they weigh the penalty by it
    names = {"W_enc": "W_enc", "W_dec": "W_dec", "b_gate": "b_enc", "b_dec": "b_dec"}
    names |= {"r_mag": "r_mag", "b_mag": "b_mag"}
    cfg = GatedTrainingSAEConfig(d_in=D, d_sae=M, apply_b_dec_to_input=True, l1_coefficient=0.3)
    wanted, theirs = of_saelens(cfg, sae, names)
    loss = loss_of(sae, l1=0.3)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)
    found = gradients(sae, loss)
    for name in ("W_enc", "b_enc", "r_mag", "b_mag"):
        scale = float(theirs[name].abs().max())
        torch.testing.assert_close(found[name], theirs[name], rtol=1e-4, atol=1e-5 * scale)
    assert not torch.allclose(found["W_dec"], theirs["W_dec"], rtol=0.1)
