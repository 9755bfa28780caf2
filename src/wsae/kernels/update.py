"""The optimiser's step on one matrix of rows: Adam, with rows kept at unit norm on request.

This is the CPU path and the specification of the kernels in `wsae.kernels.triton.update`.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from wsae.kernels.sparse import Plan


class AdamStep(NamedTuple):
    """What Adam needs to know of a step (Kingma and Ba 2015); `step` counts from 1."""

    lr: float
    step: int
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    scale: Float[Tensor, ""] | None = None
    """What the gradient is multiplied by; None stands for 1, and for one whose size is not asked for."""


class Adam:
    """torch.optim.Adam with `fused`, to the bit.

    The constructor of PyTorch's own loads its compiler, which takes a second in every process that trains.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float) -> None:
        self.parameters, self.lr = list(parameters), lr
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        """What each has by now: the number of its steps, and the running means of its gradients and their squares."""

    def moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return a parameter's state, made where there is none."""
        if not (state := self.state.setdefault(parameter, {})):
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter.detach())
            state["exp_avg_sq"] = torch.zeros_like(parameter.detach())
        return state

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Return both moments of every parameter that has any."""
        return [(state["exp_avg"], state["exp_avg_sq"]) for state in self.state.values()]

    @torch.no_grad()
    def step(self) -> None:
        """Move every parameter that has a gradient."""
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for parameter in self.parameters:
            if parameter.grad is not None:
                by_type.setdefault(parameter.dtype, []).append(parameter)
        for moved in by_type.values():
            states = [self.moments(parameter) for parameter in moved]
            for state, parameter in zip(states, moved, strict=True):
                state["step"] = state["step"].to(parameter.device)  # a checkpoint's lies on the CPU
            counts = [state["step"] for state in states]
            torch._foreach_add_(counts, 1)
            _fused_adam_(
                [parameter.detach() for parameter in moved],
                [parameter.grad for parameter in moved if parameter.grad is not None],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                counts,
                AdamStep(self.lr, 0),
            )


class SGD:
    """Plain gradient descent."""

    def __init__(self, parameters: Iterable[Tensor], lr: float) -> None:
        self.parameters, self.lr = list(parameters), lr

    @torch.no_grad()
    def step(self) -> None:
        """Move every parameter that has a gradient."""
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.add_(parameter.grad, alpha=-self.lr)


def limit_of(limit: float, norms: Float64[Tensor, "*members"]) -> Float[Tensor, "*members"]:
    """Return min(1, limit / norm), 1 for a norm of 0."""
    return (limit / norms).clamp(max=1).float()


def rescale_(moments: Iterable[tuple[Tensor, Tensor]], scale: Float[Tensor, "..."]) -> None:
    """Make moments what they would be of gradients multiplied by `scale`."""
    for m, v in moments:
        m.mul_(scale)
        v.mul_(scale * scale)


def _fused_adam_(
    W: list[Tensor],
    grad: list[Tensor],
    m: list[Tensor],
    v: list[Tensor],
    counts: list[Tensor],
    adam: AdamStep,
) -> None:
    torch._fused_adam_(
        W,
        grad,
        m,
        v,
        [],  # no running maximum of v: amsgrad is off
        counts,
        lr=adam.lr,
        beta1=adam.beta1,
        beta2=adam.beta2,
        weight_decay=0.0,
        eps=adam.eps,
        amsgrad=False,
        maximize=False,
    )


class SparseGrad(NamedTuple):
    """A gradient as its terms: row j is the sum over pairs (b, j) of the plan of weight * rows[b].

    Terms of several losses are one plan over more rows: concatenate the row offsets and the matrices of rows.
    """

    plan: Plan
    weights: Float[Tensor, " nnz"]
    rows: Float[Tensor, "batch d_in"]

    def dense(self) -> Float[Tensor, "d_sae d_in"]:
        """Return the gradient as a matrix."""
        return self.plan.scatter(self.weights, self.rows)


def adam_rows_(
    W: Float[Tensor, "n d"],
    grad: Float[Tensor, "n d"],
    m: Float[Tensor, "n d"],
    v: Float[Tensor, "n d"],
    adam: AdamStep,
    unit: bool,
) -> Float[Tensor, ""] | None:
    """Take one step of Adam on W [n, d] in place, exactly as torch.optim.Adam does; `grad` may be overwritten.

    m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2,  bias corrections c_i = 1 - beta_i^step,
    W -= lr (m / c_1) / (sqrt(v / c_2) + eps). With `unit` the part of g along each (unit) row is dropped before,
    g -= (g . W_j) W_j, and each row is divided by max(|W_j|, 1e-12) after. With `adam.scale` g is then multiplied by
    it; returns the sum of squares of g before that (else None).
    """
    if unit:
        grad.addcmul_(W, torch.linalg.vecdot(grad, W, dim=1)[:, None], value=-1)
    square = None
    if adam.scale is not None:
        square = grad.double().square().sum()
        grad.mul_(adam.scale)
    count = torch.tensor(float(adam.step), dtype=torch.float32, device=W.device)
    _fused_adam_([W], [grad], [m], [v], [count], adam)
    if unit:
        unit_rows_(W)
    return square


def update_rows_(
    W: Float[Tensor, "n d"],
    grad: SparseGrad,
    m: Float[Tensor, "n d"],
    v: Float[Tensor, "n d"],
    adam: AdamStep,
    unit: bool,
) -> Float[Tensor, ""] | None:
    """Take the step of `adam_rows_` on W [n, d] with the gradient given by its terms."""
    return adam_rows_(W, grad.dense(), m, v, adam, unit)


def unit_rows_(W: Float[Tensor, "n d"]) -> None:
    """Divide each row of W [n, d] by max(|W_j|, 1e-12) in place."""
    W.div_(torch.linalg.vector_norm(W, dim=1, keepdim=True).clamp_min_(1e-12))
