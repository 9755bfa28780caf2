"""One training step of a member, by whatever computes it fastest here, and how gradients move its parameters.

Of codes that are not sparse (yet), with G = dL/dx_hat, a few rows at a time so that no [batch, d_sae] array exists:
    dz = G W_dec^T      dpre = dz dz/dpre, and what penalties add: by autograd
    dW_dec = z^T G      dW_enc = dpre^T (x - b_dec)      db_enc = sum dpre      db_dec = sum G - db_enc W_enc
Five products of [batch, d_sae, d_in]; by autograd alone the gradient of x - b_dec would be a sixth.
"""

import functools
import logging
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from wsae.core.errors import UserError
from wsae.kernels.eager import CodeSums, SparseCode
from wsae.kernels.native.build import kernel_threads, why_not
from wsae.kernels.native.select import LARGEST_SHARE
from wsae.kernels.triton.support import unsupported
from wsae.sae.architectures import Above, Every, PerGroup, PerRow
from wsae.sae.forward import (
    WHOLE,
    Coded,
    Forward,
    Price,
    Stack,
    also_loss,
    auxk_loss,
    dead_by_level,
    keep_positive_,
    penalty,
    pre_act_loss,
    product,
    thresholds,
    training_forward,
    weigh,
    weighted_reconstruction_loss,
)
from wsae.sae.model import SAE
from wsae.train.config import TrainConfig
from wsae.train.family import FamilyState
from wsae.train.native import leave, native_step
from wsae.train.state import (
    GAMMA_EVERY,
    Batch,
    MemberState,
    StepResult,
    anneal,
    at_own_pace,
    gradient_scale,
    hold_l0,
    note_gradient,
    price_at,
    record,
    start_thresholds,
    threshold_pace,
)

ROWS = 256
"""Rows whose codes exist at a time."""
SHARED = ("b_dec", "W_skip")
"""The parameters that are not a latent's own."""


def remove_radial_gradient(sae: SAE | Stack) -> None:
    """Drop the part of the decoder's gradient along each row: the rows are kept at unit norm."""
    grad = sae.W_dec.grad
    if sae.cfg.tied or grad is None:
        return
    along = torch.linalg.vecdot(grad, sae.W_dec, dim=-1)
    grad.addcmul_(sae.W_dec, along[..., None], value=-1)


def unit_rows_(sae: SAE | Stack) -> None:
    """Bring the decoder's rows back to unit norm (untied)."""
    if not sae.cfg.tied:
        norms = torch.linalg.vector_norm(sae.W_dec, dim=-1, keepdim=True)
        sae.W_dec.div_(norms.clamp_min_(1e-12))


@torch.no_grad()
def move_(member: MemberState, rate: float, run: TrainConfig, step: int) -> None:
    """Let the optimiser take its step at this learning rate, and keep what is kept: unit rows, positive thresholds."""
    sae = member.sae
    member.optimizer.lr = rate
    remove_radial_gradient(sae)
    squares = _limit_gradient(member, run)
    with at_own_pace(thresholds(sae), threshold_pace(member.cfg, sae.cfg.d_in, run.steps)):
        member.optimizer.step()
    unit_rows_(sae)
    keep_positive_(sae)
    note_gradient(member, run, step, *squares)


def _limit_gradient(
    member: MemberState, run: TrainConfig
) -> tuple[Float64[Tensor, ""], Float64[Tensor, ""]]:
    """Scale all gradients as `gradient_scale` says; returns the sums of squares that they had.

    First that of the parameters of which each latent has its own.
    """
    of_all, of_latents = [member.mean.new_zeros((), dtype=torch.float64) for _ in range(2)]
    if (scale := gradient_scale(member, run)) is None:
        return of_latents, of_all
    for name, parameter in member.sae.named_parameters():
        if parameter.grad is not None:
            total = of_all if name in SHARED else of_latents
            total += parameter.grad.double().square().sum()
            parameter.grad.mul_(scale)
    return of_latents, of_all


def fits(member: MemberState) -> bool:
    """Return whether `dense_step` has all that a member's next step needs."""
    cfg = member.cfg
    revives = (cfg.auxk or cfg.pre_act) and bool(member.dead.any())
    return member.part is WHOLE and cfg.p_end is None and not revives


