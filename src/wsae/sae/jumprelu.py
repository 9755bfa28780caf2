"""JumpReLU and its penalty's step function, with the threshold gradients of Rajamanoharan et al. 2024b.

    JumpReLU(z) = z H(z - theta)           d/dtheta = -(theta / width) rect((z - theta) / width)
    step(z)     = H(z - theta)             d/dtheta = -(1 / width) rect((z - theta) / width)
with rect(u) = 1 for |u| < 1/2, which integrates to 1, so the width scales no gradient on average.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function


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
