"""Appendix A.1: the steps behind Theorem 1 (Eq. 15, 18, 19)."""

import math

import torch
from torch import Tensor

from wsae.core.seeds import seed_for
from wsae.theory.claims.record import Claim
from wsae.theory.geometry import orthogonal, polygon, random_unit, simplex
from wsae.theory.losses import closed_form, grid, sae_loss, sae_residual, superpose


def reordering(seed: int) -> Claim:
    """Eq. 15: reordering the rows of W_m, or padding it with zero rows, leaves L_SAE unchanged."""
    worst = 0.0
    for i in range(24):
        made = torch.Generator().manual_seed(seed_for(seed, "order", i))
        d, n, spare = 2 + i % 3, 4 + i % 3, i % 4
        W_p = random_unit(d, n, seed_for(seed, "W_p", i))
        features, probability = grid(n, 0.5, 1)
        W_m = torch.randn(n, d, generator=made, dtype=torch.float64)
        padded = torch.cat([W_m, W_m.new_zeros(spare, d)])
        padded = padded[torch.randperm(n + spare, generator=made)]
        own, other = (float(sae_loss(W, W_p, features, probability)) for W in (W_m, padded))
        worst = max(worst, abs(own - other) / own)
    return Claim(
        claim="If W_m minimises L_SAE, so does W_m with its rows reordered and zero rows added.",
        source="Eq. 15",
        verdict="holds",
        condition="",
        evidence=f"Relative change of the loss at most {worst:.0e} over 24 random W_p, W_m, orders and paddings.",
        instances=24,
        numbers={"worst_relative_change": worst},
    )


def zero_mean_residual(seed: int) -> Claim:  # noqa: ARG001  (nothing random)
    """Eq. 18: the gradient of L_SAE is zero if and only if the mean residual E[x_p - W_m^T sigma(W_m x_p)] is zero."""
    means, slopes = {}, {}
    for name, W_p in (("triangle", polygon(3)), ("tetrahedron", simplex(4))):
        means[name], slopes[name] = _mean_and_gradient(closed_form(W_p), W_p)
    eye = orthogonal(2)
    flat_mean, flat_slope = _mean_and_gradient(torch.zeros_like(eye), eye)
    return Claim(
        claim="The gradient of L_SAE vanishes if and only if the mean residual E[x_p - x_p_hat] does.",
        source="Eq. 18",
        verdict="counterexample",
        condition="The residual is 0 for every x (digons, monosemantic dimensions); a zero mean is not enough, because "
        "the gradient is a correlation of the residual with the code and with x_p.",
        evidence=f"Triangle at W_p^T, S = 0.5: mean residual {means['triangle']:.0e}, gradient norm "
        f"{slopes['triangle']:.3f} (tetrahedron {slopes['tetrahedron']:.3f}). Conversely W_m = 0 for W_p = I_2 has "
        f"gradient {flat_slope:.0f} and mean residual {flat_mean:.2f}.",
        instances=3,
        numbers={
            "triangle_mean_residual": means["triangle"],
            "triangle_gradient": slopes["triangle"],
            "tetrahedron_mean_residual": means["tetrahedron"],
            "tetrahedron_gradient": slopes["tetrahedron"],
            "zero_W_m_gradient": flat_slope,
            "zero_W_m_mean_residual": flat_mean,
        },
    )


def _mean_and_gradient(W_m: Tensor, W_p: Tensor) -> tuple[float, float]:
    """Return the norms of the mean residual and of the loss's gradient, S = 0.5, uniform magnitudes on four levels."""
    features, probability = grid(W_p.shape[1], 0.5, 4)
    mean = probability @ sae_residual(W_m, superpose(W_p, features))
    at = W_m.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(sae_loss(at, W_p, features, probability), at)
    return float(mean.norm()), float(slope.norm())


def polygon_gram(seed: int) -> Claim:  # noqa: ARG001  (nothing random)
    """Eq. 19: the Gram matrix of a digon or polygon of p features is 1 on and -1/(p-1) off the diagonal."""
    away = {p: _away_from_eq_19(polygon(p)) for p in range(3, 9)}
    away[2] = _away_from_eq_19(simplex(2))
    simplices = max(_away_from_eq_19(simplex(p)) for p in range(2, 9))
    positive = math.cos(2 * math.pi / 5)
    return Claim(
        claim="The columns of a digon or polygon of p features have W_p,i . W_p,j = -1/(p-1) for i != j.",
        source="Eq. 19",
        verdict="holds if",
        condition="p = 2 or 3. For p >= 4 this Gram matrix is the simplex in p - 1 dimensions; a planar polygon has "
        "cos(2 pi (i-j) / p) and, for p >= 5, positive interference.",
        evidence=f"Largest deviation from Eq. 19: p = 2 {away[2]:.0e}, 3 {away[3]:.0e}, 4 {away[4]:.2f}, 5 "
        f"{away[5]:.2f}, 6 {away[6]:.2f}; simplices {simplices:.0e}. Neighbours in a pentagon interfere at "
        f"+{positive:.3f}, against the non-positive interference assumed.",
        instances=len(away) + 7,
        numbers={f"deviation_{p}": v for p, v in sorted(away.items())}
        | {"simplices_worst": simplices, "pentagon_interference": positive},
    )


def _away_from_eq_19(W_p: Tensor) -> float:
    p = W_p.shape[1]
    gram = (torch.eye(p, dtype=torch.float64) * p - 1) / (p - 1)
    return float((W_p.T @ W_p - gram).abs().max())


CHECKS = (reordering, zero_mean_residual, polygon_gram)
