"""What the steps by hand-written gradients share, whatever sums over their pairs (row, active latent)."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from wsae.kernels import SparseCode
from wsae.sae.config import JumpReLU
from wsae.sae.model import SparseAutoencoder
from wsae.train.state import MemberState, StepResult


class ActivePairs(NamedTuple):
    """The pairs of a batch that carry values or gradients, in order of row."""

    pre: SparseCode
    """Pre-activations of the pairs."""
    z: Float[Tensor, " pairs"]
    passes: Float[Tensor, " pairs"]
    """dz / dpre: 1 where the latent is active, else 0."""

    @property
    def code(self) -> SparseCode:
        """The latents."""
        return SparseCode(self.z, self.pre.indices, self.pre.offsets)


class Losses(NamedTuple):
    """What a step's reconstruction came to."""

    reconstruction: Float[Tensor, ""]
    """Mean over the batch of ||Gamma e||^2."""
    sse: Float[Tensor, ""]
    """Sum over the batch of ||e||^2."""
    penalty: float | Float[Tensor, ""]
    """l1 * mean over the batch of sum_j z_j |W_dec[j]|, before the step."""
    error: Float[Tensor, "rows d_in"] | None = None
    """x_hat - x of the rows `looked_at`."""


def relu_pairs(pre: SparseCode) -> ActivePairs:
    """Apply ReLU to the pre-activations of chosen pairs."""
    return ActivePairs(pre, pre.values.relu(), (pre.values > 0).float())


def activate(sae: SparseAutoencoder, pre: SparseCode) -> ActivePairs:
    """Apply the SAE's activation function to the pre-activations of chosen pairs."""
    if sae.log_threshold is not None:
        on = (pre.values > sae.log_threshold.detach().exp()[pre.indices]).float()
        return ActivePairs(pre, pre.values * on, on)
    return relu_pairs(pre)


def threshold_slopes(
    member: MemberState, codes: ActivePairs, dz: Float[Tensor, " pairs"]
) -> Float[Tensor, " pairs"]:
    """Return each pair's part of the loss's gradient in the thresholds theta (`wsae.sae.forward`).

    -(dz theta + l0 / batch) rect((pre - theta) / width) / width, theta the latent's threshold. That in log theta is
    theta times as large.
    """
    sae, activation = member.sae, member.sae.cfg.activation
    assert sae.log_threshold is not None
    assert isinstance(activation, JumpReLU)
    pre = codes.pre
    here = sae.log_threshold.detach().exp()[pre.indices]
    near = ((pre.values - here).abs() < activation.bandwidth / 2) / activation.bandwidth
    return -(dz * here + member.cfg.l0 / pre.batch) * near


def step_result(
    member: MemberState, code: SparseCode, losses: Losses, revival: Float[Tensor, ""] | None
) -> StepResult:
    """Return the step's loss and its parts; `revival` is the mean of ||Gamma (e - e_hat)||^2, None without."""
    cfg, reconstruction = member.cfg, losses.reconstruction
    aux = reconstruction.new_zeros(()) if revival is None else revival
    loss = reconstruction + cfg.auxk * aux + losses.penalty
    if cfg.l0:
        loss = loss + cfg.l0 * torch.count_nonzero(code.values) / code.batch
    return StepResult(code, loss, reconstruction, aux, losses.sse, losses.error)
