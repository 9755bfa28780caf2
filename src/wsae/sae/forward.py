"""The training forward pass: x to x_hat through the chosen latents, with every quantity the losses need."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Num
from torch import Tensor
from torch.autograd import Function

from wsae.kernels import (
    Plan,
    SparseCode,
    code_from_dense,
    code_from_topk,
    decode,
    encode_at,
    offsets_of,
    select_batch_topk,
)
from wsae.sae.config import Activation, BatchTopK, GroupTopK, JumpReLU, ReLU, TopK
from wsae.sae.model import FIXED, SAE

# JumpReLU and its penalty's step function, with the threshold gradients of Rajamanoharan et al.
# 2024b.
#
# JumpReLU(z) = z H(z - theta) d/dtheta = -(theta / width) rect((z - theta) / width) step(z) = H(z -
# theta) d/dtheta = -(1 / width) rect((z - theta) / width) with rect(u) = 1 for |u| < 1/2, which
# integrates to 1, so the width scales no gradient on average.


def jumprelu(
    pre: Float[Tensor, "*members batch d_sae"],
    threshold: Float[Tensor, "*per d_sae"],
    bandwidth: float,
) -> Float[Tensor, "*members batch d_sae"]:
    """Return pre where it exceeds the threshold, else 0."""
    return _JumpReLU.apply(pre, threshold, bandwidth)


def step(
    pre: Float[Tensor, "*members batch d_sae"],
    threshold: Float[Tensor, "*per d_sae"],
    bandwidth: float,
) -> Float[Tensor, "*members batch d_sae"]:
    """Return 1 where pre exceeds the threshold, else 0 (their sum is L0)."""
    return _Step.apply(pre, threshold, bandwidth)


def _rectangle(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    return ((pre - threshold).abs() < bandwidth / 2).to(pre.dtype) / bandwidth


class _JumpReLU(Function):
    @staticmethod
    def forward(ctx, pre, threshold, bandwidth):
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx, *grads):
        pre, threshold = ctx.saved_tensors
        summands = grads[0] * _rectangle(pre, threshold, ctx.bandwidth)
        grad_threshold = -summands.sum_to_size(threshold.shape) * threshold
        return grads[0] * (pre > threshold), grad_threshold, None


class _Step(Function):
    @staticmethod
    def forward(ctx, pre, threshold, bandwidth):
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx, *grads):
        pre, threshold = ctx.saved_tensors
        summands = grads[0] * _rectangle(pre, threshold, ctx.bandwidth)
        grad_threshold = -summands.sum_to_size(threshold.shape)
        return torch.zeros_like(pre), grad_threshold, None


class Forward(NamedTuple):
    """One training forward pass; everything but `code` and `pre` carries gradients."""

    x_hat: Float[Tensor, "batch d_in"]
    l1: Float[Tensor, ""]
    """Mean over the batch of sum_j z_j ||W_dec[j]||."""
    l0: Float[Tensor, ""]
    """Mean number of active latents; differentiable (through the thresholds) for JumpReLU only."""
    code: SparseCode
    """The latents, detached."""
    pre: Float[Tensor, "batch d_sae"]
    """All pre-activations, detached, perhaps in bf16."""
    centred: Float[Tensor, "batch d_in"]
    """x - b_dec, detached."""


def dense_codes(
    activation: Activation,
    pre: Float[Tensor, "*members batch d_sae"],
    threshold: Float[Tensor, "*per d_sae"] | None,
) -> tuple[Float[Tensor, "*members batch d_sae"], Float[Tensor, "*members batch"]]:
    """Return z of a batch in training, and the active latents of each row (differentiable for JumpReLU only).

    The threshold is JumpReLU's; batch Top-k chooses from the batch at hand, as it does in training.
    """
    match activation:
        case JumpReLU(bandwidth=width):
            assert threshold is not None
            return jumprelu(pre, threshold, width), step(pre, threshold, width).sum(-1)
        case ReLU():
            z = pre.relu()
        case BatchTopK(k=k):
            flat = pre.flatten(-2)
            wanted = min(k * pre.shape[-2], flat.shape[-1])
            z = _kept(flat, flat.detach().topk(wanted, dim=-1, sorted=False).indices).view_as(pre)
        case TopK() | GroupTopK():
            z = _kept(pre, FIXED[type(activation)](pre.detach(), activation.k))
    return z, z.detach().count_nonzero(-1).to(pre.dtype)


def _kept(pre: Tensor, index: Tensor) -> Tensor:
    """Return ReLU(pre) at the last axis' positions `index`, 0 elsewhere."""
    return torch.zeros_like(pre).scatter(-1, index, pre.gather(-1, index).relu())


