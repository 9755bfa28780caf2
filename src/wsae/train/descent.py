"""How gradients move a member's parameters, and the step of codes that are not sparse (yet).

With G = dL/dx_hat, a few rows at a time so that no [batch, d_sae] array exists:
    dz = G W_dec^T      dpre = dz dz/dpre, and what penalties add: by autograd
    dW_dec = z^T G      dW_enc = dpre^T (x - b_dec)      db_enc = sum dpre      db_dec = sum G - db_enc W_enc
Five products of [batch, d_sae, d_in]; by autograd alone the gradient of x - b_dec would be a sixth.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from wsae.kernels.codes import CodeSums
from wsae.sae.forward import WHOLE, Coded, Stack, keep_positive_, product, thresholds
from wsae.sae.loss import Price, penalty, weigh
from wsae.sae.model import SAE
from wsae.train.config import TrainConfig
from wsae.train.penalty import at_own_pace, price_at, threshold_pace
from wsae.train.state import (
    Batch,
    MemberState,
    StepResult,
    gradient_scale,
    note_gradient,
    record,
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
