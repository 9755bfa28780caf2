"""The rules gap and whiten: closed forms against direct minimisation of the Frobenius norm, and their symmetries."""

import math

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wsae.core.errors import UserError
from wsae.sae import SAE, SAEConfig, make_activation
from wsae.sae.config import GammaConfig
from wsae.sae.forward import (
    auxk_loss,
    dimension_weights,
    effective_dimensions,
    training_forward,
    weigh,
    weighted_reconstruction_loss,
)
from wsae.sae.gamma import (
    describe_gamma,
    gamma_from_covariance,
    gamma_from_proxy,
    gap_norm,
    gap_weights,
    normalise_gamma,
    normalise_matrix,
    whitening,
)

CORRELATED = torch.tensor([[1.0, 0.9, 0.9], [0.9, 1.0, 0.7], [0.9, 0.7, 1.0]], dtype=torch.float64)
"""Without the constraint its first weight would be negative."""


def random_W_p(seed: int, d_in: int = 5, n: int = 9, shared: float = 0.0) -> Tensor:
    """Random directions of unequal length in unequal dimensions; `shared` correlates the dimensions."""
    g = torch.Generator().manual_seed(seed)
    W_p = torch.randn(d_in, n, generator=g, dtype=torch.float64)
    W_p += shared * torch.randn(n, generator=g, dtype=torch.float64)
    return W_p * torch.logspace(-0.7, 0.7, d_in, dtype=torch.float64)[:, None]


def rotation(seed: int, d_in: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d_in, d_in, generator=g, dtype=torch.float64)).Q


def smallest_norm(W_p: Tensor, gamma_squared_of, start: np.ndarray, bounds=None) -> tuple[float, Tensor]:  # fmt: skip
    """Minimise ||W_p^T M W_p - I||_F^2 over the parameters of M by L-BFGS."""

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        p = torch.from_numpy(flat).requires_grad_(True)
        gap = W_p.T @ gamma_squared_of(p) @ W_p - torch.eye(W_p.shape[1], dtype=torch.float64)
        value = gap.square().sum()
        value.backward()
        assert p.grad is not None
        return float(value.detach()), p.grad.numpy()

    found = scipy.optimize.minimize(
        objective, start, jac=True, method="L-BFGS-B", bounds=bounds,
        options={"maxiter": 5000, "maxfun": 10_000, "ftol": 1e-15, "gtol": 1e-9},
    )  # fmt: skip
    return math.sqrt(found.fun), gamma_squared_of(torch.from_numpy(found.x)).detach()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(3, 12), shared=st.sampled_from([0.0, 1.0, 3.0]))
def test_gap_weights_are_the_best_diagonal_found_by_direct_minimisation(
    seed: int, n: int, shared: float
) -> None:
    W_p = random_W_p(seed, 5, n, shared)
    g = gap_weights(W_p @ W_p.T)
    assert (g >= 0).all()
    scale = W_p.square().sum(1)  # the search runs in units in which every dimension counts alike
    best, diagonal = smallest_norm(
        W_p, lambda u: torch.diag(u / scale), np.ones(5), [(0, None)] * 5
    )
    ours = float(gap_norm(W_p, g.sqrt()))
    assert ours <= best * (1 + 1e-7)  # the search can stop short of the minimum, never below it
    if best <= ours * (1 + 1e-7):
        torch.testing.assert_close(g * scale, diagonal.diagonal() * scale, rtol=1e-3, atol=1e-3)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), shared=st.sampled_from([0.0, 2.0, 5.0]))
def test_gap_weights_satisfy_the_optimality_conditions(seed: int, shared: float) -> None:
    """Slope 2 ((C*C) g - diag C): zero where g_i > 0, not negative where the constraint holds g_i at 0."""
    C = random_W_p(seed, 8, 20, shared)
    C = C @ C.T
    g = gap_weights(C)
    slope = (C * C @ g - C.diagonal()) / C.diagonal()
    assert slope[g > 0].abs().max() < 1e-9
    assert (slope[g == 0] > -1e-9).all()


