"""Extreme sparsity (Theorem 2, Eq. 26): the loss as a polynomial in S, its first-order term, Top-k and JumpReLU."""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from wsae.core.errors import UserError
from wsae.theory.geometry import check_W_p, interference
from wsae.theory.losses import check_sparsity, grid, magnitudes, sae_residual, superpose


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


def loss_at(terms: Float64[Tensor, " terms"], sparsity: float) -> float:
    """Return L(S) = sum_m S^(n-m) (1-S)^m T_m for the terms of `support_terms`."""
    S = check_sparsity(sparsity)
    m = torch.arange(len(terms), dtype=torch.float64)
    return float((S ** (len(terms) - 1 - m) * (1 - S) ** m * terms).sum())


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
    values, places = gram.topk(k, dim=1)
    return torch.zeros_like(gram).scatter(1, places, values)


def jumprelu_window(W_p: Float[Tensor, "d_in n"], low: float, high: float) -> tuple[float, float]:
    """Return [a, b): the thresholds with which JumpReLU recovers every 1-sparse x with low <= x_u <= high.

    a = high max(0, largest interference), b = low; empty when a >= b. Columns of unit length are assumed. Raises
    UserError unless 0 < low <= high.
    """
    if not 0 < low <= high:
        raise UserError(f"magnitudes from {low:g} to {high:g}: they must satisfy 0 < low <= high")
    return high * max(0.0, float(interference(W_p).max())), low
