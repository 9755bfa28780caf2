"""Weights that close the gap of Theorem 5: gamma from the covariance of x_p.

At W_m = W_p^T the weighted SAE loss differs from the reconstruction of the true features by a quadratic form in
W_p^T Gamma^T Gamma W_p - I (Eq. 13). Both rules minimise its Frobenius norm. They see W_p only through
G = W_p W_p^T, and for iid features Cov(x_p) = Var(x_i) G, so activations are enough, up to one factor.
"""

import torch
from jaxtyping import Float64
from torch import Tensor

from wsae.core.errors import UserError
from wsae.losses.config import RIDGE
from wsae.losses.weigh import Weights


def gap_weights(covariance: Float64[Tensor, "_ _"]) -> Float64[Tensor, " d_in"]:
    """Return g >= 0 [d_in], the diagonal Gamma^2 that minimises ||W_p^T diag(g) W_p - I||_F, for C = W_p W_p^T.

    The norm squared is g^T (C*C) g - 2 g^T diag(C) + n, * elementwise. With R the correlation matrix, g_i = u_i / C_ii
    and (R*R) u = 1 where that u is >= 0 (else the constrained minimum). R = I, orthogonal rows of W_p, gives
    g_i = 1 / C_ii: the variance rule with alpha = -1/2. For C = v W_p W_p^T the result is g / v.
    Raises UserError for a matrix that is no covariance, and naming a dimension of variance 0.
    """
    variance = _variances(covariance)
    scale = variance.rsqrt()
    correlation = covariance * scale[:, None] * scale
    return _non_negative(correlation.square()) / variance


def whitening(
    covariance: Float64[Tensor, "_ _"], ridge: float = RIDGE, alpha: float = 1.0
) -> Float64[Tensor, "d_in d_in"]:
    """Return Gamma = (C + ridge m I)^(-alpha/2) [d_in, d_in], symmetric; m is the mean eigenvalue of C.

    With ridge 0 and alpha 1, Gamma^T Gamma is the pseudo-inverse of C = W_p W_p^T, which minimises
    ||W_p^T M W_p - I||_F over all M >= 0 (the minimum is sqrt(n - rank W_p)); directions without variance then weigh 0.
    Raises UserError for a matrix that is no covariance, a dimension of variance 0, or a negative ridge.
    """
    if not 0 <= ridge < float("inf"):
        raise UserError(f"ridge {ridge:g}: must be a number of at least 0")
    _variances(covariance)
    values, vectors = torch.linalg.eigh(covariance)
    floor = values[-1] * len(values) * torch.finfo(torch.float64).eps
    lifted = values.clamp_min(0) + ridge * values.mean()
    power = torch.where(lifted > floor, lifted, torch.inf).pow(-alpha / 2)
    power = torch.where(lifted > floor, power, 0.0)
    return (vectors * power) @ vectors.T


def gap_norm(
    W_p: Float64[Tensor, "d_in n_features"], gamma: Weights | None = None
) -> Float64[Tensor, ""]:
    """Return ||W_p^T Gamma^T Gamma W_p - I||_F, the size of the gap's matrix (Eq. 13; Eq. 11 without gamma)."""
    weighted = W_p if gamma is None else gamma[:, None] * W_p if gamma.ndim == 1 else gamma @ W_p
    gram = weighted.T @ weighted
    return torch.linalg.matrix_norm(gram - torch.eye(len(gram), dtype=gram.dtype))


def _non_negative(Q: Float64[Tensor, "d_in d_in"]) -> Float64[Tensor, " d_in"]:
    """Return the u >= 0 that minimises u^T Q u - 2 sum(u), Q positive semi-definite with ones on its diagonal."""
    from scipy.optimize import nnls

    values, vectors = torch.linalg.eigh(Q)
    kept = values > values[-1] * len(Q) * torch.finfo(torch.float64).eps
    values, vectors = values[kept], vectors[:, kept]
    projected = vectors.sum(0)  # vectors^T 1
    free = vectors @ (projected / values)
    if bool((free >= 0).all()):
        return free
    # Q = A^T A with A = sqrt(values) vectors^T, so the quadratic is ||A u - y||^2 with A^T y = 1, up to a constant.
    root = values.sqrt()
    solution, _ = nnls((root[:, None] * vectors.T).numpy(), (projected / root).numpy())
    return torch.from_numpy(solution)


def _variances(covariance: Tensor) -> Float64[Tensor, " d_in"]:
    """Return the diagonal of a covariance matrix, all of it positive."""
    shape = tuple(covariance.shape)
    if len(shape) != 2 or shape[0] != shape[1] or not shape[0]:
        raise UserError(f"covariance of shape {shape}: must be [d_in, d_in]")
    if not bool(torch.isfinite(covariance).all()):
        raise UserError("covariance holds NaN or infinite values; check the activations")
    variance = covariance.diagonal()
    if not torch.allclose(covariance, covariance.T, rtol=1e-9, atol=1e-12 * float(variance.max())):
        raise UserError("covariance is not symmetric; give E[(x - mean)(x - mean)^T]")
    bad = (variance <= 0).nonzero()
    if len(bad):
        i = int(bad[0, 0])
        raise UserError(
            f"dimension {i} has variance {float(variance[i]):g} ({len(bad)} such in all), so it has no finite weight; "
            "leave it out, or use --gamma variance"
        )
    return variance