def test_a_dimension_that_others_repeat_gets_no_weight() -> None:
    free = torch.linalg.solve(CORRELATED.square(), torch.ones(3, dtype=torch.float64))
    assert free[0] < 0, "the example must need the constraint"
    g = gap_weights(CORRELATED)
    assert g[0] == 0
    assert g[1:].tolist() == pytest.approx([1 / (1 + 0.49)] * 2)  # (R*R) u = 1 of the other two
    record = describe_gamma(GammaConfig(rule="gap"), g.sqrt())
    assert record["zero_weights"] == 1


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(2, 9))
def test_whitening_is_the_best_matrix_found_by_direct_minimisation(seed: int, n: int) -> None:
    W_p = random_W_p(seed, 4, n)
    gamma = whitening(W_p @ W_p.T, ridge=0.0)
    start = (rotation(seed, 4) + 2 * torch.eye(4, dtype=torch.float64)).flatten().numpy()
    best, _ = smallest_norm(W_p, lambda b: b.reshape(4, 4).T @ b.reshape(4, 4), start)
    found = float(gap_norm(W_p, gamma))
    assert found == pytest.approx(math.sqrt(n - min(n, 4)), abs=1e-6)
    assert found <= best + 1e-6
    assert best == pytest.approx(found, abs=1e-3)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(6, 15))
def test_more_freedom_never_widens_the_gap(seed: int, n: int) -> None:
    W_p = random_W_p(seed, 5, n)
    C = W_p @ W_p.T
    norms = [
        float(gap_norm(W_p, whitening(C, ridge=0.0))),
        float(gap_norm(W_p, gap_weights(C).sqrt())),
        float(gap_norm(W_p)),
    ]
    assert norms == sorted(norms)


@settings(max_examples=30, deadline=None)
@given(variance=st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=8))
def test_without_correlations_gap_is_the_variance_rule_with_alpha_minus_one_half(
    variance: list[float],
) -> None:
    s = torch.tensor(variance, dtype=torch.float64)
    for cfg in ({}, {"alpha": 0.5}, {"normalise": "max"}, {"normalise": "none"}, {"alpha": -1}):
        gap = GammaConfig.parse({"rule": "gap", **cfg})
        power = GammaConfig.parse({"rule": "variance", **cfg, "alpha": -gap.alpha / 2})
        torch.testing.assert_close(gamma_from_covariance(gap, s.diag()), gamma_from_proxy(power, s))
        matrix = GammaConfig.parse({"rule": "whiten", "ridge": 0.0, **cfg})
        torch.testing.assert_close(
            gamma_from_covariance(matrix, s.diag()), gamma_from_proxy(power, s).diag()
        )


def test_the_units_of_the_activations_change_nothing_after_normalisation() -> None:
    W_p = random_W_p(3)
    C = W_p @ W_p.T
    torch.testing.assert_close(gap_weights(400 * C), gap_weights(C) / 400)
    for rule in ("gap", "whiten"):
        cfg = GammaConfig.parse({"rule": rule})
        torch.testing.assert_close(
            gamma_from_covariance(cfg, 400 * C), gamma_from_covariance(cfg, C)
        )


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), ridge=st.sampled_from([0.0, 0.01, 1.0]), alpha=st.floats(-1, 2))
def test_the_whitened_loss_does_not_see_the_basis_and_the_diagonal_rules_do(
    seed: int, ridge: float, alpha: float
) -> None:
    W_p, Q = random_W_p(seed), rotation(seed + 1, 5)
    C = W_p @ W_p.T
    e = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    ours = weigh(e, whitening(C, ridge, alpha)).square().sum(1)
    turned = weigh(e @ Q.T, whitening(Q @ C @ Q.T, ridge, alpha)).square().sum(1)
    torch.testing.assert_close(ours, turned, rtol=1e-7, atol=1e-10)
    diagonal = weigh(e, gap_weights(C).sqrt()).square().sum(1)
    other = weigh(e @ Q.T, gap_weights(Q @ C @ Q.T).sqrt()).square().sum(1)
    assert not torch.allclose(diagonal, other, rtol=1e-3)