@dataclass
class _Sums:
    """What the rows so far gave: gradients (in the parameters), losses, and what became of each latent."""

    sae: SAE
    fired: Int64[Tensor, " d_sae"]
    moments: Float64[Tensor, "2 d_sae"] | None
    grads: dict[str, Tensor] = field(default_factory=dict)
    """Of the kind's own parameters and `norms`, and dL/dpre under `pre`; over the rows."""
    errors: list[Tensor] = field(default_factory=list)
    losses: dict[str, Tensor] = field(default_factory=dict)

    def add(self, kind: dict[str, Tensor], name: str, value: Tensor) -> None:
        """Add to a sum."""
        kind[name] = kind[name] + value if name in kind else value

    def product(self, parameter: Tensor, left: Tensor, right: Tensor, begins: bool) -> None:
        """Add left^T right to a parameter's gradient, or let it be that."""
        if parameter.grad is None:
            parameter.grad = torch.empty_like(parameter)
        torch.addmm(parameter.grad, left.T, right, beta=not begins, out=parameter.grad)

    def note(self, z: Float[Tensor, "rows d_sae"]) -> None:
        """Take notice of which latents fired."""
        self.fired += torch.count_nonzero(z, dim=0)
        if self.moments is not None:
            exact = z.double()
            self.moments += torch.stack([exact.sum(0), exact.square().sum(0)])


class _Piece(NamedTuple):
    """Some rows of a batch."""

    x: Float[Tensor, "rows d_in"]
    target: Float[Tensor, "rows d_out"]
    batch: int
    """How many there are in all."""
    begins: bool
    """Whether they are the first."""


@torch.no_grad()
def dense_step(
    member: MemberState, batch: Batch, rate: float, run: TrainConfig, step: int
) -> CodeSums:
    """Take the step of `wsae.train.step.eager_step`, up to the order of sums, for a kind that may be all active."""
    sae, n = member.sae, len(batch.x)
    d_sae, price = len(member.dead), price_at(member, run, step)
    varies = member.cfg.gamma.rule == "latent_variance"
    none = torch.zeros(2, d_sae, dtype=torch.float64) if varies else None
    sums = _Sums(sae, torch.zeros(d_sae, dtype=torch.int64), none)
    norms = sae.W_dec.norm(dim=1) if sae.cfg.tied else None
    for first in range(0, n, ROWS):
        part = slice(first, first + ROWS)
        rows = _Piece(batch.x[part], batch.target[part], n, first == 0)
        _add_rows(sums, member, rows, norms, price, run.dtype == "bfloat16")
    _set_gradients(sums, norms)
    move_(member, rate, run, step)
    losses = sums.losses
    reconstruction, zero = losses["reconstruction"], losses["reconstruction"].new_zeros(())
    whole = reconstruction + losses.get("gate", zero) + losses["penalty"]
    error = torch.cat(sums.errors) if sums.errors else None
    code = CodeSums(n, sums.fired, sums.moments)
    result = StepResult(code, whole, reconstruction, zero, losses["sse"], error)
    record(member, batch, result, step, run)
    return code


def _add_rows(
    sums: _Sums,
    member: MemberState,
    rows: _Piece,
    norms: Tensor | None,
    price: Price,
    bf16: bool,
) -> None:
    sae, arch = sums.sae, sums.sae.arch
    centred = sae.centre(rows.x)
    with torch.enable_grad():
        leaves = {n: t.detach().requires_grad_() for n, t in sae.own.items() if t.ndim}
        pre = product(sae, centred, bf16).to(rows.x.dtype).requires_grad_()
        leaves |= {"pre": pre} if norms is None else {"pre": pre, "norms": norms.requires_grad_()}
        own = {n: leaves.get(n, t.detach()) for n, t in sae.own.items()}
        entries = Coded.of(arch, sae.cfg.activation, pre, own, leaves.get("norms"))
        cost = penalty(entries, price, rows.batch)
        gate = None if arch.gate is None else arch.gate(pre)
    z = entries.z.detach()
    sums.note(z)
    error, G = _residual(sums, "reconstruction", z, rows)
    sums.add(sums.losses, "sse", error.square().sum())
    sums.add(sums.losses, "penalty", cost.detach())
    outputs, slopes = [entries.z], [G @ sae.W_dec.T]
    if gate is not None:
        outputs.append(gate)
        slopes.append(_residual(sums, "gate", gate.detach(), rows)[1] @ sae.W_dec.T)
    if cost.requires_grad:
        outputs.append(cost)
        slopes.append(torch.ones_like(cost))
    found = torch.autograd.grad(outputs, list(leaves.values()), slopes, materialize_grads=True)
    slope = dict(zip(leaves, found, strict=True))
    dpre = slope["pre"]
    sums.product(sae.W_dec, z, G, rows.begins)
    sums.product(sae.encoder_rows, dpre, centred, rows.begins and not sae.cfg.tied)
    if sae.W_skip is not None:
        sums.product(sae.W_skip, G, rows.x, rows.begins)
    for name, value in {**slope, "pre": dpre.sum(0), "total": G.sum(0)}.items():
        sums.add(sums.grads, name, value)
    if member.back is not None:
        sums.errors.append(error)


