"""Many SAEs of one shape as stacked tensors: one batched product instead of a loop, each SAE as if alone.

For small SAEs only: the code is dense [members, batch, d_sae]. `training_forward` of one SAE is its specification.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from wsae.core.errors import UserError
from wsae.sae.architectures import Architecture, Choice, architecture_of
from wsae.sae.config import SAEConfig
from wsae.sae.forward import Coded, dense_entries
from wsae.sae.model import SAE


@dataclass
class Stack:
    """SAEs of one SAEConfig; parameters have a leading axis of members and broadcast over the batch."""

    cfg: SAEConfig
    W_dec: Float[Tensor, "members d_sae d_in"]
    W_enc_t: Float[Tensor, "members d_sae d_in"] | None
    b_enc: Float[Tensor, "members 1 d_sae"] | None
    b_dec: Float[Tensor, "members 1 d_in"] | None
    threshold: Float64[Tensor, " members"]
    """Batch Top-k's running threshold."""
    own: dict[str, Float[Tensor, "members 1 d_sae"]] = field(default_factory=dict)
    """The parameters of its kind."""

    @property
    def encoder_rows(self) -> Float[Tensor, "members d_sae d_in"]:
        """The encoder with one row per latent: W_dec itself when tied."""
        return self.W_dec if self.W_enc_t is None else self.W_enc_t

    @property
    def choice(self) -> Choice:
        """Which latents of a batch may be active in training."""
        own = {"threshold": self.threshold[:, None, None], **self.own}
        return architecture_of(self.cfg.activation).choose(self.cfg.activation, own)

    def parameters(self) -> list[Tensor]:
        """Return what an optimiser moves."""
        named = (self.W_dec, self.W_enc_t, self.b_enc, self.b_dec, *self.own.values())
        return [p for p in named if p is not None]

    def write_back(self, saes: list[SAE]) -> None:
        """Copy every member's tensors into its SAE."""
        for i, sae in enumerate(saes):
            for name, target in sae.named_parameters():
                source = self.own[name] if name in self.own else getattr(self, name)
                target.data.copy_(source[i].reshape(target.shape))
            if "threshold" not in self.own:
                sae.threshold.copy_(self.threshold[i])


class StackForward(NamedTuple):
    """One training pass of a stack; as `Forward`, with an axis of members."""

    x_hat: Float[Tensor, "members batch d_in"]
    entries: Coded
    """Latents and pre-activations [members, batch, d_sae]."""
    l1: Float[Tensor, " members"]
    l0: Float[Tensor, " members"]
    """Mean number of active latents; differentiable for kinds that have an L0 penalty."""


def stackable(arch: Architecture) -> bool:
    """Return whether SAEs of a kind can be stacked: those with one reconstruction can."""
    return arch.nested is None and arch.gate is None


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
    if not stackable(first.arch):
        raise UserError(f"{first.arch.kind} has more than one reconstruction: it cannot be stacked")
    own = {name: stacked(name) for name in first.arch.parameters}
    buffers = [W_dec.new_zeros(()) if "threshold" in own else sae.threshold for sae in saes]
    return Stack(
        first.cfg,
        W_dec,
        stacked("W_enc_t", vector=False),
        stacked("b_enc"),
        stacked("b_dec"),
        torch.stack(buffers).double().to(device),
        {name: parameter for name, parameter in own.items() if parameter is not None},
    )


def stack_forward(stack: Stack, x: Float[Tensor, "members batch d_in"]) -> StackForward:
    """Run every member on its own batch for training (Eq. 2 and 3)."""
    centred = x if stack.b_dec is None else x - stack.b_dec
    pre = torch.bmm(centred, stack.encoder_rows.mT)
    pre = pre if stack.b_enc is None else pre + stack.b_enc
    arch, activation = architecture_of(stack.cfg.activation), stack.cfg.activation
    own = {"threshold": stack.threshold[:, None, None].to(pre.dtype), **stack.own}
    norms = stack.W_dec.norm(dim=2)[:, None] if stack.cfg.tied else None
    entries = dense_entries(arch, activation, pre, own, norms)
    x_hat = torch.bmm(entries.z, stack.W_dec)
    x_hat = x_hat if stack.b_dec is None else x_hat + stack.b_dec
    batch, count = pre.shape[1], entries.active()
    count = entries.z.detach().ne(0).to(pre.dtype) if count is None else count
    l1, l0 = entries.l1().sum((1, 2)) / batch, count.sum((1, 2)) / batch
    return StackForward(x_hat, entries, l1, l0)


def thresholds(trained: SAE | Stack) -> dict[str, Float[Tensor, "..."]]:
    """Return the parameters of a kind that may not be negative, detached."""
    parameters = architecture_of(trained.cfg.activation).parameters.items()
    kept = [name for name, parameter in parameters if parameter.positive]
    return {name: trained.own[name].detach() for name in kept}


def keep_positive_(trained: SAE | Stack) -> None:
    """Bring back the parameters of a kind that may not be negative."""
    for threshold in thresholds(trained).values():
        threshold.clamp_min_(0)
