"""Gradient descent of many toy models at once: hand-written gradients, AdamW, buffers made once.

Each member's computation is its own batch of the batched products; nothing is summed across members.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

BETAS, EPS = (0.9, 0.999), 1e-8
_CACHE_BYTES = 4 << 20
"""Size of a chunk's intermediates: they stay in the processor's second and third level cache."""


class Parameters(NamedTuple):
    """W_p and b of every member, or their gradients or moments."""

    W_p: Float[Tensor, "models d_in n_features"]
    b: Float[Tensor, "models n_features"]

    def part(self, first: int, last: int) -> "Parameters":
        """Return members first .. last - 1 (views)."""
        return Parameters(self.W_p[first:last], self.b[first:last])

    def zeros(self) -> "Parameters":
        """Return zeros of the same shapes."""
        return Parameters(torch.zeros_like(self.W_p), torch.zeros_like(self.b))


def toy_loss(
    parameters: Parameters,
    importance: Float[Tensor, "models n_features"],
    x: Float[Tensor, "models rows n_features"],
) -> Float[Tensor, " models"]:
    """Return mean over rows and features of importance_i (x_i - ReLU(W_p^T W_p x + b)_i)^2, per member."""
    h = torch.bmm(x, parameters.W_p.mT)
    x_hat = torch.baddbmm(parameters.b[:, None], h, parameters.W_p).relu_()
    return (x_hat.sub_(x).square_() * importance[:, None]).mean((1, 2))


class Gradients:
    """Gradients of `toy_loss` for chunks of members, in buffers that are reused."""

    def __init__(self, chunk: int, rows: int, like: Parameters) -> None:
        d_in, n = like.W_p.shape[1:]
        make = like.W_p.new_empty
        self._pre, self._error = make(chunk, rows, n), make(chunk, rows, n)
        self._h, self._dh = make(chunk, d_in, rows), make(chunk, d_in, rows)

    def __call__(
        self,
        parameters: Parameters,
        importance: Float[Tensor, "models n_features"],
        x: Float[Tensor, "models rows n_features"],
        out: Parameters,
    ) -> None:
        """Write d toy_loss / d (W_p, b) into `out`.

        With e = (pre - x) where pre > 0 and scale = 2 importance / (rows n): db = scale sum e and
        dW_p = (h^T e) scale + (e scale W_p^T)^T x, h being x_p = W_p x.
        """
        m, (W_p, b) = len(x), parameters
        pre, error, h, dh = self._pre[:m], self._error[:m], self._h[:m], self._dh[:m]
        scale = importance * (2 / (x.shape[1] * x.shape[2]))
        torch.bmm(W_p, x.mT, out=h)  # [d_in, rows]: the faster way round when d_in is small
        torch.baddbmm(b[:, None], h.mT, W_p, out=pre)
        torch.sub(pre, x, out=error)
        torch.ops.aten.threshold_backward.grad_input(error, pre, 0, grad_input=error)
        torch.sum(error, 1, out=out.b).mul_(scale)
        torch.bmm(W_p * scale[:, None], error.mT, out=dh)
        torch.bmm(h, error, out=out.W_p).mul_(scale[:, None])
        out.W_p.baddbmm_(dh, x)


class AdamW:
    """AdamW over all members (Loshchilov and Hutter 2019), as torch.optim.AdamW computes it."""

    def __init__(self, parameters: Parameters, weight_decay: float) -> None:
        self._parameters, self._weight_decay = parameters, weight_decay
        self._mean, self._square = parameters.zeros(), parameters.zeros()
        self._root = parameters.zeros()  # scratch
        self._step = 0

    def step(self, gradients: Parameters, lr: float) -> None:
        """Update the parameters in place."""
        self._step += 1
        first, second = (1 - beta**self._step for beta in BETAS)
        every = (self._parameters, gradients, self._mean, self._square, self._root)
        for p, g, mean, square, root in zip(*every, strict=True):
            mean.lerp_(g, 1 - BETAS[0])
            square.mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
            torch.sqrt(square, out=root).div_(second**0.5).add_(EPS)
            p.mul_(1 - lr * self._weight_decay).addcdiv_(mean, root, value=-lr / first)


def chunk_size(rows: int, n_features: int, item_bytes: int) -> int:
    """Return how many members to take at once: three [rows, n_features] intermediates each."""
    return max(1, _CACHE_BYTES // (3 * rows * n_features * item_bytes))
