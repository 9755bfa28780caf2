"""One training step of a member, by whatever computes it fastest here."""

import logging
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from wsae.core.errors import UserError
from wsae.losses.reconstruction import auxk_loss, weighted_reconstruction_loss
from wsae.ops import SparseCode
from wsae.ops.native import why_not
from wsae.ops.native.select import LARGEST_SHARE
from wsae.sae.config import JumpReLU, ReLU
from wsae.sae.forward import Forward, training_forward
from wsae.sae.model import SparseAutoencoder
from wsae.sae.stack import Stack
from wsae.train.config import TrainConfig
from wsae.train.family import Family
from wsae.train.gpu.fit import unfit
from wsae.train.native.state import leave
from wsae.train.native.step import native_step
from wsae.train.state import (
    GAMMA_EVERY,
    Batch,
    MemberState,
    StepResult,
    add_sums,
    count,
    follow_latents,
    refresh_gamma,
)

# One step by autograd: the specification of every faster one.


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


def remove_radial_gradient(sae: SparseAutoencoder | Stack) -> None:
    """Drop the part of the decoder's gradient along each row: the rows are kept at unit norm."""
    grad = sae.W_dec.grad
    if sae.cfg.tied or grad is None:
        return
    along = torch.linalg.vecdot(grad, sae.W_dec, dim=-1)
    grad.addcmul_(sae.W_dec, along[..., None], value=-1)


def unit_rows_(sae: SparseAutoencoder | Stack) -> None:
    """Bring the decoder's rows back to unit norm (untied)."""
    if not sae.cfg.tied:
        norms = torch.linalg.vector_norm(sae.W_dec, dim=-1, keepdim=True)
        sae.W_dec.div_(norms.clamp_min_(1e-12))


# The learning rate as a function of the step: nothing to save, nothing to get out of step.


def lr_factor(step: int, steps: int, warmup: float, decay: float) -> float:
    """Return the share of the peak learning rate at `step` of `steps`.

    Linear from 0 over the first `warmup` share of the steps, then 1, then linear to 0 over the last `decay` share.
    """
    rise = min(1.0, (step + 1) / max(1.0, warmup * steps))
    fall = min(1.0, (steps - step) / max(1.0, decay * steps))
    return min(rise, fall)


def warmup_cosine(step: int, steps: int, warmup: int, start: float, peak: float) -> float:
    """Return the learning rate at `step` of `steps`.

    Linear from `start` to `peak` over the first `warmup` steps, then along a cosine to 0.
    """
    if step < warmup:
        return start + step * (peak - start) / max(1, warmup - 1)
    return 0.5 * peak * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


FEW, LOOK_EVERY = 0.03, 50
"""A ReLU or JumpReLU member takes the compiled step while less than this share of all latents is active, decided every
so many steps: a code that is not sparse gains nothing from sparse gradients."""
_log = logging.getLogger("wsae")
_told: set[str] = set()


def train_step(member: MemberState, batch: Batch, step: int, run: TrainConfig) -> None:
    """One optimiser step; metrics are summed into the member. Raises UserError where `kernels` cannot be had."""
    rate = member.cfg.learning_rate(member.sae.cfg.d_in)
    rate *= lr_factor(step, run.steps, run.warmup, run.decay)
    varies = isinstance(member.sae.cfg.activation, ReLU | JumpReLU)
    kernels = chosen(member, run, batch.x)
    if kernels == "eager" or (varies and not bool(member.sparse)):
        leave(member)
        code = eager_step(member, batch, rate, run, step)
    elif kernels == "native":
        code = native_step(member, batch, rate, run, step)
    else:
        from wsae.train.gpu.step import triton_step  # there may be no Triton

        # Triton launches on the current device, whichever the tensors are on
        with torch.cuda.device_of(batch.x):
            code = triton_step(member, batch, rate, run, step)
    if (step + 1) % GAMMA_EVERY == 0:
        member.dead = member.since_fired > run.dead_tokens
    if (step + 1) % LOOK_EVERY == 0 and varies:
        member.sparse = torch.tensor(_share(code, member.sae.cfg.d_sae) < FEW)


def chosen(member: MemberState, run: TrainConfig, x: Tensor) -> str:
    """Return what trains this member; tells once why not the fast kernels, or raises UserError where they must."""
    wanted = run.kernels
    if wanted == "auto":
        wanted = "native" if x.device.type == "cpu" else "triton"
    if wanted == "eager":
        return wanted
    reason = _unfit_native(member, x) if wanted == "native" else unfit(member, run)
    if reason is None:
        return wanted
    if run.kernels != "auto":
        raise UserError(
            f"kernels '{wanted}' cannot train {member.name}: {reason}; use auto or eager"
        )
    if reason not in _told:
        _told.add(reason)
        _log.warning("training %s with PyTorch's own kernels: %s", member.name, reason)
    return "eager"


def _unfit_native(member: MemberState, x: Tensor) -> str | None:
    cfg = member.sae.cfg
    k = getattr(cfg.activation, "k", 1)
    if x.device.type != "cpu":
        return f"the compiled kernels are for the CPU, not {x.device.type}"
    if x.dtype != torch.float32:
        return f"the compiled kernels take float32, not {str(x.dtype).removeprefix('torch.')}"
    if k * LARGEST_SHARE > cfg.d_sae and cfg.d_sae > LARGEST_SHARE:
        return f"k = {k} of {cfg.d_sae} latents is not sparse (more than one in {LARGEST_SHARE})"
    return why_not()


def _share(code: SparseCode, d_sae: int) -> float:
    """Return the share of all latents that are active."""
    return float(torch.count_nonzero(code.values)) / max(1, code.batch * d_sae)


# Members of a family on a CPU's cores: compiled members train side by side, a thread each, others
# in turn.
#
# Two members on two threads finish sooner side by side, on one thread each, than in turn on both:
# no core waits for another inside a step. Results do not change: the compiled kernels give the same
# bits for any number of threads.

Steps = Callable[[list[MemberState], Batch, int], None]


@contextmanager
def side_by_side(cfg: TrainConfig, family: Family) -> Iterator[Steps]:
    """Yield what takes one step of every member of a hook."""
    threads = torch.get_num_threads()
    together = min(threads, max(len(members) for members in family.members.values()))
    if together < 2 or not all(_compiled(member, cfg) for _, member in family.all()):
        yield lambda members, batch, step: _in_turn(members, batch, step, cfg)
        return
    pool = ThreadPoolExecutor(
        together, "wsae-member", initializer=torch.set_num_threads, initargs=(threads // together,)
    )
    try:

        def together_now(members: list[MemberState], batch: Batch, step: int) -> None:
            list(pool.map(lambda member: train_step(member, batch, step, cfg), members))

        yield together_now
    finally:
        pool.shutdown(cancel_futures=True)


def _compiled(member: MemberState, cfg: TrainConfig) -> bool:
    """Return whether every step of this member will be the compiled one (ReLU kinds change over on the way)."""
    return hasattr(member.cfg.activation, "k") and chosen(member, cfg, member.mean) == "native"


def _in_turn(members: list[MemberState], batch: Batch, step: int, cfg: TrainConfig) -> None:
    for member in members:
        train_step(member, batch, step, cfg)
