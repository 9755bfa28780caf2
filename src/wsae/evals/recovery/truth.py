"""The ground truth of a synthetic world, checked and reduced once, against which any number of SAEs are scored."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Shaped
from torch import Tensor

from wsae.acts.source import as_path, open_matrix
from wsae.core.calls import tensor
from wsae.core.errors import UserError

# How the values of each latent, or feature, are spread: variance (paper Fig. 3d) and twins without
# a scale.

Scores = dict[str, float]
ROWS = 512
"""Rows taken to fp64 at once: blocks that stay in a core's cache, and no fp64 copy of the whole."""


class ColumnMoments(NamedTuple):
    """Per column, over rows t."""

    mean: Float64[Tensor, " columns"]
    square: Float64[Tensor, " columns"]
    """sum_t (z_t - mean)^2; exactly 0 for a constant column."""
    fourth: Float64[Tensor, " columns"]
    """sum_t (z_t - mean)^4."""


def moments(
    values: Float[Tensor, "rows columns"], mean: Float64[Tensor, " columns"]
) -> ColumnMoments:
    """Return the central moments of each column about its `mean`."""
    square, fourth = torch.zeros_like(mean), torch.zeros_like(mean)
    for block in values.split(ROWS):
        part = (block.double() - mean).square_()
        square += part.sum(0)
        fourth += part.square_().sum(0)
    # What rounding leaves of a constant column is some 1e-32 of its square.
    varies = square > 1e-24 * len(values) * mean.square()
    return ColumnMoments(mean, torch.where(varies, square, 0.0), fourth)


def spread(name: str, found: ColumnMoments, rows: int) -> Scores:
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


Matrix = object
"""A matrix as users bring it (`wsae.core.calls.numbers`), or an array file; a mistake is answered in words."""


@dataclass(frozen=True)
class GroundTruth:
    """Features x [rows, n], what each does over the rows, and, where known, the activations and W_p; all in fp64."""

    features: Float64[Tensor, "rows n"]
    active: Float64[Tensor, "rows n"]
    """1 where x > 0, else 0."""
    count: Float64[Tensor, " n"]
    """Rows in which each feature is active."""
    moments: ColumnMoments
    """Mean and central moments of each feature."""
    energy: Float64[Tensor, " n"]
    """sum_t x_ti^2."""
    acts: Float64[Tensor, "rows d_in"] | None
    W_p: Float64[Tensor, "d_in n"] | None
    reference: dict[str, float] = field(default_factory=dict)
    """Scores that no SAE changes: the losses of trivial answers, and the features' own statistics."""

    @property
    def seen(self) -> Bool[Tensor, " n"]:
        """Features active in at least one row; means over features are over these."""
        return self.count > 0

    @property
    def varying(self) -> Bool[Tensor, " n"]:
        """Features that are not constant over the rows, for which a correlation exists."""
        return self.moments.square > 0


def checked_truth(
    features: Matrix, acts: Matrix | None = None, W_p: Matrix | None = None
) -> GroundTruth:
    """Return the ground truth of features x [rows, n], activations [rows, d_in] and W_p [d_in, n], without reference.

    Raises UserError for a wrong shape, a value that is not finite, a negative feature, fewer than two rows, or when no
    feature is ever active.
    """
    x = matrix("features", features, "[rows, n_features]")
    if len(x) < 2:
        raise UserError(f"features have {len(x)} rows; recovery scores need at least 2")
    if bool((x < 0).any()):
        row, column = (x < 0).nonzero()[0].tolist()
        raise UserError(
            f"features[{row}, {column}] is {float(x[row, column]):.3g}; ground-truth features are >= 0"
        )
    active = (x > 0).double()
    count = active.sum(0)
    if not bool(count.any()):
        raise UserError(
            f"no feature is active in any of {len(x)} rows (sparsity 1?), so there is no signal to recover"
        )
    W = None if W_p is None else matrix("W_p", W_p, "[d_in, n_features]").to(x.device)
    x_p = None if acts is None else matrix("acts", acts, "[rows, d_in]").to(x.device)
    _check_shapes(x, x_p, W)
    if x_p is None and W is not None:
        x_p = x @ W.T
    return GroundTruth(x, active, count, moments(x, x.mean(0)), x.square().sum(0), x_p, W)


def matrix(name: str, value: Matrix, shape: str) -> Float64[Tensor, "rows columns"]:
    """Return a finite matrix in fp64; raises UserError naming it, in the words of `shape`, otherwise."""
    x = two_dimensional(name, value, shape).double()
    check_finite(name, x)
    return x


def two_dimensional(name: str, value: Matrix, shape: str) -> Shaped[Tensor, "rows columns"]:
    """Return `value` as a detached matrix; raises UserError when it is none, or empty."""
    path = as_path(value)
    x = tensor(value, name).detach() if path is None else _read(path)
    if x.ndim != 2 or 0 in x.shape:
        raise UserError(f"{name} has shape {tuple(x.shape)}; give {shape}, both at least 1")
    return x


def _read(path: Path) -> Tensor:
    matrix = open_matrix(path, str(path))
    return matrix.take(np.arange(matrix.shape[0]))


def check_finite(name: str, x: Shaped[Tensor, "rows columns"]) -> None:
    """Raise UserError naming the first entry that is NaN or infinite."""
    bad = ~torch.isfinite(x)
    if bool(bad.any()):
        row, column = bad.nonzero()[0].tolist()
        raise UserError(f"{name}[{row}, {column}] is {float(x[row, column])}; it must be finite")


def _check_shapes(x: Tensor, acts: Tensor | None, W_p: Tensor | None) -> None:
    if acts is not None and len(acts) != len(x):
        raise UserError(f"features have {len(x)} rows but acts have {len(acts)}; rows must agree")
    if W_p is None:
        return
    needed = (acts.shape[1] if acts is not None else W_p.shape[0], x.shape[1])
    if tuple(W_p.shape) != needed:
        turned = "; it looks transposed" if tuple(W_p.T.shape) == needed else ""
        raise UserError(
            f"W_p has shape {tuple(W_p.shape)} where [d_in, n_features] = {needed} is needed{turned}"
        )