class Whole:
    """An SAE whose rows and latents are all here. `wsae.train.parallel.step.Shard` has them on several ranks."""

    batch: int = 0
    """Rows of the whole batch, where they are not all here."""
    unfit: str | None = None
    """Why the compiled kernels cannot train this part of an SAE."""
    leads: bool = True
    """Whether this part speaks for all."""

    def choose(self, sae: SAE, pre: Float[Tensor, "rows d_sae"]) -> SparseCode:
        """Return the pairs that a Top-k kind makes active, in order of row (their values are not read)."""
        activation = sae.cfg.activation
        assert isinstance(activation, TopK | GroupTopK | BatchTopK)
        if isinstance(activation, BatchTopK):
            rows, latents = select_batch_topk(pre, activation.k)
            return SparseCode(pre[rows, latents], latents, offsets_of(rows, len(pre)))
        indices = FIXED[type(activation)](pre, activation.k)
        return code_from_topk(pre.gather(1, indices), indices)

    def choose_dead(self, pre: Float[Tensor, "rows dead"], k: int) -> SparseCode | None:
        """Return the k largest of each row among the dead latents' pre-activations; None where none is dead."""
        if not pre.shape[1]:
            return None
        return code_from_topk(*pre.topk(min(k, pre.shape[1]), dim=1, sorted=False))

    def among(self, sae: SAE, pre: SparseCode) -> SparseCode:  # noqa: ARG002
        """Return the pairs that are active over all parts, of those that would be if only the latents here were."""
        return pre

    def among_dead(self, pre: SparseCode, k: int) -> SparseCode:  # noqa: ARG002
        """Return those of dead latents that are among their row's k largest over all parts."""
        return pre

    def any_dead(self, dead: Bool[Tensor, " d_sae"]) -> bool:
        """Return whether a latent of any part is dead."""
        return bool(dead.any())

    def summed(self, part: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return the sum of what each part of the latents gives, differentiable in each."""
        return part

    def shared(self, whole: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return what every part of the latents reads; gradients that reach it are summed."""
        return whole

    def settle(self) -> None:
        """Wait until every gradient is that of the whole batch."""

    def over_rows(self, tensor: Num[Tensor, "..."]) -> Num[Tensor, "..."]:
        """Replace a sum over the rows here by that over the whole batch."""
        return tensor

    def over_latents(self, tensor: Num[Tensor, "..."]) -> Num[Tensor, "..."]:
        """Replace a sum over the latents here by that over all of them."""
        return tensor

    def least(self, value: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """Replace the least value of the rows and latents here by the least of all."""
        return value

    def once(self, tensor: Num[Tensor, "..."]) -> Num[Tensor, "..."]:
        """Return the tensor, or zeros where another part of the latents has the same and counts it."""
        return tensor

    def window(self, sums: Float64[Tensor, " sums"]) -> Float64[Tensor, " sums"]:
        """Return a step's sums for the metrics (`wsae.train.state.SUMS`) over the whole batch and all latents."""
        return sums

    def note_dead(self, dead: Bool[Tensor, " d_sae"]) -> None:
        """Take note of which latents here are dead."""

    def dead_share(self, dead: Bool[Tensor, " d_sae"]) -> float:
        """Return the share of all latents that is dead."""
        return float(dead.double().mean())


WHOLE = Whole()


def training_forward(
    sae: SAE, x: Float[Tensor, "rows d_in"], bf16: bool = False, part: Whole = WHOLE
) -> Forward:
    """Run the SAE on a batch for training. `bf16` computes the dense encoder product in bf16.

    Top-k kinds compute the dense product without gradient, choose, and differentiate at the chosen pairs only
    (their values always in full precision). ReLU and JumpReLU codes are not sparse at the start of training, so
    they take the dense route. Of a `part`, x_hat is whole; code, pre, l1 and l0 are those of the latents and rows here.
    """
    kind, batch = sae.cfg.activation, part.batch or len(x)
    if isinstance(kind, ReLU | JumpReLU):
        centred = x if sae.b_dec is None else x - part.shared(sae.b_dec)
        pre = _product(sae, centred, bf16).to(x.dtype)
        threshold = None if sae.log_threshold is None else sae.log_threshold.exp()
        z, active = dense_codes(kind, pre, threshold)
        norms = sae.W_dec.norm(dim=1) if sae.cfg.tied else z.new_ones(len(sae.W_dec))
        l1, l0 = (z @ norms).sum() / batch, active.sum() / batch
        x_hat, code = part.summed(z @ sae.W_dec), code_from_dense(z.detach())
    else:
        with torch.no_grad():
            centred = sae.centre(x)
            pre = _product(sae, centred, bf16)
            chosen = part.choose(sae, pre)
        values, x_hat = sparse_pass(sae, centred, pre, chosen, part)
        norms = sae.W_dec.norm(dim=1)[chosen.indices] if sae.cfg.tied else 1.0
        code = SparseCode(values.detach(), chosen.indices, chosen.offsets)
        l1, l0 = (values * norms).sum() / batch, torch.count_nonzero(code.values) / batch
    x_hat = x_hat if sae.b_dec is None else x_hat + sae.b_dec
    return Forward(x_hat, l1, l0, code, pre.detach(), centred.detach())


def sparse_pass(
    sae: SAE, centred: Tensor, pre: Tensor, chosen: SparseCode, part: Whole
) -> tuple[Float[Tensor, " nnz"], Float[Tensor, "rows d_in"]]:
    """Return ReLU at chosen pairs and what the decoder makes of it, without b_dec; differentiable at these pairs."""
    plan = Plan.build(chosen.indices, chosen.offsets, len(sae.W_dec))
    b_dec = None if sae.b_dec is None else part.shared(sae.b_dec)
    values = encode_at(centred, sae.encoder_rows, plan, sae.b_enc, b_dec, pre).relu()
    return values, part.summed(decode(values, sae.W_dec, plan))


def _product(sae: SAE, centred: Tensor, bf16: bool) -> Tensor:
    if not bf16:
        return sae.pre(centred)
    low = centred.bfloat16() @ sae.W_enc.bfloat16()
    return low if sae.b_enc is None else low + sae.b_enc.bfloat16()
