"""Streaming mean and variance of activations, exact under any split and mergeable (the statistics behind gamma)."""

from fractions import Fraction

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from wsae.core.errors import UserError
from wsae.stats.exact import UNIT, ExactSum

_BLOCK = 256
"""Rows handled at once: the float64 scratch of one block stays in the second-level cache."""


class Moments:
    """Exact sums of x and x^2 per dimension, rows taken as float32.

    The result does not depend on how rows are split, ordered or merged: every quantity is rounded once, at the end.
    """

    def __init__(self, d_in: int) -> None:
        self.d_in = d_in
        self.n = 0
        self._sum = ExactSum(d_in)
        self._square = ExactSum(d_in)

    def update(self, x: Float[Tensor, "rows d_in"]) -> None:
        """Add rows; raises UserError naming row and dimension of the first NaN or infinity."""
        if x.ndim != 2 or x.shape[1] != self.d_in:
            raise UserError(f"rows of shape {tuple(x.shape)} where [rows, {self.d_in}] is needed")
        for start in range(0, len(x), _BLOCK):
            block = x[start : start + _BLOCK].float()
            check_finite(block, self.n)
            wide = block.double()
            self._square.add(wide.square())
            self._sum.add(wide)
            self.n += len(block)

    def merge(self, other: "Moments") -> None:
        """Add another stream's statistics; the result equals one pass over both."""
        if other.d_in != self.d_in:
            raise UserError(
                f"statistics of width {other.d_in} cannot join those of width {self.d_in}"
            )
        self.n += other.n
        self._sum.merge(other._sum)
        self._square.merge(other._square)

    @property
    def mean(self) -> Float64[Tensor, " d_in"]:
        """E[x_i]."""
        return self._column(Fraction(s, self._rows) for s in self._sum.integers())

    @property
    def second_moment(self) -> Float64[Tensor, " d_in"]:
        """E[x_i^2]."""
        return self._column(Fraction(q, self._rows) for q in self._square.integers())

    @property
    def variance(self) -> Float64[Tensor, " d_in"]:
        """E[x_i^2] - E[x_i]^2 (over n, not n - 1), without cancellation: the difference is taken exactly."""
        n, pairs = self._rows, zip(self._square.integers(), self._sum.integers(), strict=True)
        return self._column((Fraction(q, n) - Fraction(s * s, n * n) * UNIT) for q, s in pairs)

    def tensors(self) -> dict[str, Tensor]:
        """Return the whole state as integer tensors (`from_tensors` restores it exactly)."""
        return {
            "n": torch.tensor([self.n]),
            "sum": self._sum.digits.clone(),
            "square": self._square.digits.clone(),
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "Moments":
        """Restore statistics written by `tensors()`."""
        moments = cls(tensors["sum"].shape[1])
        moments.n = int(tensors["n"][0])
        moments._sum.digits = tensors["sum"].clone()
        moments._square.digits = tensors["square"].clone()
        return moments

    @property
    def _rows(self) -> int:
        if self.n == 0:
            raise UserError("no rows were seen, so there are no statistics; is the data empty?")
        return self.n

    @staticmethod
    def _column(values) -> Float64[Tensor, " d_in"]:
        return torch.tensor([float(v * UNIT) for v in values], dtype=torch.float64)


def check_finite(x: Float[Tensor, "rows d_in"], first_row: int = 0, where: str = "") -> None:
    """Raise UserError naming the row and dimension of the first NaN or infinity in `x`."""
    if bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all()):
        return  # a finite sum proves that every term is finite
    row, dim = (int(i) for i in (~torch.isfinite(x)).nonzero()[0])
    value = float(x[row, dim])
    place = f"{where}: " if where else ""
    raise UserError(
        f"{place}activation is {value} at row {first_row + row}, dimension {dim}; "
        "remove or mend that row (a float16 model overflows: try --dtype bfloat16)"
    )