def _residual(
    sums: _Sums, name: str, z: Float[Tensor, "rows d_sae"], rows: _Piece
) -> tuple[Float[Tensor, "rows d_out"], Float[Tensor, "rows d_out"]]:
    """Return x_hat - x and dL/dx_hat of a code, and add to its loss."""
    sae = sums.sae
    error = sae.completed(z @ sae.W_dec, rows.x).sub_(rows.target)
    weighted = weigh(error, sae.gamma)
    sums.add(sums.losses, name, weighted.square().sum() / rows.batch)
    G = weighted * sae.gamma if sae.gamma.ndim == 1 else weighted @ sae.gamma
    return error, G.mul_(2 / rows.batch)


def _set_gradients(sums: _Sums, norms: Tensor | None) -> None:
    """Give the vectors among the parameters their gradients, and a tied decoder's rows what norms have."""
    sae, grads = sums.sae, sums.grads
    through, total = grads.pop("pre"), grads.pop("total")
    of_norms = grads.pop("norms", None)
    if norms is not None and of_norms is not None and sae.W_dec.grad is not None:
        sae.W_dec.grad.addcmul_(sae.W_dec, (of_norms / norms.clamp_min(1e-12))[:, None])
    if sae.b_enc is not None:
        grads["b_enc"] = grads["b_enc"] + through if "b_enc" in grads else through
    if sae.b_dec is not None:
        grads["b_dec"] = total if sae.b_in is None else total - through @ sae.encoder_rows
    for name, parameter in sae.named_parameters():
        if name in grads:
            parameter.grad = grads[name].to(parameter)


# One step of a member, and which code takes it.


def eager_step(
    member: MemberState, batch: Batch, rate: float, run: TrainConfig, step: int
) -> SparseCode:
    """One optimiser step by autograd, the specification of the faster ones, at learning rate `rate`; returns the code.

    Nothing is read back from a GPU.
    """
    forward = training_forward(member.sae, batch.x, run.dtype == "bfloat16", member.part)
    return descend(member, batch, forward, None, rate, run, step)


def descend(
    member: MemberState,
    batch: Batch,
    forward: Forward,
    aim: Float[Tensor, ""] | None,
    rate: float,
    run: TrainConfig,
    step: int,
) -> SparseCode:
    """Take the step of a training forward pass: its loss, penalties and revival included, update and record.

    `aim`, in its own unit, takes the place of the weighted reconstruction loss.
    """
    sae, cfg, part, target = member.sae, member.cfg, member.part, batch.target
    reconstruction = weighted_reconstruction_loss(target, forward.x_hat, sae.gamma, part.batch)
    revival = revival_loss(member, target, forward)
    fit = reconstruction if aim is None else aim
    fit = fit + also_loss(target, forward, sae.gamma, part.batch) + cfg.auxk * revival
    cost, rows = price_at(member, run, step), part.batch or len(target)
    price = penalty(forward.entries, cost, rows, part)
    if cost.pre_act:
        price = price + cost.pre_act * pre_act_loss(forward.entries, member.dead, rows)
    loss = fit + price
    for parameter in member.optimizer.parameters:
        parameter.grad = None
    loss.backward()
    part.settle()
    move_(member, rate, run, step)
    with torch.no_grad():
        x_hat = forward.x_hat.detach()
        sse = F.mse_loss(x_hat, target, reduction="sum")
        error = None if member.back is None else x_hat - target
        whole = part.once(fit.detach()) + price
        if aim is not None:  # alone, in its own unit: the record multiplies by the scale
            whole = aim.detach() / member.scale**2
        losses = (whole, reconstruction.detach(), revival.detach())
        record(member, batch, StepResult(forward.code, *losses, sse, error), step, run)
        anneal(member, forward.entries, run, step)
    return forward.code


