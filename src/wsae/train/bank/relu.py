"""The ReLU step of a stack by hand: the gradients autograd would give, several times faster for small SAEs.

The code is held latent-major, z [members, d_sae, batch]: all five products then run along the batch, which small
widths (d_in = 20) need. `stack_forward` and autograd are the specification.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from wsae.sae.stack import Stack


@dataclass
class Scratch:
    """Buffers of one chunk, reused every step."""

    z: Float[Tensor, "members d_sae batch"]
    dz: Float[Tensor, "members d_sae batch"]

    @classmethod
    def like(cls, stack: Stack, batch: int) -> "Scratch":
        """Return buffers for a stack and a batch size."""
        members, d_sae, _ = stack.W_dec.shape
        z = stack.W_dec.new_empty(members, d_sae, batch, requires_grad=False)
        return cls(z, torch.empty_like(z))


@torch.no_grad()
def relu_gradients(
    stack: Stack,
    x: Float[Tensor, "members batch d_in"],
    gamma: Float[Tensor, "members rows d_in"],
    l1: Float[Tensor, " members"] | None,
    scratch: Scratch,
) -> Float[Tensor, " members"]:
    """Set every parameter's gradient of E||Gamma (x - x_hat)||^2 + l1 E sum_j z_j ||W_dec[j]||; returns the first term.

    `gamma` holds one row of weights per member, or a matrix [d_in, d_in].
    """
    batch, z, dz = x.shape[1], scratch.z, scratch.dz
    centred = x.mT if stack.b_dec is None else x.mT - stack.b_dec.mT
    W_enc, W_dec = stack.encoder_rows, stack.W_dec
    if stack.b_enc is None:
        torch.bmm(W_enc, centred, out=z).relu_()
    else:
        torch.baddbmm(stack.b_enc.mT, W_enc, centred, out=z).relu_()
    residual = torch.baddbmm(centred, W_dec.mT, z, alpha=-1)
    loss, g = _pull(residual, gamma, batch)
    torch.bmm(W_dec, g, out=dz)
    norms = None
    if l1 is not None:
        rate = l1[:, None, None] / batch
        norms = (
            W_dec.norm(dim=2, keepdim=True) if stack.cfg.tied else torch.ones_like(W_dec[..., :1])
        )
        dz.add_(norms * rate)
    torch.ops.aten.threshold_backward.grad_input(dz, z, 0, grad_input=dz)
    decoder = torch.bmm(g, z.mT)
    if stack.W_enc_t is None:
        W_dec.grad = decoder.baddbmm_(centred, dz.mT).mT.contiguous()
        if l1 is not None and norms is not None:
            pushed = z.sum(2, keepdim=True) * (l1[:, None, None] / batch)
            W_dec.grad.addcmul_(W_dec, pushed / norms.clamp_min(1e-12))
        return loss
    W_dec.grad = decoder.mT.contiguous()
    stack.W_enc_t.grad = torch.bmm(centred, dz.mT).mT.contiguous()
    _bias_gradients(stack, g, dz)
    return loss


def _pull(residual: Tensor, gamma: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """Return E||Gamma r||^2 per member and its gradient with respect to x_hat [members, d_in, batch]."""
    if gamma.shape[1] == 1:
        weights = gamma.mT
        weighed = residual * weights
        g = weighed * (weights * (-2 / batch))
    else:
        weighed = torch.bmm(gamma, residual)
        g = torch.bmm(gamma.mT, weighed).mul_(-2 / batch)
    return weighed.square_().sum((1, 2)) / batch, g


def _bias_gradients(stack: Stack, g: Tensor, dz: Tensor) -> None:
    assert stack.b_enc is not None
    assert stack.b_dec is not None
    summed = dz.sum(2, keepdim=True)
    stack.b_enc.grad = summed.mT
    stack.b_dec.grad = (g.sum(2, keepdim=True) - torch.bmm(stack.encoder_rows.mT, summed)).mT
