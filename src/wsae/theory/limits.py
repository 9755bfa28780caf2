"""Extreme sparsity: the loss as a polynomial in S (Eq. 26), Top-k and JumpReLU, and the solutions of Eq. 33.

Those are the W_m with W_p = W_m^T ReLU(W_m W_p), whose 1-sparse loss is exactly 0 (Theorem 3).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from wsae.core.errors import UserError
from wsae.theory.geometry import check_W_p, interference
from wsae.theory.losses import (
    check_sparsity,
    closed_form,
    grid,
    keep_largest,
    magnitudes,
    minimise,
    sae_residual,
    superpose,
)


def support_terms(
    W_m: Float64[Tensor, "d_sae d_in"], W_p: Float64[Tensor, "d_in n"], levels: int = 1
) -> Float64[Tensor, " n+1"]:
    """Return T_m = sum over supports A of size m of E[||x_p - x_hat||^2 | A is active], for m = 0 ... n.

    The loss at any sparsity is the polynomial L(S) = sum_m S^(n-m) (1-S)^m T_m, of which Eq. 26 keeps m <= 1.
    """
    n = W_p.shape[1]
    features, probability = grid(n, 0.5, levels)
    lost = sae_residual(W_m, superpose(W_p, features)).square().sum(-1)
    size = (features > 0).sum(1)
    # at S = 1/2 every support has probability 2^-n, which the factor takes out
    return torch.zeros(n + 1, dtype=torch.float64).index_add(0, size, lost * probability * 2.0**n)


def one_sparse_residuals(
    W_m: Float64[Tensor, "*members d_sae d_in"], W_p: Float64[Tensor, "d_in n"]
) -> Float64[Tensor, "*members n"]:
    """Return ||W_p,u - W_m^T ReLU(W_m W_p,u)||^2 for each feature u: what Eq. 26 sums."""
    return sae_residual(W_m, W_p.T.contiguous()).square().sum(-1)


def first_order(
    W_m: Float64[Tensor, "d_sae d_in"],
    W_p: Float64[Tensor, "d_in n"],
    sparsity: float,
    second_moment: float = 1 / 3,
) -> float:
    """Return the 1-sparse part of the loss, S^(n-1) (1-S) E[x^2 | x > 0] sum_u ||W_p,u - W_m^T ReLU(W_m W_p,u)||^2.

    Exact for any W_m, because bias-free ReLU codes are homogeneous. Eq. 26 has a factor n more. `second_moment` is
    1/3 for x uniform in (0, 1].
    """
    S = check_sparsity(sparsity)
    total = float(one_sparse_residuals(W_m, W_p).sum())
    return S ** (W_p.shape[1] - 1) * (1 - S) * second_moment * total


def second_moment(levels: int) -> float:
    """Return E[x^2 | x > 0] on a grid of that many levels."""
    return float(magnitudes(levels).square().mean())


def topk_bound(W_p: Float[Tensor, "d_in n"], d_sae: int | None = None) -> int:
    """Return n_m - p, p the most features that one feature interferes with negatively (end of Theorem 2's proof)."""
    matrix = check_W_p(W_p)
    negative = (interference(matrix) < -1e-9).sum(1)
    return (d_sae or matrix.shape[1]) - int(negative.max())


def topk_code(W_p: Float[Tensor, "d_in n"], k: int) -> Float64[Tensor, "n n"]:
    """Return Top-k(W_p^T W_p,u), one row per feature u: the k largest entries kept, signs and all, as the paper writes.

    Recovery of 1-sparse features means the identity. Raises UserError for k outside 1 ... n.
    """
    matrix = check_W_p(W_p)
    gram = matrix.T @ matrix
    if not 1 <= k <= len(gram):
        raise UserError(f"k = {k}; it must be between 1 and n = {len(gram)}")
    return keep_largest(gram, k)


def jumprelu_window(W_p: Float[Tensor, "d_in n"], low: float, high: float) -> tuple[float, float]:
    """Return [a, b): the thresholds with which JumpReLU recovers every 1-sparse x with low <= x_u <= high.

    a = high max(0, largest interference), b = low; empty when a >= b. Columns of unit length are assumed. Raises
    UserError unless 0 < low <= high.
    """
    if not 0 < low <= high:
        raise UserError(f"magnitudes from {low:g} to {high:g}: they must satisfy 0 < low <= high")
    return high * max(0.0, float(interference(W_p).max())), low


SAME = 1e-5
"""Largest distance between rows of two W_m that count as one solution."""


@dataclass(frozen=True)
class Zeros:
    """What a search over many starts found."""

    starts: int
    solutions: Float64[Tensor, "found d_sae d_in"]
    """Distinct solutions up to the order of rows, at most `KEPT`; the closed form first when it was found."""
    nullity: tuple[int, ...]
    """For each solution, the dimension of the directions that keep the 1-sparse loss at 0 to second order."""
    reached: int
    """How many starts ended in a solution."""
    reached_closed_form: int
    """How many ended in W_p^T, up to the order of rows."""

    @property
    def others(self) -> int:
        """Distinct solutions that are not W_p^T with its rows reordered."""
        return len(self.solutions) - int(self.reached_closed_form > 0)


KEPT = 24
"""A continuum has no end of distinct solutions; the search stops telling them apart here."""
_ROUNDING = 1e-22


def zero_solutions(W_p: Float[Tensor, "d_in n"], starts: int = 128, seed: int = 0) -> Zeros:
    """Search for W_m with zero 1-sparse loss from random starts, refined by Gauss-Newton to rounding.

    A search can miss solutions: that it finds others refutes uniqueness, that it finds none does not prove it.
    """
    matrix = check_W_p(W_p)
    n = matrix.shape[1]
    alone = torch.eye(n, dtype=torch.float64)
    weight = torch.full((n,), 1 / n, dtype=torch.float64)
    found = minimise(matrix, n, alone, weight, starts=starts, seed=seed, polished=0)
    refined = gauss_newton(found.all_W_m[found.losses < 0.05], matrix)
    exact = refined[one_sparse_residuals(refined, matrix).sum(-1) < _ROUNDING * n]
    truth = closed_form(matrix)
    known = [truth]
    for W_m in exact:
        if len(known) <= KEPT and all(distance(W_m, other) > SAME for other in known):
            known.append(W_m)
    hits = sum(distance(W_m, truth) <= SAME for W_m in exact)
    kept = torch.stack(known)[0 if hits else 1 :]
    return Zeros(starts, kept, tuple(nullity(W_m, matrix) for W_m in kept), len(exact), hits)


def distance(W_m: Float64[Tensor, "d_sae d_in"], other: Float64[Tensor, "d_sae d_in"]) -> float:
    """Return the largest distance between rows of two matrices under the best reordering of rows."""
    apart = torch.cdist(W_m, other)
    rows, columns = linear_sum_assignment(apart.numpy())
    return float(apart[rows, columns].max())


def jacobian(
    W_m: Float64[Tensor, "*members d_sae d_in"], W_p: Float64[Tensor, "d_in n"]
) -> Float64[Tensor, "*members equations unknowns"]:
    """Return the derivative of the n d_in residuals W_p,u - W_m^T ReLU(W_m W_p,u) by the d_sae d_in entries of W_m.

    With a_su = W_m,s . W_p,u: d r_uq / d W_sl = -(ReLU(a_su) [q = l] + H(a_su) W_sq W_p,lu), H(0) = 0.
    """
    pre = W_m @ W_p
    same = torch.einsum("...su,ql->...uqsl", pre.relu(), torch.eye(len(W_p), dtype=W_p.dtype))
    gate = torch.einsum("...su,...sq,lu->...uqsl", (pre > 1e-9).to(W_p.dtype), W_m, W_p)
    slope = -(same + gate)
    return slope.flatten(-4, -3).flatten(-2, -1)


def nullity(W_m: Float64[Tensor, "d_sae d_in"], W_p: Float64[Tensor, "d_in n"]) -> int:
    """Return the dimension of the Hessian's null space at a solution: the Hessian there is 2 J^T J."""
    slope = jacobian(W_m, W_p)
    return slope.shape[-1] - int(torch.linalg.matrix_rank(slope, rtol=1e-8))


def gauss_newton(
    W_m: Float64[Tensor, "members d_sae d_in"], W_p: Float64[Tensor, "d_in n"], steps: int = 40
) -> Float64[Tensor, "members d_sae d_in"]:
    """Return W_m after Levenberg-Marquardt steps on the 1-sparse residuals; no member gets worse."""
    best = W_m.clone()
    if not len(best):
        return best
    reached = one_sparse_residuals(best, W_p).sum(-1)
    damping = torch.full_like(reached, 1e-3)
    unit = torch.eye(best[0].numel(), dtype=best.dtype)
    for _ in range(steps):
        slope = jacobian(best, W_p)
        residual = (W_p.T - (best @ W_p).relu().mT @ best).flatten(-2)
        normal = slope.mT @ slope + damping[:, None, None] * unit
        step = torch.linalg.solve(normal, slope.mT @ residual[..., None])
        moved = best - step.reshape(best.shape)
        now = one_sparse_residuals(moved, W_p).sum(-1)
        better = now < reached
        best[better], reached[better] = moved[better], now[better]
        damping = torch.where(better, damping / 10, damping * 10).clamp(1e-12, 1e6)
    return best
