"""The solutions of Eq. 33, W_p = W_m^T ReLU(W_m W_p): the W_m whose 1-sparse loss is exactly 0 (Theorem 3)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from wsae.theory.geometry import check_W_p
from wsae.theory.limits import one_sparse_residuals
from wsae.theory.losses import closed_form
from wsae.theory.optimise import minimise

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


def zero_solutions(
    W_p: Float[Tensor, "d_in n"], starts: int = 128, seed: int = 0, d_sae: int | None = None
) -> Zeros:
    """Search for W_m with zero 1-sparse loss from random starts, refined by Gauss-Newton to rounding.

    A search can miss solutions: that it finds others refutes uniqueness, that it finds none does not prove it.
    """
    matrix = check_W_p(W_p)
    n = matrix.shape[1]
    alone = torch.eye(n, dtype=torch.float64)
    weight = torch.full((n,), 1 / n, dtype=torch.float64)
    width = n if d_sae is None else d_sae
    found = minimise(matrix, width, alone, weight, starts=starts, seed=seed, polished=0)
    refined = gauss_newton(found.all_W_m[found.losses < 0.05], matrix)
    exact = refined[one_sparse_residuals(refined, matrix).sum(-1) < _ROUNDING * n]
    truth = closed_form(matrix, width)
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
