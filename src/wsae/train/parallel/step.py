"""One training step of a member whose rows or latents are shared out over ranks: `eager_step`, with its sums global."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from wsae.losses.gamma import gamma_from_proxy, latent_variance_proxy
from wsae.losses.reconstruction import weighted_reconstruction_loss
from wsae.ops import SparseCode
from wsae.sae.config import BatchTopK
from wsae.sae.forward import Forward
from wsae.train.config import TrainConfig
from wsae.train.counters import GAMMA_EVERY, THRESHOLD_DECAY, StepResult, add_sums
from wsae.train.eager import remove_radial_gradient, unit_rows_
from wsae.train.parallel.forward import shared_forward, shared_revival
from wsae.train.parallel.shard import Shard
from wsae.train.parallel.world import MAX, MIN
from wsae.train.schedule import lr_factor
from wsae.train.state import SUMS, Batch


def shared_step(shard: Shard, batch: Batch, step: int, run: TrainConfig) -> None:
    """One optimiser step on this rank's rows and latents; every sum over rows or latents is over all ranks.

    loss = (1 / batch) sum over all rows of (||Gamma e||^2 + auxk ||Gamma (e - e_hat)||^2) + l1 L1 + l0 L0.
    """
    member, x = shard.member, batch.x
    sae, cfg, share = member.sae, member.cfg, len(x) / run.batch_size
    forward = shared_forward(shard.piece, x, run.batch_size, run.dtype == "bfloat16")
    reconstruction = share * weighted_reconstruction_loss(x, forward.x_hat, sae.gamma)
    revival = share * _revival(shard, x, forward)
    penalty = cfg.l1 * forward.l1 + cfg.l0 * forward.l0
    loss = reconstruction + cfg.auxk * revival + penalty
    member.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    for work in shard.pending:
        work.wait()
    shard.pending.clear()
    rate = cfg.learning_rate(sae.cfg.d_in) * lr_factor(step, run.steps, run.warmup, run.decay)
    for group in member.optimizer.param_groups:
        group["lr"] = rate
    with torch.no_grad():
        remove_radial_gradient(sae)
        member.optimizer.step()
        unit_rows_(sae)
        _count(shard, forward.code, run.batch_size)
        sse = F.mse_loss(forward.x_hat.detach(), x, reduction="sum")
        # the loss's penalty is a part, all else of it is whole on every rank that shares the latents
        own = loss if shard.piece.place.latents.index == 0 else penalty + torch.zeros_like(loss)
        losses = (own.detach(), reconstruction.detach(), revival.detach())
        _add_sums(shard, batch, StepResult(forward.code, *losses, sse))
        _follow_latents(shard, forward.code, step, run)
        if (step + 1) % GAMMA_EVERY == 0:
            member.dead = member.since_fired > run.dead_tokens
            shard.count_dead()


def _revival(shard: Shard, x: Tensor, forward: Forward) -> Tensor:
    cfg = shard.member.cfg
    if cfg.auxk == 0:
        return x.new_zeros(())
    wanted = (cfg.revived(x.shape[1]), shard.dead)
    residual = x - forward.x_hat.detach()
    return shared_revival(shard.piece, residual, forward, shard.member.dead, wanted)


def _count(shard: Shard, code: SparseCode, batch: int) -> None:
    """Note which latents fired in any row and, for batch Top-k, move the threshold of inference."""
    member, place = shard.member, shard.piece.place
    fired = torch.zeros_like(member.dead, dtype=torch.uint8)
    fired[code.indices[code.values > 0]] = 1
    place.data.reduce_(fired, MAX)
    member.since_fired.add_(batch).masked_fill_(fired.bool(), 0)
    if isinstance(member.sae.cfg.activation, BatchTopK):
        positive = torch.where(code.values > 0, code.values, torch.inf)
        smallest = positive.min() if len(positive) else positive.new_tensor(torch.inf)
        place.reduce_(smallest, MIN)
        old = member.sae.threshold
        moved = torch.where(old == 0, smallest, torch.lerp(smallest.double(), old, THRESHOLD_DECAY))
        old.copy_(torch.where(smallest.isfinite(), moved, old))


def _add_sums(shard: Shard, batch: Batch, result: StepResult) -> None:
    """Add this step's sums over all ranks to the window; each is counted where it is a part, or once."""
    member, place = shard.member, shard.piece.place
    device = shard.window.device
    member.sums = {name: torch.zeros((), dtype=torch.float64, device=device) for name in SUMS}
    add_sums(member, batch, result)
    if place.latents.index > 0:
        for name in SUMS:
            if name not in ("loss", "l0"):
                member.sums[name].zero_()
    if not place.leads:
        member.sums["steps"].zero_()
    shard.window += place.reduce_(torch.stack([member.sums[name] for name in SUMS]))


def _follow_latents(shard: Shard, code: SparseCode, step: int, run: TrainConfig) -> None:
    """Keep the running variances of the latents for the rule latent_variance, and refresh gamma when due."""
    member, place, decay = shard.member, shard.piece.place, run.latent_variance_decay
    if member.cfg.gamma.rule != "latent_variance":
        return
    z, own = code.values.double(), len(member.dead)
    sums = torch.stack([torch.bincount(code.indices, w, minlength=own) for w in (z, z * z)])
    member.latent_moments.lerp_(place.data.reduce_(sums) / run.batch_size, 1 - decay)
    if (step + 1) % GAMMA_EVERY == 0:
        member.sae.gamma.copy_(gamma_from_proxy(member.cfg.gamma, _proxy(shard, step, decay)))


def _proxy(shard: Shard, step: int, decay: float) -> Float[Tensor, " d_in"]:
    """Return sum_j Var(z_j) W_dec[j]^2 over the latents of all ranks."""
    member = shard.member
    mean, square = member.latent_moments / (1 - decay ** (step + 1))
    variance = (square - mean * mean).clamp_min(0) * member.scale**2
    part = latent_variance_proxy(variance, member.sae.W_dec.double())
    return shard.piece.place.latents.reduce_(part)
