"""What the steps by hand-written gradients share, whatever sums over their pairs (row, active latent)."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from wsae.ops import SparseCode
from wsae.sae.config import JumpReLU
from wsae.sae.model import SparseAutoencoder
from wsae.train.counters import StepResult
from wsae.train.state import MemberState


class Codes(NamedTuple):
    """The pairs of a batch that carry values or gradients, in order of row."""

    pre: SparseCode
    """Pre-activations of the pairs."""
    z: Float[Tensor, " pairs"]
    passes: Float[Tensor, " pairs"]
    """dz / dpre: 1 where the latent is active, else 0."""


class Losses(NamedTuple):
    """What a step's reconstruction came to."""

    reconstruction: Float[Tensor, ""]
    """Mean over the batch of ||Gamma e||^2."""
    sse: Float[Tensor, ""]
    """Sum over the batch of ||e||^2."""
    penalty: float | Float[Tensor, ""]
    """l1 * mean over the batch of sum_j z_j |W_dec[j]|, before the step."""


def activate(sae: SparseAutoencoder, pre: SparseCode) -> Codes:
    """Apply the activation function to the pre-activations of chosen pairs."""
    if isinstance(sae.cfg.activation, JumpReLU):
        assert sae.log_threshold is not None
        on = (pre.values > sae.log_threshold.detach().exp()[pre.indices]).float()
        return Codes(pre, pre.values * on, on)
    return Codes(pre, pre.values.relu(), (pre.values > 0).float())


def threshold_slopes(
    member: MemberState, codes: Codes, dz: Float[Tensor, " pairs"]
) -> Float[Tensor, " pairs"] | None:
    """Return each pair's part of the loss's gradient in log theta (`wsae.sae.jumprelu`); None without thresholds.

    -(dz theta + l0 / batch) rect((pre - theta) / width) / width * theta, theta the latent's threshold.
    """
    sae, activation = member.sae, member.sae.cfg.activation
    if sae.log_threshold is None or not isinstance(activation, JumpReLU):
        return None
    pre = codes.pre
    here = sae.log_threshold.detach().exp()[pre.indices]
    near = ((pre.values - here).abs() < activation.bandwidth / 2) / activation.bandwidth
    return -(dz * here + member.cfg.l0 / pre.batch) * near * here


def step_result(
    member: MemberState, code: SparseCode, losses: Losses, revival: Float[Tensor, ""] | None
) -> StepResult:
    """Return the step's loss and its parts; `revival` is the mean of ||Gamma (e - e_hat)||^2, None without."""
    cfg, reconstruction = member.cfg, losses.reconstruction
    aux = reconstruction.new_zeros(()) if revival is None else revival
    loss = reconstruction + cfg.auxk * aux + losses.penalty
    if cfg.l0:
        loss = loss + cfg.l0 * torch.count_nonzero(code.values) / code.batch
    return StepResult(code, loss, reconstruction, aux, losses.sse)
