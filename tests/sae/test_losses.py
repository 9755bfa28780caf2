"""gamma by hand numbers; losses and revival against dense fp64 references, and where their gradients go."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wsae.core.errors import UserError
from wsae.sae import SAE, SAEConfig, TopK, make_activation
from wsae.sae.config import GammaConfig
from wsae.sae.forward import (
    Price,
    auxk_loss,
    penalty,
    training_forward,
    weighted_reconstruction_loss,
)
from wsae.sae.gamma import (
    describe_gamma,
    gamma_from_proxy,
    latent_variance_proxy,
    robust_proxy,
)

S = torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64)


def rule(**fields: object) -> GammaConfig:
    return GammaConfig.parse({"rule": "variance", **fields})


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"alpha": 1, "normalise": "none"}, [1, 4, 9]),
        ({"alpha": 0.5, "normalise": "none"}, [1, 2, 3]),
        ({"alpha": -0.5, "normalise": "none"}, [1, 1 / 2, 1 / 3]),
        ({"alpha": 2, "normalise": "none"}, [1, 16, 81]),
        ({"alpha": 0.5, "normalise": "max"}, [1 / 3, 2 / 3, 1]),
        ({"alpha": 0.5}, [v / math.sqrt(14 / 3) for v in (1, 2, 3)]),
        ({"alpha": 0}, [1, 1, 1]),
        ({"robust": "rank", "normalise": "none"}, [1 / 3, 2 / 3, 1]),
        ({"robust": "drop", "normalise": "none"}, [1, 4, 9]),
        ({"robust": "drop", "alpha": 0}, [1, 1, 1]),
    ],
)
def test_gamma_by_hand(fields: dict[str, object], expected: list[float]) -> None:
    assert gamma_from_proxy(rule(**fields), S).tolist() == pytest.approx(expected, rel=1e-14)


@settings(max_examples=80, deadline=None)
@given(
    s=st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=40),
    alpha=st.floats(-3, 3),
    robust=st.sampled_from(["none", "winsor", "rank"]),  # drop does not keep the order
)
def test_rms_normalised_gamma_has_mean_square_one_and_keeps_the_order(
    s: list[float], alpha: float, robust: str
) -> None:
    proxy = torch.tensor(s, dtype=torch.float64)
    gamma = gamma_from_proxy(rule(alpha=alpha, robust=robust), proxy)
    assert float(gamma.square().mean()) == pytest.approx(1, rel=1e-9)
    order = proxy.argsort(descending=alpha < 0)
    assert (gamma[order].diff() >= -1e-9 * gamma.max()).all()


def test_robust_proxies_tame_one_huge_dimension() -> None:
    s = torch.ones(200, dtype=torch.float64)
    s[7] = 1e6
    shares = {}
    for robust in ("none", "winsor", "rank"):
        gamma = gamma_from_proxy(rule(robust=robust, quantile=0.99), s)
        shares[robust] = float(gamma[7] ** 2 / gamma.square().sum())
    assert shares["none"] > 0.999
    assert shares["winsor"] < 0.02
    assert shares["rank"] < 0.03
    tied = robust_proxy(torch.tensor([3.0, 1.0, 3.0], dtype=torch.float64), "rank", 0.99)
    assert tied.tolist() == pytest.approx([2.5 / 3, 1 / 3, 2.5 / 3])


@pytest.mark.parametrize("alpha", [-0.5, 0.0, 1.0])
def test_outlier_dimensions_left_out_weigh_nothing_and_the_others_keep_their_power(
    alpha: float,
) -> None:
    s = torch.tensor([1.0, 2.0, 3.0, 4.0, 200.001, 5.0, 200.0], dtype=torch.float64)  # median 4
    gamma = gamma_from_proxy(rule(alpha=alpha, robust="drop"), s)
    kept = [0, 1, 2, 3, 5, 6]
    assert float(gamma[4]) == 0
    assert (gamma[kept] / s[kept].pow(alpha)).tolist() == pytest.approx([float(gamma[0])] * 6)
    assert float(gamma.square().mean()) == pytest.approx(1)  # over all dimensions
    record = describe_gamma(rule(alpha=alpha, robust="drop"), gamma)
    assert record["zero_weights"] == 1
    assert record["robust"] == "drop"


@pytest.mark.parametrize("name", ["none", "gap", "whiten"])
def test_leaving_out_needs_a_proxy_that_is_large_on_outlier_dimensions(name: str) -> None:
    with pytest.raises(UserError, match=f"rule '{name}'"):
        GammaConfig.parse({"rule": name, "robust": "drop"})


def test_latent_variance_reaches_input_dimensions_through_squared_decoder_weights() -> None:
    W = torch.tensor([[3.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
    assert latent_variance_proxy(torch.tensor([2.0, 5.0], dtype=torch.float64), W).tolist() == [
        23,
        20,
    ]
    z = torch.randn(200_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z *= torch.tensor([2.0, 5.0]).sqrt()  # uncorrelated latents: it is the variance of x_hat
    torch.testing.assert_close(
        (z @ W).var(0), torch.tensor([23.0, 20.0], dtype=torch.float64), rtol=0.02, atol=0
    )


@pytest.mark.parametrize(
    ("proxy", "fields", "says"),
    [
        ([0.0, 0.0], {}, "every dimension's proxy is 0"),
        ([1.0, 0.0], {"alpha": -1}, "1 dimensions have proxy 0 .first: 1."),
        ([1.0, -2.0], {}, "proxy of dimension 1 is -2"),
        ([1.0, float("nan")], {}, "proxy of dimension 1 is nan"),
    ],
)
def test_degenerate_proxies_are_refused(
    proxy: list[float], fields: dict[str, object], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        gamma_from_proxy(rule(**fields), torch.tensor(proxy))


def test_the_record_says_who_weighs_most_and_what_the_mask_did() -> None:
    gamma, unmasked = torch.tensor([1.0, 3.0, 1.0]), torch.tensor([1.0, 1.0, 1.0])
    record = describe_gamma(rule(), gamma, unmasked, heaviest=1)
    assert record["heaviest"] == [[1, 3.0, pytest.approx(9 / 11)]]
    assert record["without_mask"]["weight_moved"] == pytest.approx(9 / 11 - 1 / 3)
    assert record["without_mask"]["largest_change_dimension"] == 1
    assert record["without_mask"]["largest_change_factor"] == pytest.approx(3)
    assert record["effective_dimensions"] == pytest.approx(121 / 83)


def sae_and_batch(kind: str = "topk", tied: bool = False) -> tuple[SAE, Tensor]:
    cfg = SAEConfig(d_in=6, d_sae=20, activation=make_activation(kind, 3), tied=tied)
    sae = SAE(cfg, seed=1).double()
    g = torch.Generator().manual_seed(5)
    sae.gamma.copy_(torch.rand(6, generator=g) + 0.5)
    return sae, torch.randn(16, 6, generator=g, dtype=torch.float64)


def test_weighted_loss_is_equation_12_and_equation_4_for_unit_weights() -> None:
    sae, x = sae_and_batch()
    x_hat, gamma = sae(x).detach(), sae.gamma
    by_hand = sum(
        float(gamma[i] ** 2 * (x[b, i] - x_hat[b, i]) ** 2) for b in range(16) for i in range(6)
    )
    assert float(weighted_reconstruction_loss(x, x_hat, gamma)) == pytest.approx(by_hand / 16)
    ones = torch.ones(6, dtype=torch.float64)
    assert float(weighted_reconstruction_loss(x, x_hat, ones)) == pytest.approx(
        float(((x - x_hat) ** 2).sum(1).mean())
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["topk", "group_topk", "batch_topk", "relu"])
def test_gradients_of_the_whole_loss_equal_a_dense_reference(kind: str, tied: bool) -> None:
    if kind == "group_topk":
        sae = SAE(
            SAEConfig(d_in=6, d_sae=21, activation=make_activation("group_topk", 3), tied=tied),
            seed=1,
        ).double()
        x = sae_and_batch()[1]
    else:
        sae, x = sae_and_batch(kind, tied)
    forward = training_forward(sae, x)
    loss = weighted_reconstruction_loss(x, forward.x_hat, sae.gamma) + penalty(
        forward.entries, Price(l1=0.1), len(x)
    )
    loss.backward()
    grads = {n: p.grad.clone() for n, p in sae.named_parameters() if p.grad is not None}
    sae.zero_grad()
    mask = (forward.code.dense(sae.cfg.d_sae) > 0).double()
    b_dec = 0 if sae.b_dec is None else sae.b_dec
    b_enc = 0 if sae.b_enc is None else sae.b_enc
    z = ((x - b_dec) @ sae.W_enc + b_enc) * mask
    norms = sae.W_dec.norm(dim=1) if tied else torch.ones(sae.cfg.d_sae, dtype=torch.float64)
    reference = ((x - z @ sae.W_dec - b_dec) * sae.gamma).square().sum(1).mean() + 0.1 * (
        z * norms
    ).sum(1).mean()
    reference.backward()
    assert loss.item() == pytest.approx(reference.item(), rel=1e-12)
    for name, p in sae.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("tied", [False, True])
def test_revival_is_weighted_and_its_gradient_reaches_only_the_dead(tied: bool) -> None:
    sae, x = sae_and_batch(tied=tied)
    forward = training_forward(sae, x)
    dead = torch.zeros(20, dtype=torch.bool)
    dead[[2, 11, 17]] = True
    residual = (x - forward.x_hat).detach()
    loss = auxk_loss(sae, residual, forward, dead, k_aux=2)
    pre = sae.pre(sae.centre(x)).detach()
    by_hand = 0.0
    for b in range(16):
        alive = sorted([2, 11, 17], key=lambda j: -float(pre[b, j]))[:2]
        e_hat = sum(max(float(pre[b, j]), 0) * sae.W_dec[j].detach() for j in alive)
        by_hand += float(((residual[b] - e_hat) * sae.gamma).square().sum())
    assert loss.item() == pytest.approx(by_hand / 16, rel=1e-10)
    loss.backward()
    touched = sae.encoder_rows.grad.abs().sum(1) > 0
    assert touched[dead].all()  # revival that leaves the encoder alone revives nothing
    assert not touched[~dead].any()
    doubled = sae.gamma.clone() * 2
    sae.gamma.copy_(doubled)
    assert auxk_loss(sae, residual, forward, dead, 2).item() == pytest.approx(
        4 * by_hand / 16, rel=1e-10
    )


def test_revival_alone_teaches_dead_latents_the_residual() -> None:
    sae, x = sae_and_batch()
    dead = torch.zeros(20, dtype=torch.bool)
    dead[:8] = True
    before, start = None, sae.encoder_rows.detach().clone()
    optimizer = torch.optim.Adam(sae.parameters(), lr=0.02)
    residual = (x - training_forward(sae, x).x_hat).detach()
    for _ in range(60):
        optimizer.zero_grad()
        loss = auxk_loss(sae, residual, training_forward(sae, x), dead, k_aux=8)
        before = float(loss.detach()) if before is None else before
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.5 * before
    moved = (sae.encoder_rows.detach() - start).abs().sum(1)
    assert (moved[:8] > 0.1).all()
    assert (moved[8:] == 0).all()


def test_no_dead_latent_means_no_revival() -> None:
    sae, x = sae_and_batch()
    forward = training_forward(sae, x)
    none = torch.zeros(20, dtype=torch.bool)
    assert auxk_loss(sae, x, forward, none, 4).item() == 0.0


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), alpha=st.floats(-1, 2))
def test_weighting_equals_the_plain_loss_in_rescaled_coordinates(seed: int, alpha: float) -> None:
    """||Gamma (x - x_hat)||^2 of (x, decoder) is ||u - u_hat||^2 of (Gamma x, decoder Gamma)."""
    sae, x = sae_and_batch()
    g = torch.Generator().manual_seed(seed)
    gamma = gamma_from_proxy(
        rule(alpha=alpha), torch.rand(6, generator=g, dtype=torch.float64) + 0.01
    )
    code = sae.encode(x)
    u_hat = code @ (sae.W_dec * gamma) + sae.b_dec * gamma
    ours = weighted_reconstruction_loss(x, sae(x), gamma)
    plain = weighted_reconstruction_loss(x * gamma, u_hat, torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("rule", ["sgd", "adam", "signum"])
def test_gamma_scales_the_decoders_step_under_sgd_alone(rule):
    """The decoder's gradient in dimension i carries gamma_i^2, a learning rate that a step by coordinate drops."""
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    gamma = torch.logspace(-1, 1, 8)
    steps = {}
    for name, weights in (("plain", torch.ones(8)), ("weighted", gamma)):
        sae = SAE(SAEConfig(d_in=8, d_sae=16, activation=TopK(k=4)), seed=0)
        sae.requires_grad_(True)
        before = {key: value.detach().clone() for key, value in sae.named_parameters()}
        weighted_reconstruction_loss(x, training_forward(sae, x).x_hat, weights).backward()
        if rule == "signum":
            for value in sae.parameters():
                value.data -= 1e-3 * value.grad.sign()
        else:
            optimiser = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[rule]
            optimiser(sae.parameters(), lr=1e-3).step()
        steps[name] = {key: value.detach() - before[key] for key, value in sae.named_parameters()}
    plain, weighted = steps["plain"], steps["weighted"]
    expected = plain["W_dec"] * (gamma**2 if rule == "sgd" else 1)
    torch.testing.assert_close(weighted["W_dec"], expected, rtol=2e-3, atol=1e-6)
    assert not torch.allclose(weighted["W_enc_t"], plain["W_enc_t"], rtol=0.1, atol=1e-5)
