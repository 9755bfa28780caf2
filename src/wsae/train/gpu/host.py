"""What the host remembers of tensors on the device, so that a step need not wait for them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from wsae.train.native.state import moments
from wsae.train.state import MemberState

_seen = WeakTensorKeyDictionary()
"""Tensor: how often it had been written to when it was read, and what was read."""


class Dead(NamedTuple):
    """The dead latents, filled up to a power of two: kernels are tuned per size, and the number changes often."""

    number: int
    latents: Int64[Tensor, " room"]
    floor: Float[Tensor, " room"]
    """0, and -inf for what only fills up: added to pre-activations it keeps those from being chosen."""


def dead_latents(mask: Bool[Tensor, " d_sae"]) -> Dead:
    """Return the dead latents; waits for the device only when the mask has changed since it was last asked."""
    return _remembered(mask, _find)


def next_step(member: MemberState) -> int:
    """Count a step in the Adam states of all parameters, which count alike, and return its number (from 1).

    The counts are put beside the moments, where torch's fused Adam wants them. Waits for the device only when another
    optimiser or a checkpoint has written them since.
    """
    states = [moments(member, p) for p in member.optimizer.param_groups[0]["params"]]
    for state in states:
        state["step"] = state["step"].to(state["exp_avg"].device)
    counts = [state["step"] for state in states]
    number = _remembered(counts[0], int) + 1
    torch._foreach_add_(counts, 1)
    _remember(counts[0], number)
    return number


def _find(mask: Tensor) -> Dead:
    latents = mask.nonzero()[:, 0]
    number = len(latents)
    filling = (1 << max(4, (number - 1).bit_length())) - number
    floor = torch.zeros(number + filling, device=mask.device, dtype=torch.float32)
    floor[number:] = -torch.inf
    return Dead(number, torch.cat([latents, latents.new_zeros(filling)]), floor)


def _remembered(tensor: Tensor, read: Callable[[Tensor], Any]) -> Any:
    if tensor in _seen:
        written, value = _seen[tensor]
        if written == tensor._version:
            return value
    return _remember(tensor, read(tensor))


def _remember(tensor: Tensor, value: Any) -> Any:
    _seen[tensor] = (tensor._version, value)
    return value
