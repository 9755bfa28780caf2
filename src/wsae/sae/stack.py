"""Many SAEs of one shape as stacked tensors: one batched product instead of a loop, each SAE as if alone.

For small SAEs only: the code is dense [members, batch, d_sae]. `training_forward` of one SAE is its specification.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from wsae.sae.config import SAEConfig
from wsae.sae.forward import dense_codes
from wsae.sae.model import SAE


@dataclass
class Stack:
    """SAEs of one SAEConfig; parameters have a leading axis of members and broadcast over the batch."""

    cfg: SAEConfig
    W_dec: Float[Tensor, "members d_sae d_in"]
    W_enc_t: Float[Tensor, "members d_sae d_in"] | None
    b_enc: Float[Tensor, "members 1 d_sae"] | None
    b_dec: Float[Tensor, "members 1 d_in"] | None
    log_threshold: Float[Tensor, "members 1 d_sae"] | None
    threshold: Float64[Tensor, " members"]
    """Batch Top-k's running threshold."""

    @property
    def encoder_rows(self) -> Float[Tensor, "members d_sae d_in"]:
        """The encoder with one row per latent: W_dec itself when tied."""
        return self.W_dec if self.W_enc_t is None else self.W_enc_t

    def parameters(self) -> list[Tensor]:
        """Return what an optimiser moves."""
        named = (self.W_dec, self.W_enc_t, self.b_enc, self.b_dec, self.log_threshold)
        return [p for p in named if p is not None]

    def write_back(self, saes: list[SAE]) -> None:
        """Copy every member's tensors into its SAE."""
        for i, sae in enumerate(saes):
            for name, target in sae.named_parameters():
                target.data.copy_(getattr(self, name)[i].reshape(target.shape))
            sae.threshold.copy_(self.threshold[i])


class StackForward(NamedTuple):
    """One training pass of a stack; as `Forward`, with an axis of members."""

    x_hat: Float[Tensor, "members batch d_in"]
    z: Float[Tensor, "members batch d_sae"]
    l1: Float[Tensor, " members"]
    l0: Float[Tensor, " members"]
    pre: Float[Tensor, "members batch d_sae"]


def stack_saes(
    saes: list[SAE],
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Stack:
    """Return copies of the SAEs' tensors as one trainable stack; all must have the same SAEConfig."""
    first = saes[0]
    assert all(sae.cfg == first.cfg for sae in saes), "a stack holds SAEs of one SAEConfig"

    def stacked(name: str, vector: bool = True) -> Tensor | None:
        if getattr(first, name) is None:
            return None
        parts = torch.stack([sae.get_parameter(name).detach() for sae in saes])
        parts = parts.to(device, dtype)
        return (parts[:, None] if vector else parts).contiguous().requires_grad_()

    W_dec = stacked("W_dec", vector=False)
    assert W_dec is not None
    return Stack(
        first.cfg,
        W_dec,
        stacked("W_enc_t", vector=False),
        stacked("b_enc"),
        stacked("b_dec"),
        stacked("log_threshold"),
        torch.stack([sae.threshold for sae in saes]).to(device),
    )


def stack_forward(stack: Stack, x: Float[Tensor, "members batch d_in"]) -> StackForward:
    """Run every member on its own batch for training (Eq. 2 and 3)."""
    centred = x if stack.b_dec is None else x - stack.b_dec
    pre = torch.bmm(centred, stack.encoder_rows.mT)
    pre = pre if stack.b_enc is None else pre + stack.b_enc
    threshold = None if stack.log_threshold is None else stack.log_threshold.exp()
    z, active = dense_codes(stack.cfg.activation, pre, threshold)
    x_hat = torch.bmm(z, stack.W_dec)
    x_hat = x_hat if stack.b_dec is None else x_hat + stack.b_dec
    weighted = z if not stack.cfg.tied else z * stack.W_dec.norm(dim=2)[:, None]
    return StackForward(x_hat, z, weighted.sum((1, 2)) / z.shape[1], active.mean(1), pre)
