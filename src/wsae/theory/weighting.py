"""What loss weights do to the gap of Theorem 5 and to the minimiser of the SAE loss, for a known W_p."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Float64
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from wsae.losses.config import GammaConfig
from wsae.losses.gamma import gamma_from_covariance, gamma_from_proxy
from wsae.losses.reconstruction import Weights
from wsae.theory.geometry import check_W_p
from wsae.theory.losses import closed_form, code, grid, sae_loss, superpose
from wsae.theory.optimise import minimise

RULES: dict[str, GammaConfig] = {
    "plain": GammaConfig(),
    "variance 1": GammaConfig(rule="variance", alpha=1.0),
    "variance -1/2": GammaConfig(rule="variance", alpha=-0.5),
    "gap": GammaConfig(rule="gap"),
    "whiten": GammaConfig(rule="whiten", ridge=0.0),
}
"""The rules compared, in the forms the theory speaks of (mean gamma^2 = 1)."""


def weights_of(W_p: Float[Tensor, "d_in n"], rule: str) -> Weights:
    """Return gamma of one of RULES for iid features: Cov(x_p) = W_p W_p^T up to a factor that normalisation removes."""
    cfg, matrix = RULES[rule], check_W_p(W_p)
    G = matrix @ matrix.T
    if cfg.rule in ("gap", "whiten"):
        return gamma_from_covariance(cfg, G)
    return gamma_from_proxy(cfg, G.diagonal().contiguous())


def scaled_gap_norm(W_p: Float64[Tensor, "d_in n"], gamma: Weights | None = None) -> float:
    """Return min_c ||c W_p^T Gamma^T Gamma W_p - I||_F = sqrt(n - tr(A)^2 / ||A||_F^2): the gap's size, scale aside."""
    weighted = W_p if gamma is None else gamma[:, None] * W_p if gamma.ndim == 1 else gamma @ W_p
    gram = weighted @ weighted.T  # the same trace and norm as W_p^T Gamma^T Gamma W_p
    left = W_p.shape[1] - float(gram.trace().square() / gram.square().sum())
    return max(left, 0.0) ** 0.5


def matched_loss(
    W_m: Float64[Tensor, "d_sae d_in"],
    W_p: Float64[Tensor, "d_in n"],
    features: Float64[Tensor, "points n"],
    probability: Float64[Tensor, " points"],
) -> float:
    """Return L_GT (Eq. 10) under the best pairing of latents with features; spare latents are compared with 0."""
    latents = code(W_m, superpose(W_p, features))
    weighted = latents * probability[:, None]
    spare = (latents * weighted).sum(0)
    own = features.square().T @ probability
    cost = own[:, None] + spare - 2 * features.T @ weighted
    rows, columns = linear_sum_assignment((cost - spare).numpy())
    return float((cost - spare)[rows, columns].sum() + spare.sum())


@dataclass(frozen=True)
class Reweighted:
    """The minimiser found under one rule."""

    W_m: Float64[Tensor, "d_sae d_in"]
    sae: float
    """Its plain L_SAE / E|x_p|^2."""
    truth: float
    """Its matched L_GT / E|x|^2."""
    gap: float
    """scaled_gap_norm of the rule, which does not depend on W_m."""


def reweighted(
    W_p: Float[Tensor, "d_in n"], sparsity: float, levels: int = 1, **search: Any
) -> dict[str, Reweighted]:
    """Return the best minimiser of L_WSAE found under each of RULES (d_sae = n, the exact grid of `levels`).

    `search` takes the fields of `wsae.theory.optimise.Search`; W_p^T is always among the starts.
    """
    matrix = check_W_p(W_p)
    n = matrix.shape[1]
    features, probability = grid(n, sparsity, levels)
    given = (matrix, features, probability)
    energy = float(superpose(matrix, features).square().sum(1) @ probability)
    truth = float(features.square().sum(1) @ probability)
    found = {}
    for rule in RULES:
        gamma = weights_of(matrix, rule)
        W_m = minimise(
            matrix, n, features, probability, gamma, init=closed_form(matrix), **search
        ).W_m
        found[rule] = Reweighted(
            W_m=W_m,
            sae=float(sae_loss(W_m, *given)) / energy,
            truth=matched_loss(W_m, *given) / truth,
            gap=scaled_gap_norm(matrix, gamma),
        )
    return found
