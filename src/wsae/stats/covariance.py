"""Streaming covariance of activations in float64, mergeable (the statistics behind the rules gap and whiten)."""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from wsae.core.errors import UserError
from wsae.stats.moments import check_finite

_BLOCK = 4096
"""Rows widened to float64 at once: bounds the scratch memory at 4096 x d_in x 8 bytes."""


class Covariance:
    """Running mean and scatter matrix of rows; memory is d_in^2 x 8 bytes however many rows there are.

    Unlike `Moments` it is not exact: another split or order of the rows changes the last digits (pairwise updates of
    Chan, Golub & LeVeque 1983, stable for any mean). A constant dimension has variance 0 exactly.
    """

    def __init__(self, d_in: int) -> None:
        self.d_in = d_in
        self.n = 0
        self.mean: Float64[Tensor, " d_in"] = torch.zeros(d_in, dtype=torch.float64)
        self._scatter = torch.zeros(d_in, d_in, dtype=torch.float64)

    def update(self, x: Float[Tensor, "rows d_in"]) -> None:
        """Add rows; raises UserError naming row and dimension of the first NaN or infinity."""
        if x.ndim != 2 or x.shape[1] != self.d_in:
            raise UserError(f"rows of shape {tuple(x.shape)} where [rows, {self.d_in}] is needed")
        for block in x.split(_BLOCK):
            if len(block):
                check_finite(block, self.n)
                self._add(block.double().cpu())

    def merge(self, other: "Covariance") -> None:
        """Add another stream's rows; equals one pass over both up to rounding."""
        if other.d_in != self.d_in:
            raise UserError(
                f"a covariance of width {other.d_in} cannot join one of width {self.d_in}"
            )
        self._join(other.n, other.mean, other._scatter)

    @property
    def covariance(self) -> Float64[Tensor, "d_in d_in"]:
        """E[(x - mean)(x - mean)^T], over n rows, not n - 1; raises UserError when no row was seen."""
        if self.n == 0:
            raise UserError("no rows were seen, so there is no covariance; is the data empty?")
        return self._scatter / self.n

    def _add(self, block: Float64[Tensor, "rows d_in"]) -> None:
        shifted = block - block[0]  # so a constant dimension is 0, not a rounding error
        offset = shifted.mean(0)
        deviation = shifted - offset
        self._join(len(block), block[0] + offset, deviation.T @ deviation)

    def _join(self, n: int, mean: Tensor, scatter: Tensor) -> None:
        if n == 0:
            return
        total = self.n + n
        step = mean - self.mean if self.n else torch.zeros_like(mean)
        self._scatter += scatter + torch.outer(step, step) * (self.n * n / total)
        self.mean = self.mean + step * (n / total) if self.n else mean.clone()
        self.n = total
