"""Streaming mean and variance of activations, exact under any split and mergeable (the statistics behind gamma)."""

from collections.abc import Sequence
from fractions import Fraction

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from wsae.core.errors import UserError

DIGIT_BITS = 32
LOWEST, HIGHEST = -10, 7
"""Digits from 2^-320 to 2^256: holds every float32 and every square of one."""
MAX_ROWS = 1 << 14
"""Rows per inner sum: 2^14 digits under 2^33 stay under 2^53, so float64 adds them without rounding."""


class ExactSum:
    """Column sums of float64 values whose lowest bit is at least 2^-320: the same bits for any split, order or workers.

    A value is cut into 32-bit digits of a fixed-point number (Demmel & Nguyen 2015, "Parallel reproducible summation");
    each digit is summed without rounding and kept as an integer, so addition is associative and merging is exact.
    """

    def __init__(self, width: int) -> None:
        self.digits: Int64[Tensor, "digits width"] = torch.zeros(
            HIGHEST - LOWEST + 1, width, dtype=torch.int64
        )

    def add(self, values: Float64[Tensor, "rows width"]) -> None:
        """Add every row; `values` is used as scratch space."""
        for block in values.split(MAX_ROWS):
            self._add_block(block)
        self._carry()

    def merge(self, other: "ExactSum") -> None:
        """Add another sum, exactly."""
        self.digits += other.digits
        self._carry()

    def integers(self) -> list[int]:
        """Return each column's sum as an integer number of 2^-320."""
        shifts = range(self.digits.shape[0])
        return [
            sum(int(d) << (DIGIT_BITS * s) for s, d in zip(shifts, column, strict=True))
            for column in self.digits.T.tolist()
        ]

    def _add_block(self, rest: Tensor) -> None:
        scratch = torch.empty_like(rest)
        top = _largest(rest)
        for k in range(HIGHEST, LOWEST - 1, -1):
            unit = 2.0 ** (DIGIT_BITS * k)
            if top < unit / 2:
                continue  # no value reaches this digit
            magic = 1.5 * 2.0**52 * unit
            # rounded to a multiple of `unit`
            digit = torch.add(rest, magic, out=scratch).sub_(magic)
            self.digits[k - LOWEST] += digit.sum(0).mul_(1.0 / unit).to(torch.int64).cpu()
            top = _largest(rest.sub_(digit))
            if top == 0.0:
                return

    def _carry(self) -> None:
        """Bring every digit but the highest into [0, 2^32): one representation per value, no overflow."""
        for k in range(self.digits.shape[0] - 1):
            carry = self.digits[k] >> DIGIT_BITS
            self.digits[k] -= carry << DIGIT_BITS
            self.digits[k + 1] += carry


def _largest(values: Tensor) -> float:
    """Return max |value|, 0 for none."""
    if values.numel() == 0:
        return 0.0
    low, high = values.aminmax()
    return max(-float(low), float(high))


UNIT = Fraction(1, 2 ** (-DIGIT_BITS * LOWEST))

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
        _check_width(x, self.d_in)
        for part in x.split(_BLOCK):
            block = part.float()
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

    @classmethod
    def beside(cls, parts: "Sequence[Moments]") -> "Moments":
        """Return the statistics of rows whose dimensions are those of all parts, which are of the same rows."""
        joined = cls(sum(part.d_in for part in parts))
        joined.n = parts[0].n
        joined._sum.digits = torch.cat([part._sum.digits for part in parts], 1)
        joined._square.digits = torch.cat([part._square.digits for part in parts], 1)
        return joined

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


def _check_width(x: Tensor, d_in: int) -> None:
    if x.ndim != 2 or x.shape[1] != d_in:
        raise UserError(f"rows of shape {tuple(x.shape)} where [rows, {d_in}] is needed")


