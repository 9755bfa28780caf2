"""The reconstruction loss and dead-latent revival, both weighted by the same gamma."""

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from wsae.ops import code_from_topk, decode, encode_at
from wsae.ops.sparse import Plan
from wsae.sae.forward import Forward
from wsae.sae.model import SparseAutoencoder

# Where gamma meets a residual: one weight per dimension, or a matrix.

Weights = Float[Tensor, " d_in"] | Float[Tensor, "d_in d_in"]
"""gamma: the diagonal of Gamma [d_in], or Gamma itself [d_in, d_in]."""


def weigh(residual: Float[Tensor, "*batch d_in"], gamma: Weights) -> Float[Tensor, "*batch d_in"]:
    """Return Gamma e for every residual e = x - x_hat (inside Eq. 12)."""
    return residual * gamma if gamma.ndim == 1 else residual @ gamma.T


def dimension_weights(gamma: Weights) -> Float[Tensor, " d_in"]:
    """Return sqrt(diag(Gamma^T Gamma)): what a unit error in one dimension costs; gamma itself if it is a vector.

    For a matrix it is blind to the angles between dimensions: whitened data may have equal weights here.
    """
    return gamma if gamma.ndim == 1 else torch.linalg.vector_norm(gamma, dim=0)


def effective_dimensions(gamma: Weights) -> float:
    """Return tr(M)^2 / ||M||_F^2, M = Gamma^T Gamma: how many directions carry the loss's weight (1 .. d_in).

    For a vector: 1 / sum of squared shares, share_i = gamma_i^2 / sum gamma^2.
    """
    gamma = gamma.double()
    if gamma.ndim == 1:
        share = gamma.square() / gamma.square().sum()
        return float(1.0 / share.square().sum())
    gram: Float64[Tensor, "d_in d_in"] = gamma.T @ gamma
    return float(gram.trace().square() / gram.square().sum())


def weighted_reconstruction_loss(
    x: Float[Tensor, "batch d_in"],
    x_hat: Float[Tensor, "batch d_in"],
    gamma: Weights,
) -> Float[Tensor, ""]:
    """Mean over the batch of ||Gamma (x - x_hat)||^2 (Eq. 12; Eq. 4 when gamma is 1)."""
    return weigh(x - x_hat, gamma).square().sum() / len(x)


def auxk_loss(
    sae: SparseAutoencoder,
    residual: Float[Tensor, "batch d_in"],
    forward: Forward,
    dead: Bool[Tensor, " d_sae"],
    k_aux: int,
) -> Float[Tensor, ""]:
    """Mean over the batch of ||Gamma (e - e_hat)||^2, e the residual x - x_hat as a constant, e_hat = z_dead W_dec.

    z_dead are the ReLU'd k_aux largest pre-activations among dead latents (Gao et al. 2025, A.2), without b_dec
    since e has none. The gradient reaches encoder and decoder of those latents. 0 when none is dead.
    """
    candidates = dead.nonzero()[:, 0]
    if len(candidates) == 0:
        return residual.new_zeros(())
    with torch.no_grad():
        pre = forward.pre.index_select(1, candidates)
        picked = pre.topk(min(k_aux, len(candidates)), dim=1, sorted=False).indices
        shape = code_from_topk(picked.to(residual.dtype), candidates[picked])
        plan = Plan.build(shape.indices, shape.offsets, sae.cfg.d_sae)
    values = encode_at(forward.centred, sae.encoder_rows, sae.biases, plan, forward.pre).relu()
    e_hat = decode(values, sae.W_dec, plan)
    return weighted_reconstruction_loss(residual.detach(), e_hat, sae.gamma)