def revival_loss(
    member: MemberState, target: Float[Tensor, "batch d_out"], forward: Forward
) -> Float[Tensor, ""]:
    """Return the loss by which dead latents model the residual; 0 where the member has no revival."""
    if member.cfg.auxk == 0:
        return target.new_zeros(())
    k_aux, dead, part = member.cfg.revived(target.shape[1]), member.dead, member.part
    nested = part.nested(member.sae)
    if nested is None or not nested.level_auxk:
        residual = target - forward.x_hat.detach()
        return auxk_loss(member.sae, residual, forward, dead, k_aux, part)
    x_hats = [*(also.x_hat for also in forward.also), forward.x_hat]
    losses = [
        auxk_loss(member.sae, target - x_hat.detach(), forward, of_level, k_aux, part)
        for x_hat, of_level in zip(x_hats, dead_by_level(nested, dead), strict=True)
    ]
    return torch.stack(losses).sum()


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


FEW, FEW_ON_GPU, LOOK_EVERY = 0.1, 0.03, 50
"""A ReLU or JumpReLU member takes the step of sparse sums while less than this share of all latents is active, decided
every so many steps. On a CPU both take the same time at one in six (576 -> 4,608); on a GPU nobody looked."""
_log = logging.getLogger("wsae")
_told: set[str] = set()


def train_step(member: MemberState, batch: Batch, step: int, run: TrainConfig) -> None:
    """One optimiser step; metrics are summed into the member. Raises UserError where `kernels` cannot be had."""
    rate = member.cfg.learning_rate(member.sae.cfg.d_in)
    rate *= lr_factor(step, run.steps, run.warmup, run.decay)
    varies = isinstance(member.sae.choice, Above)
    kernels = chosen(member, run, batch.x)
    few = FEW_ON_GPU if kernels == "triton" else FEW
    if step == 0:
        look(member, batch)
        if (wanted := member.cfg.target_l0) is not None:
            member.sparse = torch.tensor(wanted < few * (member.part.d_sae or len(member.dead)))
    dense = varies and not bool(member.sparse)
    if kernels == "eager" or dense:
        leave(member)
        by_hand = dense and kernels == "native" and fits(member)
        code = (dense_step if by_hand else eager_step)(member, batch, rate, run, step)
    elif kernels == "native":
        code = native_step(member, batch, rate, run, step)
    else:
        from wsae.train.gpu import triton_step  # there may be no Triton

        # Triton launches on the current device, whichever the tensors are on
        with torch.cuda.device_of(batch.x):
            code = triton_step(member, batch, rate, run, step)
    after_step(member, code, step, run)
    if (step + 1) % LOOK_EVERY == 0 and varies:
        entries = torch.tensor([code.batch * len(member.dead), 0], device=batch.x.device)
        entries[1] = code.active()
        entries = member.part.over_latents(member.part.over_rows(entries)).tolist()
        member.sparse = torch.tensor(entries[1] < few * entries[0])


def look(member: MemberState, batch: Batch) -> None:
    """Start what a new member has from its first batch: thresholds for a target L0, a transcoder's decoder."""
    if member.cfg.target_l0 is not None:
        start_thresholds(member, batch.x)
    if member.sae.cfg.transcoder:
        start_decoder(member, batch)


LEAST_SCALE = 0.1
"""By which the encoder of a transcoder is multiplied at least at its start, however little its first batch says."""


