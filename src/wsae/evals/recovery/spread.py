"""How the values of each latent, or feature, are spread: variance (paper Fig. 3d) and twins without a scale."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

Scores = dict[str, float]
ROWS = 512
"""Rows taken to fp64 at once: blocks that stay in a core's cache, and no fp64 copy of the whole."""


class Moments(NamedTuple):
    """Per column, over rows t."""

    mean: Float64[Tensor, " columns"]
    square: Float64[Tensor, " columns"]
    """sum_t (z_t - mean)^2; exactly 0 for a constant column."""
    fourth: Float64[Tensor, " columns"]
    """sum_t (z_t - mean)^4."""


def moments(values: Float[Tensor, "rows columns"], mean: Float64[Tensor, " columns"]) -> Moments:
    """Return the central moments of each column about its `mean`."""
    square, fourth = torch.zeros_like(mean), torch.zeros_like(mean)
    for block in values.split(ROWS):
        part = (block.double() - mean).square_()
        square += part.sum(0)
        fourth += part.square_().sum(0)
    # What rounding leaves of a constant column is some 1e-32 of its square.
    varies = square > 1e-24 * len(values) * mean.square()
    return Moments(mean, torch.where(varies, square, 0.0), fourth)


def spread(name: str, found: Moments, rows: int) -> Scores:
    """Return per-column variance (mean over all columns), dispersion and kurtosis (medians over columns that vary).

        Var(z_j)        Var(z_j) / E[z_j]^2        E[(z_j - E z_j)^4] / Var(z_j)^2

    Variance grows with the square of a latent's scale; the others have none. The median, because a column that fires
    once in T rows has dispersion and kurtosis of about T and would decide a mean.
    """
    variance, live = found.square / rows, found.square > 0
    scores = {f"{name}_variance_mean": float(variance.mean())}
    if not bool(live.any()):
        return {**scores, f"{name}_dispersion": 0.0, f"{name}_kurtosis": 0.0}
    # A mean of 0 with a spread needs values of both signs; its dispersion is then large, not undefined.
    dispersion = variance[live] / found.mean[live].square().clamp_min(1e-300)
    kurtosis = found.fourth[live] / rows / variance[live].square()
    return {
        **scores,
        f"{name}_dispersion": float(torch.quantile(dispersion, 0.5)),
        f"{name}_kurtosis": float(torch.quantile(kurtosis, 0.5)),
    }
