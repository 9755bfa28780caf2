"""The processes that torchrun started: each takes a part of every batch and sees everyone's projections."""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from wsae.core.errors import UserError
from wsae.train.parallel.world import MAX, World


class Ranks:
    """One of several processes; with no world, the only one. See `wsae.train.loop.Team`."""

    def __init__(self, world: World | None = None) -> None:
        self.world = world
        self.count = world.layout.ranks if world else 1
        self.rank = world.rank if world else 0

    @property
    def first(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def part(self, batch_size: int) -> slice:
        """Return this process's part of a batch; raises UserError when the parts are not equal."""
        if batch_size % self.count:
            raise UserError(
                f"--batch-size {batch_size}: {self.count} processes take equal parts; use a multiple of {self.count}"
            )
        size = batch_size // self.count
        return slice(self.rank * size, (self.rank + 1) * size)

    def agree(self, stop: bool, due: bool) -> tuple[bool, bool]:
        """Return whether any process is to stop, and whether the first one's checkpoint is due."""
        if self.world is None:
            return stop, due
        ask = torch.tensor([int(stop), int(due and self.first)], device=self.world.device)
        all_stop, all_due = self.world.reduce_(ask, MAX).tolist()
        return bool(all_stop), bool(all_due)

    def mean_(self, values: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Replace values by their mean over the processes."""
        return values if self.world is None else self.world.reduce_(values).div_(self.count)

    def everyone(self, z: Float[Tensor, "rows out"]) -> Float[Tensor, "all out"]:
        """Return all processes' rows one after another, `z` itself where there is one; gradients go back to each."""
        if self.world is None:
            return z
        found = _Gather.apply(z)
        assert isinstance(found, Tensor)
        return found


class _Gather(torch.autograd.Function):
    """all_gather whose backward gives each process the sum of what all found for its rows, as solo-learn has it."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:  # noqa: ARG004
        parts = [torch.empty_like(z) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, z.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ARG004
        gradient = gradients[0].contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]