@torch.no_grad()
def start_decoder(member: MemberState, batch: Batch) -> None:
    """Give a new transcoder's decoder its directions and its encoder the scale of least squares, from the first batch.

    With e = y - b_dec: W_dec[j] = g_j / |g_j| with g_j = sum_b z_bj e_b, and the encoder is multiplied by
    s = sum_b <y_b, e_b> / sum_b |z_b W_dec|^2, y_b what z_b makes of directions to which its own row adds nothing (else
    a latent that is active once would seem to be always right), unless `encoder_scale` is set. (Adam would give the
    rows the signs of their first gradient alone.) A decoder that something has moved already stays.
    """
    sae, part = member.sae, member.part
    if bool(sae.W_dec.any()):
        return
    forward = training_forward(sae, batch.x, part=part)
    z, error = forward.code.dense(len(sae.W_dec)), batch.target - forward.x_hat
    sums = part.over_rows(z.T @ error)
    sae.W_dec.copy_(sums)
    unit_rows_(sae)
    if member.cfg.encoder_scale is not None:
        return
    made = part.summed(z @ sae.W_dec)
    lengths = torch.linalg.vector_norm(sums, dim=1)
    share = torch.where(lengths > 0, 1 / lengths, 0.0)
    own = part.over_latents((z.square() @ share) @ error.square().sum(1))
    found = torch.stack([(made * error).sum() - own, made.square().sum()])
    along, size = part.over_rows(found).tolist()
    scale = max(LEAST_SCALE, along / size) if size else 1.0
    powers = {name: parameter.power for name, parameter in sae.arch.parameters.items()}
    for name, power in {"W_enc_t": 1, "b_enc": 1, **powers}.items():
        getattr(sae, name).mul_(scale**power)


def after_step(
    member: MemberState, code: SparseCode | CodeSums, step: int, run: TrainConfig
) -> None:
    """Hold the number of active latents where that is asked for, and say now and then which are dead."""
    if member.cfg.target_l0 is not None:
        hold_l0(member, code, lr_factor(step, run.steps, run.warmup, run.decay))
    if (step + 1) % GAMMA_EVERY == 0:
        member.dead = member.since_fired > run.dead_tokens
        member.part.note_dead(member.dead)


def chosen(member: MemberState, run: TrainConfig, x: Tensor) -> str:
    """Return what trains this member; tells once why not the fast kernels, or raises UserError where they must."""
    wanted = run.kernels
    if wanted == "auto":
        wanted = "native" if x.device.type == "cpu" else "triton"
    if wanted == "eager":
        return wanted
    reason = unfit_native(member, x) if wanted == "native" else unfit_triton(member, run)
    if reason is None:
        return wanted
    if run.kernels != "auto":
        raise UserError(
            f"kernels '{wanted}' cannot train {member.name}: {reason}; use auto or eager"
        )
    if reason not in _told and member.part.leads:
        _told.add(reason)
        _log.warning("training %s with PyTorch's own kernels: %s", member.name, reason)
    return "eager"


def unfit_native(member: MemberState, x: Tensor) -> str | None:
    """Return why the compiled kernels cannot train this member here, or None if they can."""
    cfg, choice = member.sae.cfg, member.sae.choice
    k, d_sae = getattr(choice, "k", 1), cfg.d_sae
    if isinstance(choice, PerGroup) and member.part.d_sae:  # of groups some are elsewhere
        d_sae = member.part.d_sae
    if x.device.type != "cpu":
        return f"the compiled kernels are for the CPU, not {x.device.type}"
    if member.part.unfit:
        return member.part.unfit
    if x.dtype != torch.float32:
        return f"the compiled kernels take float32, not {str(x.dtype).removeprefix('torch.')}"
    if k * LARGEST_SHARE > d_sae and d_sae > LARGEST_SHARE:
        return f"k = {k} of {d_sae} latents is not sparse (more than one in {LARGEST_SHARE})"
    return _unfit_pairs(member) or why_not()


def _unfit_pairs(member: MemberState) -> str | None:
    """Return why no kernel that follows chosen pairs alone can train a member."""
    if isinstance(member.sae.choice, Every):
        kind = member.sae.arch.kind
        return f"the kind {kind} does not say which latents may be active"
    if not member.cfg.pre_act:
        return None
    return "the pre-activation loss has a gradient at every row of each dead latent, chosen or not"


def unfit_triton(member: MemberState, run: TrainConfig) -> str | None:
    """Return why the Triton kernels cannot train this member here, or None if they can. Imports no Triton."""
    sae, choice, part = member.sae, member.sae.choice, member.part
    if part.unfit or part.d_sae not in (0, sae.cfg.d_sae):
        return part.unfit or "its latents lie on several processes"
    # batch Top-k compares with a threshold: its k bounds nothing
    k = choice.k if isinstance(choice, PerRow | PerGroup) else None
    dtype = torch.bfloat16 if run.dtype == "bfloat16" else torch.float32
    asked = (dtype, k, isinstance(choice, PerGroup))
    reasons = (unsupported(W.detach(), *asked) for W in (sae.W_dec, sae.encoder_rows))
    return _unfit_pairs(member) or next(filter(None, reasons), None) or _fails(sae.device)