def test_whitened_data_have_the_identity_as_covariance_and_the_ridge_caps_weak_directions() -> None:
    W_p = random_W_p(0)
    C = W_p @ W_p.T
    gamma = whitening(C, ridge=0.0)
    torch.testing.assert_close(gamma @ C @ gamma.T, torch.eye(5, dtype=torch.float64))
    half = whitening(C, ridge=0.0, alpha=0.5)
    torch.testing.assert_close(half @ half, gamma)
    values, vectors = torch.linalg.eigh(C)
    ridged = whitening(C, ridge=0.1)
    mean = values.mean()
    for value, vector in zip(values, vectors.T, strict=True):
        assert float((ridged @ vector).square().sum()) == pytest.approx(
            1 / float(value + 0.1 * mean), rel=1e-9
        )


def test_without_a_ridge_directions_that_never_vary_weigh_nothing() -> None:
    W_p = random_W_p(1, d_in=5, n=3)  # rank 3 in 5 dimensions
    C = W_p @ W_p.T
    gamma = whitening(C, ridge=0.0)
    torch.testing.assert_close(gamma.T @ gamma, torch.linalg.pinv(C, hermitian=True, rtol=1e-10))
    assert float(gap_norm(W_p, gamma)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("normalise", ["rms", "max", "none"])
def test_a_matrix_is_scaled_as_its_diagonal_would_be(normalise) -> None:
    g = torch.tensor([0.5, 3.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(normalise_matrix(g.diag(), normalise), normalise_gamma(g, normalise).diag())  # fmt: skip
    C = random_W_p(2)
    C = C @ C.T
    cfg = GammaConfig.parse({"rule": "whiten"})
    gamma = gamma_from_covariance(cfg, C)
    assert float(gamma.square().sum()) == pytest.approx(5)
    assert float(dimension_weights(gamma).square().mean()) == pytest.approx(1)


def test_alpha_zero_is_the_plain_loss_and_asks_for_no_covariance() -> None:
    for rule in ("gap", "whiten"):
        cfg = GammaConfig.parse({"rule": rule, "alpha": 0})
        assert not cfg.needs_covariance
        gamma = gamma_from_covariance(cfg, torch.zeros(3, 3, dtype=torch.float64))
        assert gamma.tolist() == [1, 1, 1]


def bad(values: list[list[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("covariance", "cfg", "says"),
    [
        (bad([[1, 0], [0, 0]]), {"rule": "gap"}, r"gamma rule gap: dimension 1 has variance 0 \(1"),
        (
            bad([[1, 0], [0, 0]]),
            {"rule": "whiten"},
            "gamma rule whiten: dimension 1 has variance 0",
        ),
        (bad([[1, 2, 3]]), {"rule": "gap"}, r"shape \(1, 3\)"),
        (bad([[1, math.nan], [math.nan, 1]]), {"rule": "whiten"}, "NaN"),
        (bad([[1, 0.5], [0, 1]]), {"rule": "gap"}, "not symmetric"),
        (CORRELATED, {"rule": "gap", "alpha": -1}, "1 dimensions have proxy 0 .first: 0."),
    ],
)
def test_what_is_no_covariance_is_refused(
    covariance: Tensor, cfg: dict[str, object], says: str
) -> None:
    with pytest.raises(UserError, match=says) as caught:
        gamma_from_covariance(GammaConfig.parse(cfg), covariance)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("cfg", "says"),
    [
        ({"rule": "variance", "ridge": 0.1}, "a ridge belongs to the rule 'whiten'"),
        ({"rule": "whiten", "robust": "rank"}, "no proxy to make robust"),
        ({"rule": "whiten", "ridge": -1}, "ridge"),
        ({"rule": "whitening"}, "rule"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(cfg: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        GammaConfig.parse(cfg)


def test_labels_tell_rules_apart() -> None:
    names = [
        GammaConfig.parse(cfg).label
        for cfg in ({"rule": "gap"}, {"rule": "whiten"}, {"rule": "whiten", "ridge": 0.1})
    ]
    assert names == ["gap-a1", "whiten-a1", "whiten-a1-ridge0.1"]


def test_the_record_of_a_matrix_counts_directions_not_dimensions() -> None:
    gamma = rotation(0, 3) @ torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))
    assert effective_dimensions(gamma) == pytest.approx(2)
    assert effective_dimensions(torch.tensor([1.0, 1.0, 0.0])) == pytest.approx(2)
    record = describe_gamma(GammaConfig.parse({"rule": "whiten"}), gamma @ rotation(1, 3))
    assert record["ridge"] == 0.01
    assert record["effective_dimensions"] == pytest.approx(2)


def sae_and_batch(gamma: Tensor) -> tuple[SAE, Tensor]:
    cfg = SAEConfig(d_in=6, d_sae=20, activation=make_activation("topk", 3))
    sae = SAE(cfg, seed=1).double()
    sae.set_gamma(gamma)
    g = torch.Generator().manual_seed(5)
    return sae, torch.randn(16, 6, generator=g, dtype=torch.float64)


def test_a_diagonal_matrix_weighs_as_its_vector_and_any_matrix_as_rescaled_coordinates() -> None:
    g = torch.linspace(0.5, 2, 6, dtype=torch.float64)
    sae, x = sae_and_batch(g)
    x_hat = sae(x)
    torch.testing.assert_close(
        weighted_reconstruction_loss(x, x_hat, g), weighted_reconstruction_loss(x, x_hat, g.diag())
    )
    gamma = random_W_p(4, 6, 6)
    plain = weighted_reconstruction_loss(x @ gamma.T, x_hat @ gamma.T, torch.ones_like(g))
    torch.testing.assert_close(weighted_reconstruction_loss(x, x_hat, gamma), plain)


def test_revival_is_weighted_by_the_matrix_too() -> None:
    gamma = random_W_p(4, 6, 6)
    sae, x = sae_and_batch(gamma)
    dead = torch.zeros(20, dtype=torch.bool)
    dead[[2, 11, 17]] = True
    forward = training_forward(sae, x)
    residual = (x - forward.x_hat).detach()
    loss = auxk_loss(sae, residual, forward, dead, k_aux=3)
    code = sae.pre(sae.centre(x)).relu() * dead
    error = residual - code @ sae.W_dec
    by_hand = sum(float((gamma @ e).square().sum()) for e in error.detach()) / 16
    assert float(loss.detach()) == pytest.approx(by_hand, rel=1e-10)


def test_an_sae_keeps_its_matrix_through_saving_scaling_and_loading(tmp_path) -> None:
    gamma = random_W_p(4, 6, 6)
    sae = SAE(SAEConfig(d_in=6, d_sae=20, activation=make_activation("topk", 3)))
    sae.set_gamma(gamma)
    sae.scaled(4.0).save(tmp_path / "sae")
    assert torch.equal(SAE.load(tmp_path / "sae").gamma, gamma.float())
    with pytest.raises(
        UserError, match=r"gamma of shape \(6, 5\): this SAE takes \[6\] or \[6, 6\]"
    ):
        sae.set_gamma(gamma[:, :5])
    with pytest.raises(UserError, match=r"tensor gamma is \(5,\)"):
        sae.set_tensors({**sae.tensors(), "gamma": torch.ones(5)})
    sae.set_gamma(torch.ones(6))
    assert sae.gamma.shape == (6,)
