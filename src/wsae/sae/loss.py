"""The reconstruction loss and dead-latent revival, both weighted by the same gamma."""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from wsae.sae.architectures import Architecture
from wsae.sae.forward import WHOLE, Coded, Forward, Whole, revived
from wsae.sae.model import SAE

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
    batch: int = 0,
) -> Float[Tensor, ""]:
    """Mean over the batch of ||Gamma (x - x_hat)||^2 (Eq. 12; Eq. 4 when gamma is 1).

    `batch` counts its rows where they are not all here.
    """
    return weigh(x - x_hat, gamma).square().sum() / (batch or len(x))


def also_loss(
    x: Float[Tensor, "batch d_in"], forward: Forward, gamma: Weights, batch: int = 0
) -> Float[Tensor, ""]:
    """Return the weighted sum of the losses of what else reconstructs x: nested levels, a gate. 0 for most kinds."""
    losses = [
        also.weight * weighted_reconstruction_loss(x, also.x_hat, gamma, batch)
        for also in forward.also
    ]
    return torch.stack(losses).sum() if losses else x.new_zeros(())


Form = Literal["step", "tanh", "quadratic"]
TANH_SCALE = 4.0


class Price(NamedTuple):
    """What the penalties of a step cost."""

    l1: float | Float[Tensor, ""] = 0.0
    l0: float = 0.0
    form: Form = "step"
    """What the L0 penalty sums over a row."""
    target: float = 1.0
    """The L0 that the form quadratic draws to."""
    p: float | None = None
    """The power of what the L1 penalty sums, where it is annealed; else 1."""
    pre_act: float = 0.0
    """Of dead latents' distances below their thresholds."""

    def only_l1(self, arch: Architecture) -> bool:
        """Return whether a kind of SAE has no other penalty than sum_j z_j ||W_dec[j]||."""
        moved = self.form == "tanh" or arch.count is not None
        return self.p is None and not self.pre_act and not (self.l0 and moved)


def penalty(entries: Coded, price: Price, batch: int, part: Whole = WHOLE) -> Float[Tensor, ""]:
    """Return l1 * sum_j (z_j ||W_dec[j]||)^p + l0 * L0, means over a batch of so many rows.

    In place of L0 = sum_j H(pre_j - theta_j), the form tanh has sum_j tanh(4 z_j ||W_dec[j]||), and the form quadratic
    2 / target (L0 - target)^2.
    """
    total = entries.z.new_zeros(())
    if isinstance(price.l1, Tensor) or price.l1:
        total = total + price.l1 * (entries.l1(price.p).sum() / batch)
    if not price.l0:
        return total
    if price.form == "tanh":
        return total + price.l0 * (torch.tanh(TANH_SCALE * entries.lengths()).sum() / batch)
    count = entries.active()
    if count is None:
        return total
    if price.form == "step":
        return total + price.l0 * (count.sum() / batch)
    L0 = part.summed(entries.by_row(count))
    off = 2 / price.target * (L0 - price.target).square().sum() / batch
    # every part of the latents has the gradient, one of them the value
    return total + price.l0 * (off - off.detach() + part.once(off.detach()))


def pre_act_loss(entries: Coded, dead: Bool[Tensor, " d_sae"], batch: int) -> Float[Tensor, ""]:
    """Return the mean over the batch of sum_j relu(theta_j - pre_j) ||W_dec[j]|| over dead latents j, dense.

    It draws the encoder of a latent that never fires towards the data, and its threshold down (Anthropic, January
    2025 update).
    """
    below = (entries.own["threshold"] - entries.pre).relu() * dead
    below = below if entries.norms is None else below * entries.norms
    return below.sum() / batch


def auxk_loss(
    sae: SAE,
    residual: Float[Tensor, "batch d_in"],
    forward: Forward,
    dead: Bool[Tensor, " d_sae"],
    k_aux: int,
    part: Whole = WHOLE,
) -> Float[Tensor, ""]:
    """Mean over the batch of ||Gamma (e - e_hat)||^2, e the residual x - x_hat as a constant, e_hat = z_dead W_dec.

    z_dead are the ReLU'd k_aux largest pre-activations among dead latents (Gao et al. 2025, A.2), without b_dec
    since e has none. The gradient reaches encoder and decoder of those latents. 0 when none is dead.
    """
    candidates = dead.nonzero()[:, 0]
    with torch.no_grad():
        chosen = part.choose_dead(forward.pre.index_select(1, candidates), k_aux)
    if chosen is None:
        return residual.new_zeros(())
    chosen = chosen._replace(indices=candidates[chosen.indices])
    e_hat = revived(sae, forward, chosen, part)
    return weighted_reconstruction_loss(residual.detach(), e_hat, sae.gamma, part.batch)