@functools.cache
def _fails(device: torch.device) -> str | None:
    """Try one small kernel: Triton needs a C compiler and a driver that fits, and finds out when it launches."""
    try:
        from wsae.kernels.eager import AdamStep
        from wsae.kernels.triton.update import adam_rows_

        W, grad, m, v = torch.zeros(4, 1, 1, dtype=torch.float32, device=device)
        with torch.cuda.device(device):
            adam_rows_(W, grad, m, v, AdamStep(0.0, 1), unit=False)
            torch.cuda.synchronize()
    except Exception as error:  # whatever stops it, the caller says why
        first = str(error).strip().partition("\n")[0]
        return f"triton does not work here ({type(error).__name__}: {first})"
    return None


Steps = Callable[[list[MemberState], list[Batch], int], None]


class Crew:
    """How many threads the compiled kernels use: fewer where they are faster, as beside other programs.

    Threads wait for one another several times a step, so one that another program holds up holds up all. Now and then
    the double or half of the number at hand is tried for a few steps, and the faster one kept; the longer nothing
    changes, the rarer. The kernels give the same bits for any number.
    """

    TRIAL, SOON, LATE = 4, 16, 512
    """Steps of a trial, the first of which does not count; steps between trials at first, and at most."""

    def __init__(self, most: int) -> None:
        self.threads, self._most = most, most
        self._wait, self._up = self.SOON, False
        self._times: list[float] = []
        self._former, self._before = most, 0.0
        """The number before the trial that is under way, and what a step took with it; 0 without a trial."""

    def note(self, seconds: float) -> None:
        """Take notice of a step's time, and change the number for the next one where it is due."""
        self._times.append(seconds)
        if len(self._times) < (self.TRIAL if self._before else self._wait):
            return
        mean = sum(self._times[1 - self.TRIAL :]) / (self.TRIAL - 1)
        self._times.clear()
        if not self._before:
            tried = min(2 * self.threads, self._most) if self._up else max(1, self.threads // 2)
            self._up = not self._up
            if tried != self.threads:
                self._former, self._before, self.threads = self.threads, mean, tried
        else:
            better = mean < self._before
            self._wait = self.SOON if better else min(2 * self._wait, self.LATE)
            self.threads = self.threads if better else self._former
            self._before = 0.0


@contextmanager
def side_by_side(cfg: TrainConfig, family: FamilyState) -> Iterator[Steps]:
    """Yield what takes one step of every member of a hook on its batch: compiled ones a thread each, others in turn.

    Two members on two threads finish sooner side by side, on one thread each, than in turn on both: no core waits for
    another inside a step. The compiled kernels give the same bits for any number of threads.
    """
    threads = torch.get_num_threads()
    together = min(threads, max((len(members) for members in family.members.values()), default=0))
    native = threads > 1 and [
        hasattr(member.cfg.activation, "k") and chosen(member, cfg, member.mean) == "native"
        for _, member in family.all()
        if member.part is WHOLE
    ]
    crew, spent = Crew(threads), list[float]()

    def in_turn(members: list[MemberState], batches: list[Batch], step: int) -> None:
        for member, batch in zip(members, batches, strict=True):
            train_step(member, batch, step, cfg)

    def by_crew(members: list[MemberState], batches: list[Batch], step: int) -> None:
        begin = time.perf_counter()
        with kernel_threads(crew.threads):
            in_turn(members, batches, step)
        spent.append(time.perf_counter() - begin)
        if len(spent) == len(family.members):  # every hook's
            crew.note(sum(spent))
            spent.clear()

    if not native or not all(native):  # ReLU kinds change over to the compiled step on the way
        yield in_turn
        return
    if together < 2:
        yield by_crew
        return
    pool = ThreadPoolExecutor(
        together, "wsae-member", initializer=torch.set_num_threads, initargs=(threads // together,)
    )
    try:

        def together_now(members: list[MemberState], batches: list[Batch], step: int) -> None:
            list(pool.map(lambda m, batch: train_step(m, batch, step, cfg), members, batches))

        yield together_now
    finally:
        pool.shutdown(cancel_futures=True)
