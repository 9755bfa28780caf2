"""One step by autograd: the specification of every faster one."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from wsae.losses.reconstruction import auxk_loss, weighted_reconstruction_loss
from wsae.ops import SparseCode
from wsae.sae.forward import Forward, training_forward
from wsae.sae.model import SparseAutoencoder
from wsae.train.config import TrainConfig
from wsae.train.counters import StepResult, add_sums, count, follow_latents, refresh_gamma
from wsae.train.state import Batch, MemberState


def eager_step(
    member: MemberState, batch: Batch, rate: float, run: TrainConfig, step: int
) -> SparseCode:
    """One optimiser step at learning rate `rate`; returns the code. Nothing is read back from a GPU."""
    sae, cfg, x = member.sae, member.cfg, batch.x
    forward = training_forward(sae, x, bf16=run.dtype == "bfloat16")
    reconstruction = weighted_reconstruction_loss(x, forward.x_hat, sae.gamma)
    revival = revival_loss(member, x, forward)
    loss = reconstruction + cfg.auxk * revival + cfg.l1 * forward.l1 + cfg.l0 * forward.l0
    member.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    for group in member.optimizer.param_groups:
        group["lr"] = rate
    with torch.no_grad():
        remove_radial_gradient(sae)
        member.optimizer.step()
        unit_rows_(sae)
        count(member, forward.code, len(x))
        sse = F.mse_loss(forward.x_hat.detach(), x, reduction="sum")
        losses = (loss.detach(), reconstruction.detach(), revival.detach())
        add_sums(member, batch, StepResult(forward.code, *losses, sse))
        if follow_latents(member, forward.code, step, run.latent_variance_decay):
            refresh_gamma(member, sae.W_dec, step, run.latent_variance_decay)
    return forward.code


def revival_loss(
    member: MemberState, x: Float[Tensor, "batch d_in"], forward: Forward
) -> Float[Tensor, ""]:
    """Return the loss by which dead latents model the residual; 0 where the member has no revival."""
    if member.cfg.auxk == 0:
        return x.new_zeros(())
    residual = x - forward.x_hat.detach()
    return auxk_loss(member.sae, residual, forward, member.dead, member.cfg.revived(x.shape[1]))


def remove_radial_gradient(sae: SparseAutoencoder) -> None:
    """Drop the part of the decoder's gradient along each row: the rows are kept at unit norm."""
    grad = sae.W_dec.grad
    if sae.cfg.tied or grad is None:
        return
    along = torch.linalg.vecdot(grad, sae.W_dec, dim=1)
    grad.addcmul_(sae.W_dec, along[:, None], value=-1)


def unit_rows_(sae: SparseAutoencoder) -> None:
    """Bring the decoder's rows back to unit norm (untied)."""
    if not sae.cfg.tied:
        norms = torch.linalg.vector_norm(sae.W_dec, dim=1, keepdim=True)
        sae.W_dec.div_(norms.clamp_min_(1e-12))
