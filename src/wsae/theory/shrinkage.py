"""Feature shrinking and vanishing (Section 4.1) of x_m = ReLU(W_p^T W_p x), per feature, for any W_p and S."""

from dataclasses import dataclass
from fractions import Fraction
from math import comb, factorial

from jaxtyping import Bool, Float, Float64
from torch import Tensor

from wsae.core.errors import UserError
from wsae.theory.geometry import check_W_p
from wsae.theory.losses import (
    check_sparsity,
    closed_form,
    code,
    sampled,
    superpose,
    uniform,
)

SUPPORTS = 10
"""Features up to which every support is enumerated; beyond it rows are sampled."""


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
    """P(i is the largest feature, no largest latent is a largest feature's): the code names another top feature, or
    none."""
    latents: float
    """E[number of active latents]."""
    features: float
    """E[number of active features]."""
    dimensions: float
    """E[number of non-zero dimensions of x_p]."""
    fewer_than_dimensions: float
    """P(fewer latents are active than x_p has non-zero dimensions), as in Example 2."""


def shrinkage(
    W_p: Float[Tensor, "d_in n"], sparsity: float, rows: int = 20_000, seed: int = 0
) -> Shrinkage:
    """Return the Shrinkage at W_m = W_p^T and sparsity S, magnitudes uniform on (0, 1] (Section 5.1).

    Supports are enumerated for small n; for large n `rows` are sampled. Raises UserError for a bad W_p, S outside
    [0, 1), or a sample in which some feature is never active.
    """
    matrix = check_W_p(W_p)
    n = matrix.shape[1]
    drawn = uniform(n, sparsity) if n <= SUPPORTS else sampled(n, sparsity, rows, seed)
    return measure(matrix, *drawn)


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


def simplex_shrinkage(p: int, sparsity: float | Fraction) -> tuple[float, float]:
    """Return (ratio, vanished) of any feature of a simplex of p, magnitudes uniform on (0, 1], in rational arithmetic.

    There x_m,i = ReLU(x_i - mean of the m = p - 1 others). With k of them active their sum V is a sum of k uniforms,
    whose law is piecewise polynomial, and integrating over x_i gives, sums over j = 0 ... k,

        E[x_m,i | x_i > 0, k] = sum (-1)^j C(k, j) (m - j)^(k+2) / (m^2 (k+2)!)
        P(x_m,i > 0 | x_i > 0, k) = sum (-1)^j C(k, j) (m - j)^(k+1) / (m (k+1)!)

    The mean of more iid variables is smaller in convex order and ReLU is convex, so the ratio falls with p.
    """
    S = Fraction(check_sparsity(float(sparsity))).limit_denominator(10**9)
    if p < 1:
        raise UserError(f"p = {p}; it must be at least 1")
    m = p - 1
    if m == 0:
        return 1.0, 0.0
    mean = speaks = Fraction(0)
    for k in range(p):
        chance = comb(m, k) * (1 - S) ** k * S ** (m - k)
        mean += chance * _alternating(m, k, k + 2) / m**2
        speaks += chance * _alternating(m, k, k + 1) / m
    return float(2 * mean), float(1 - speaks)


def _alternating(m: int, k: int, power: int) -> Fraction:
    """Return sum_j (-1)^j C(k, j) (m - j)^power / power!."""
    total = sum((-1) ** j * comb(k, j) * (m - j) ** power for j in range(k + 1))
    return Fraction(total, factorial(power))
