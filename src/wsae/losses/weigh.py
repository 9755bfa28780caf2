"""Where gamma meets a residual: one weight per dimension, or a matrix."""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

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
