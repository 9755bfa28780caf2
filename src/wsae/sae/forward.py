"""The training forward pass: x to x_hat through the chosen latents, with every quantity the losses need."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function

from wsae.ops import (
    SparseCode,
    code_from_dense,
    code_from_topk,
    decode,
    encode_at,
    select_batch_topk,
    select_group_topk,
    select_topk,
)
from wsae.ops.codes import offsets_of
from wsae.ops.sparse import Plan
from wsae.sae.config import BatchTopK, GroupTopK, JumpReLU, ReLU, TopK
from wsae.sae.model import SparseAutoencoder

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


def training_forward(
    sae: SparseAutoencoder, x: Float[Tensor, "batch d_in"], bf16: bool = False
) -> Forward:
    """Run the SAE on a batch for training. `bf16` computes the dense encoder product in bf16.

    Top-k kinds compute the dense product without gradient, choose, and differentiate at the chosen pairs only
    (their values always in full precision). ReLU and JumpReLU codes are not sparse at the start of training, so
    they take the dense route.
    """
    match sae.cfg.activation:
        case ReLU() | JumpReLU():
            return _dense_forward(sae, x, bf16)
        case _:
            return _sparse_forward(sae, x, bf16)


def _sparse_forward(sae: SparseAutoencoder, x: Tensor, bf16: bool) -> Forward:
    with torch.no_grad():
        centred = sae.centre(x)
        pre = _product(sae, centred, bf16)
        picked = _pick(sae, pre)
        plan = Plan.build(picked.indices, picked.offsets, sae.cfg.d_sae)
    values = encode_at(centred, sae.encoder_rows, sae.biases, plan, pre).relu()
    x_hat = decode(values, sae.W_dec, plan)
    x_hat = x_hat if sae.b_dec is None else x_hat + sae.b_dec
    detached = values.detach()
    code = SparseCode(detached, picked.indices, picked.offsets)
    norms = sae.W_dec.norm(dim=1)[picked.indices] if sae.cfg.tied else 1.0
    active = torch.count_nonzero(detached) / len(x)
    return Forward(x_hat, (values * norms).sum() / len(x), active, code, pre, centred)


def _pick(sae: SparseAutoencoder, pre: Tensor) -> SparseCode:
    """Return the chosen pairs (values are not read)."""
    match sae.cfg.activation:
        case TopK(k=k):
            indices = select_topk(pre, k)
        case GroupTopK(k=k):
            indices = select_group_topk(pre, k)
        case BatchTopK(k=k):
            rows, flat = select_batch_topk(pre, k)
            return SparseCode(pre[rows, flat], flat, offsets_of(rows, len(pre)))
        case _:
            raise AssertionError(sae.cfg.activation)
    return code_from_topk(pre.gather(1, indices), indices)


def _dense_forward(sae: SparseAutoencoder, x: Tensor, bf16: bool) -> Forward:
    centred = sae.centre(x)
    pre = _product(sae, centred, bf16).to(x.dtype)
    if isinstance(sae.cfg.activation, JumpReLU):
        assert sae.log_threshold is not None
        threshold, width = sae.log_threshold.exp(), sae.cfg.activation.bandwidth
        z = jumprelu(pre, threshold, width)
        l0 = step(pre, threshold, width).sum(1).mean()
    else:
        z = pre.relu()
        l0 = (z.detach() > 0).sum(1).to(x.dtype).mean()
    norms = sae.W_dec.norm(dim=1) if sae.cfg.tied else z.new_ones(sae.cfg.d_sae)
    code = code_from_dense(z.detach())
    return Forward(sae.decode(z), (z @ norms).mean(), l0, code, pre.detach(), centred.detach())


def _product(sae: SparseAutoencoder, centred: Tensor, bf16: bool) -> Tensor:
    if not bf16:
        return sae.pre(centred)
    low = centred.bfloat16() @ sae.W_enc.bfloat16()
    return low if sae.b_enc is None else low + sae.b_enc.bfloat16()
