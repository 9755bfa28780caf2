"""One training step of a member, by whatever computes it fastest here."""

import logging

import torch
from torch import Tensor

from wsae.core.errors import UserError
from wsae.ops import SparseCode
from wsae.ops.native import why_not
from wsae.ops.native.select import LARGEST_SHARE
from wsae.sae.config import JumpReLU, ReLU
from wsae.train.config import TrainConfig
from wsae.train.counters import GAMMA_EVERY
from wsae.train.eager import eager_step
from wsae.train.gpu.fit import unfit
from wsae.train.native.state import leave
from wsae.train.native.step import native_step
from wsae.train.schedule import lr_factor
from wsae.train.state import Batch, MemberState

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
