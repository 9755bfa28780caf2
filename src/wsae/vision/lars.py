"""LARS: momentum SGD whose gradients are first scaled per layer."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class LARS(torch.optim.SGD):
    """LARS with a clipped rate, as solo-learn has it; its steps are `torch.optim.SGD`'s.

    Each tensor of two dimensions or more steps along min(eta |w| / (|g| + wd |w| + 1e-8) / lr, 1) (g + wd w); biases
    and norms (one dimension) along g. `pytorch_optimizer.LARS` does not clip, and decays where |g| is 0.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], eta: float, momentum: float, decay: float
    ) -> None:
        super().__init__(groups, lr=1.0, momentum=momentum)
        self.eta, self.decay = eta, decay

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # noqa: ARG002
        """Scale the gradients in place, then take SGD's step."""
        for group in self.param_groups:
            decay = group.get("decay", self.decay)
            layers = [p for p in group["params"] if p.ndim > 1 and p.grad is not None]
            if layers and group["lr"] > 0:
                _scale(layers, self.eta, decay, group["lr"])
        super().step()


def _scale(layers: list[Tensor], eta: float, decay: float, lr: float) -> None:
    gradients = [p.grad for p in layers if p.grad is not None]
    w = torch.stack(torch._foreach_norm(layers))
    g = torch.stack(torch._foreach_norm(gradients))
    share = (eta * w / (g + decay * w + 1e-8) / lr).clamp_max(1.0)
    used = (w > 0) & (g > 0)  # elsewhere the gradient stays as it is, without decay
    weights = torch.where(used, decay * share, 0.0).unbind()
    torch._foreach_mul_(gradients, torch.where(used, share, 1.0).unbind())
    torch._foreach_add_(gradients, torch._foreach_mul(layers, weights))