def check_finite(x: Float[Tensor, "rows d_in"], first_row: int = 0, where: str = "") -> None:
    """Raise UserError naming the row and dimension of the first NaN or infinity in `x`."""
    if bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all()):
        return  # a finite sum proves that every term is finite
    row, dim = (int(i) for i in (~torch.isfinite(x)).nonzero()[0])
    value = float(x[row, dim])
    place = f"{where}: " if where else ""
    raise UserError(
        f"{place}activation is {value} at row {first_row + row}, dimension {dim}; "
        "remove or fix that row (a float16 model overflows: try --dtype bfloat16)"
    )


_ROWS_AT_ONCE = 4096
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
        self._cubes: Float64[Tensor, " d_in"] = torch.zeros(d_in, dtype=torch.float64)
        """Sum of |e|^2 e over the rows, e = x - mean."""
        self._fourths = 0.0
        """Sum of |e|^4."""

    def update(self, x: Float[Tensor, "rows d_in"]) -> None:
        """Add rows; raises UserError naming row and dimension of the first NaN or infinity."""
        _check_width(x, self.d_in)
        for part in x.split(_ROWS_AT_ONCE):
            if not len(part):
                continue
            check_finite(part, self.n)
            block = part.double().cpu()
            shifted = block - block[0]  # so a constant dimension is 0, not a rounding error
            offset = shifted.mean(0)
            deviation = shifted - offset
            other = Covariance(self.d_in)
            other.n, other.mean = len(block), block[0] + offset
            other._scatter = deviation.T @ deviation
            square = deviation.square().sum(1)
            other._cubes, other._fourths = square @ deviation, float(square @ square)
            self._join(other)

    def merge(self, other: "Covariance") -> None:
        """Add another stream's rows; equals one pass over both up to rounding."""
        if other.d_in != self.d_in:
            raise UserError(
                f"a covariance of width {other.d_in} cannot join one of width {self.d_in}"
            )
        self._join(other)

    @property
    def covariance(self) -> Float64[Tensor, "d_in d_in"]:
        """E[(x - mean)(x - mean)^T], over n rows, not n - 1; raises UserError when no row was seen."""
        if self.n == 0:
            raise UserError("no rows were seen, so there is no covariance; is the data empty?")
        return self._scatter / self.n

    def ledoit_wolf(self) -> float:
        """Return the share s for which (1 - s) C + s m I has the least expected squared error, m C's mean eigenvalue.

        s = min(b, d) / d with b = (E|e|^4 - |C|_F^2) / n and d = |C - m I|_F^2, e = x - mean (Ledoit & Wolf 2004).
        """
        C = self.covariance
        size, mean = float(C.square().sum()), float(C.trace()) / self.d_in
        away = size - self.d_in * mean**2
        return (
            min(max(0.0, self._fourths / self.n - size) / self.n, away) / away if away > 0 else 1.0
        )

    def _join(self, other: "Covariance") -> None:
        """Add another's sums, each taken about its own mean: both move to the mean of all."""
        if other.n == 0:
            return
        total = self.n + other.n
        apart = other.mean - self.mean if self.n else torch.zeros_like(other.mean)
        cubes, fourths = self._about(apart * (other.n / total))
        more, still_more = other._about(apart * (-self.n / total))
        self._cubes, self._fourths = cubes + more, fourths + still_more
        self._scatter += other._scatter + torch.outer(apart, apart) * (self.n * other.n / total)
        self.mean = self.mean + apart * (other.n / total) if self.n else other.mean.clone()
        self.n = total

    def _about(self, step: Float64[Tensor, " d_in"]) -> tuple[Float64[Tensor, " d_in"], float]:
        """Return the sums of |e - step|^2 (e - step) and of |e - step|^4."""
        trace, length = float(self._scatter.trace()), float(step @ step)
        pulled = self._scatter @ step
        cubes = self._cubes - trace * step - 2 * pulled - self.n * length * step
        fourths = self._fourths + 4 * float(step @ pulled) - 4 * float(step @ self._cubes)
        return cubes, fourths + 2 * length * trace + self.n * length**2
