"""Feature shrinking and vanishing (Section 4.1) of x_m = ReLU(W_p^T W_p x), per feature, for any W_p and S."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from wsae.core.errors import UserError
from wsae.theory.geometry import check_W_p
from wsae.theory.losses import (
    check_sparsity,
    closed_form,
    code,
    grid,
    magnitudes,
    sampled,
    superpose,
)

EXACT_POINTS = 100_000
"""Grids up to this size are enumerated; beyond it rows are sampled."""


@dataclass(frozen=True)
class Shrinkage:
    """What becomes of the features in the code; latent i belongs to feature i."""

    ratio: Float64[Tensor, " n"]
    """E[x_m,i | x_i > 0] / E[x_i | x_i > 0]: below 1 the feature shrinks, above 1 positive interference inflates it."""
    vanished: Float64[Tensor, " n"]
    """P(x_m,i = 0 | x_i > 0)."""
    spurious: Float64[Tensor, " n"]
    """P(x_m,i > 0 | x_i = 0): the latent speaks although its feature is silent (0 where S = 0)."""
    top_lost: Float64[Tensor, " n"]
    """P(i is the largest feature, no largest latent is a largest feature's): the code names another top feature."""
    latents: float
    """E[number of active latents]."""
    features: float
    """E[number of active features]."""
    dimensions: float
    """E[number of non-zero dimensions of x_p]."""
    fewer_than_dimensions: float
    """P(fewer latents are active than x_p has non-zero dimensions), as in Example 2."""

    @property
    def top_changed(self) -> float:
        """P(the top feature changes): ties count for the code, a silent code against it."""
        return float(self.top_lost.sum())


def shrinkage(
    W_p: Float[Tensor, "d_in n"],
    sparsity: float,
    levels: int = 4,
    rows: int = 20_000,
    seed: int = 0,
) -> Shrinkage:
    """Return the Shrinkage at W_m = W_p^T and sparsity S: exact on the grid for small n, sampled for large n.

    Raises UserError for a bad W_p, S outside [0, 1), or a sample in which some feature is never active.
    """
    matrix = check_W_p(W_p)
    n = matrix.shape[1]
    if (levels + 1) ** n <= EXACT_POINTS:
        features, probability = grid(n, sparsity, levels)
    else:
        features, probability = sampled(n, sparsity, rows, seed)
    return measure(matrix, features, probability)


def measure(
    W_p: Float64[Tensor, "d_in n"],
    features: Float64[Tensor, "points n"],
    probability: Float64[Tensor, " points"],
) -> Shrinkage:
    """Return the Shrinkage at W_m = W_p^T under a given distribution; see `shrinkage`."""
    acts = superpose(W_p, features)
    tiny = 1e-12 * float(features.abs().max())
    latents = code(closed_form(W_p), acts)
    latents = latents * (latents > tiny)  # what cancels exactly must not survive as rounding
    active, speaks = features > 0, latents > 0
    mass = probability @ active.double()
    if bool((mass == 0).any()):
        silent = int((mass == 0).nonzero()[0, 0])
        raise UserError(f"feature {silent} is never active here; use more rows or a lower S")
    idle = probability @ (~active).double()
    first = _largest(features)
    share = first.double() / first.sum(1, keepdim=True).clamp_min(1)  # where several tie
    changed = 1 - (first & _largest(latents)).any(1).double()
    lost = probability[:, None] * share * changed[:, None]
    dimensions = (acts.abs() > tiny).sum(1)
    return Shrinkage(
        ratio=(probability @ (latents * active)) / (probability @ features),
        vanished=(probability @ (active & ~speaks).double()) / mass,
        spurious=(probability @ (~active & speaks).double()) / idle.clamp_min(1e-300),
        top_lost=lost.sum(0),
        latents=float(probability @ speaks.sum(1).double()),
        features=float(probability @ active.sum(1).double()),
        dimensions=float(probability @ dimensions.double()),
        fewer_than_dimensions=float(probability @ (speaks.sum(1) < dimensions).double()),
    )


def _largest(values: Tensor) -> Bool[Tensor, "points n"]:
    """Mark the largest positive entries of each row, all of them where they tie up to rounding."""
    top = values.amax(1, keepdim=True)
    return (values >= top * (1 - 1e-9)) & (values > 0)


def simplex_shrinkage(p: int, sparsity: float, levels: int = 64) -> tuple[float, float]:
    """Return (ratio, vanished) of any feature of a simplex of p, exactly, on a fine grid of magnitudes.

    There x_m,i = ReLU(x_i - mean of the p - 1 others), so the law of a sum of iid variables is enough: p - 2
    convolutions instead of (levels + 1)^p points. The mean of more iid variables is smaller in convex order and
    ReLU is convex, so the ratio falls with p.
    """
    S = check_sparsity(sparsity)
    if p < 1:
        raise UserError(f"p = {p}; it must be at least 1")
    # magnitudes are odd multiples of 1 / (2 levels)
    steps = torch.zeros(2 * levels, dtype=torch.float64)
    steps[0], steps[1::2] = S, (1 - S) / levels
    total = torch.ones(1, dtype=torch.float64)
    for _ in range(p - 1):
        total = torch.from_numpy(np.convolve(total.numpy(), steps.numpy()))
    mean = torch.arange(len(total), dtype=torch.float64) / (2 * levels * max(1, p - 1))
    x = magnitudes(levels)
    left = (x[:, None] - mean) * (x[:, None] > mean + 1e-12)
    kept = float((left @ total).mean() / x.mean())
    vanished = float(((left == 0).double() @ total).mean())
    return kept, vanished
