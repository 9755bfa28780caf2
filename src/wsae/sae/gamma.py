"""gamma rules: statistics -> loss weights (paper Section 4.3.2, 5.1, 5.2).

The proxies are pure functions; `gamma_from_proxy` makes one weight per input dimension of any of them, and
`gamma_from_covariance` a vector or a matrix. gamma acts on the loss only.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from wsae.core.calls import tensor
from wsae.core.errors import UserError
from wsae.sae.config import OUTLIER_RATIO, RIDGE, GammaConfig, Normalise, Robust
from wsae.sae.forward import Weights, dimension_weights, effective_dimensions

# Weights that close the gap of Theorem 5: gamma from the covariance of x_p.
#
# At W_m = W_p^T the weighted SAE loss differs from the reconstruction of the true features by a
# quadratic form in W_p^T Gamma^T Gamma W_p - I (Eq. 13). Both rules minimise its Frobenius norm.
# They see W_p only through G = W_p W_p^T, and for iid features Cov(x_p) = Var(x_i) G, so
# activations are enough, up to one factor.


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


def gamma_from_proxy(cfg: GammaConfig, proxy: object) -> Float64[Tensor, " d_in"]:
    """Return gamma_i = normalise(robust(s)_i ^ alpha) [d_in], in fp64; 0 on outlier dimensions with robust "drop".

    The proxy s [d_in] is a tensor, an array or a list. Raises UserError when one is negative, not finite, all zero, or
    zero with alpha < 0.
    """
    given = tensor(proxy, "proxy").detach()
    if given.ndim != 1:
        raise UserError(f"proxy: shape {tuple(given.shape)}; give one value per dimension, [d_in]")
    s = robust_proxy(given.double().cpu(), cfg.robust, cfg.quantile)
    _check(s, cfg)
    dropped = cfg.robust == "drop"
    if cfg.rule == "none" or (cfg.alpha == 0 and not dropped):
        return torch.ones_like(s)
    gamma = s.pow(cfg.alpha)
    return normalise_gamma(gamma.masked_fill(outliers(s), 0.0) if dropped else gamma, cfg.normalise)


def outliers(s: Float64[Tensor, " d_in"]) -> Bool[Tensor, " d_in"]:
    """Return which dimensions have s_i > 50 median(s); none where the median is 0."""
    median = s.median()
    return (s > OUTLIER_RATIO * median) & (median > 0)


def gamma_from_covariance(
    cfg: GammaConfig, covariance: Float[Tensor, "_ _"]
) -> Float64[Tensor, " d_in"] | Float64[Tensor, "d_in d_in"]:
    """Return gamma of the rules gap, [d_in] with s_i = sqrt(g_i), and whiten, [d_in, d_in], in fp64.

    `covariance` is [d_in, d_in]; alpha 0 gives the plain loss, a vector of ones, without a look at the covariance.
    Raises UserError where `gap_weights`, `whitening` and `gamma_from_proxy` do.
    """
    if not cfg.needs_covariance:
        return torch.ones(len(covariance), dtype=torch.float64)
    covariance = covariance.double().cpu()
    try:
        if cfg.rule == "gap":
            return gamma_from_proxy(cfg, gap_weights(covariance).sqrt())
        ridge = RIDGE if cfg.ridge is None else cfg.ridge
        return normalise_matrix(whitening(covariance, ridge, cfg.alpha), cfg.normalise)
    except UserError as error:
        raise UserError(f"gamma rule {cfg.rule}: {error}") from error


def gamma_from_residual(
    cfg: GammaConfig, covariance: Float[Tensor, "_ _"]
) -> Float64[Tensor, " d_in"] | Float64[Tensor, "d_in d_in"]:
    """Return gamma of the residual rules, in fp64, from the covariance [d_in, d_in] of e = x - x_hat of an SAE.

    residual: s_i = (Var(e_i) + ridge m)^(-1/2), m the mean variance; residual_covariance: Gamma = (Cov(e) + ridge m I)
    ^(-alpha/2). With e the noise on the activations, alpha 1 is the Gamma^T Gamma = Sigma^-1 of Gauss and Markov.
    Raises UserError where `gamma_from_proxy` and `whitening` do.
    """
    C = covariance.double().cpu()
    ridge = RIDGE if cfg.ridge is None else cfg.ridge
    if cfg.rule == "residual_covariance":
        return normalise_matrix(whitening(C, ridge, cfg.alpha), cfg.normalise)
    return gamma_from_proxy(cfg, (C.diagonal() + ridge * C.diagonal().mean()).rsqrt())


def robust_proxy(
    s: Float64[Tensor, " d_in"], robust: Robust, quantile: float
) -> Float64[Tensor, " d_in"]:
    """Tame outlier dimensions: clip at the quantiles 1 - q and q (winsor), or use rank / d_in (ties share ranks).

    drop leaves s as it is: `gamma_from_proxy` sets the weight of its `outliers` to 0.
    """
    match robust:
        case "none" | "drop":
            return s
        case "winsor":
            edges = torch.tensor([1 - quantile, quantile], dtype=s.dtype)
            low, high = torch.quantile(s, edges).tolist()
            return s.clamp(low, high)
        case "rank":
            ordered = s.sort().values
            below = torch.searchsorted(ordered, s, right=False)
            upto = torch.searchsorted(ordered, s, right=True)
            return (below + 1 + upto).double() / 2 / len(s)


def normalise_gamma(
    gamma: Float64[Tensor, " d_in"], normalise: Normalise
) -> Float64[Tensor, " d_in"]:
    """Scale gamma: mean gamma^2 = 1 (rms), max gamma = 1 (max), or leave it (none)."""
    # first by the largest, so that squares cannot overflow
    gamma = gamma if normalise == "none" else gamma / gamma.max()
    return gamma / gamma.square().mean().sqrt() if normalise == "rms" else gamma


def normalise_matrix(
    gamma: Float64[Tensor, "d_in d_in"], normalise: Normalise
) -> Float64[Tensor, "d_in d_in"]:
    """Scale Gamma: trace(Gamma^T Gamma) = d_in (rms), largest singular value 1 (max), or leave it (none).

    On a diagonal matrix this is `normalise_gamma` of its diagonal; neither depends on the basis.
    """
    if normalise == "none":
        return gamma
    if normalise == "max":
        return gamma / torch.linalg.matrix_norm(gamma, 2)
    gamma = gamma / gamma.abs().max()  # first, so that squares cannot overflow
    return gamma / (gamma.square().sum() / len(gamma)).sqrt()


def latent_variance_proxy(
    variance: Float[Tensor, " d_sae"], W_dec: Float[Tensor, "d_sae d_in"]
) -> Float[Tensor, " d_in"]:
    """Return s_i = sum_j Var(z_j) W_dec[j, i]^2: the latents' variances carried to input dimensions.

    Section 5.2.1 speaks of the variance of SAE latents but indexes it by i in [n_p], the input dimensions. This
    makes both true: it is Var(x_hat_i) when latents are uncorrelated.
    """
    return variance @ W_dec.square()


def describe_gamma(
    cfg: GammaConfig,
    gamma: Weights,
    unmasked: Float[Tensor, " d_in"] | None = None,
    heaviest: int = 10,
) -> dict[str, Any]:
    """Return the record a run keeps: rule, heaviest dimensions (none when all weigh 1), movement without the mask.

    Shares are gamma_i^2 / sum gamma^2, the part of the loss's weight a dimension carries; a matrix is described by its
    `dimension_weights`.
    """
    gamma = gamma.double().cpu()
    weight = dimension_weights(gamma)
    share = weight.square() / weight.square().sum()
    count = 0 if cfg.rule == "none" else min(heaviest, len(weight))
    top = weight.topk(count).indices.tolist()
    record: dict[str, Any] = {
        **cfg.to_dict(),
        "heaviest": [[i, float(weight[i]), float(share[i])] for i in top],
        "effective_dimensions": effective_dimensions(gamma),
        "max_over_median": float(weight.max() / weight.median()) if weight.median() > 0 else None,
    }
    for key in ("vector", "ridge", "rounds"):
        record.pop(key)
    if cfg.rule == "whiten" or cfg.needs_pilot:
        record["ridge"] = RIDGE if cfg.ridge is None else cfg.ridge
    if cfg.needs_pilot:
        record["rounds"] = cfg.rounds or 1
    if cfg.rule == "gap" or cfg.robust == "drop":
        record["zero_weights"] = int((weight == 0).sum())
    if unmasked is not None:
        record["without_mask"] = _movement(gamma, unmasked.double().cpu())
    return record


def _movement(gamma: Tensor, unmasked: Tensor) -> dict[str, float | int]:
    share, other = (g.square() / g.square().sum() for g in (gamma, unmasked))
    ratio = (unmasked.clamp_min(1e-300) / gamma.clamp_min(1e-300)).log().abs()
    worst = int(ratio.argmax())
    return {
        "cosine": float(torch.cosine_similarity(gamma, unmasked, dim=0)),
        "weight_moved": float((share - other).abs().sum() / 2),
        "largest_change_dimension": worst,
        "largest_change_factor": float(ratio[worst].clamp_max(700).exp()),
        "top_share_masked": float(share.max()),
        "top_share_unmasked": float(other.max()),
    }


def _check(s: Tensor, cfg: GammaConfig) -> None:
    if cfg.rule == "none" or cfg.alpha == 0:
        return
    bad = ((s < 0) | ~torch.isfinite(s)).nonzero()
    if len(bad):
        i = int(bad[0, 0])
        raise UserError(
            f"gamma rule {cfg.rule}: proxy of dimension {i} is {float(s[i])}; it must be finite and >= 0"
        )
    if not bool((s > 0).any()):
        raise UserError(
            f"gamma rule {cfg.rule}: every dimension's proxy is 0 (constant activations?); use --gamma none"
        )
    zeros = int((s == 0).sum())
    if cfg.alpha < 0 and zeros:
        first = int((s == 0).nonzero()[0, 0])
        raise UserError(
            f"gamma rule {cfg.rule} with alpha {cfg.alpha:g}: {zeros} dimensions have proxy 0 (first: {first}), "
            "which a negative power makes infinite; use --robust rank, or alpha >= 0"
        )
