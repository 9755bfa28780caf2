"""Exact sums of floating-point columns: the same bits for every split, order and number of workers.

A value is cut into 32-bit digits of a fixed-point number (Demmel & Nguyen 2015, "Parallel reproducible summation");
each digit is summed without rounding and kept as an integer, so addition is associative and merging is exact.
"""

from fractions import Fraction

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

DIGIT_BITS = 32
LOWEST, HIGHEST = -10, 7
"""Digits from 2^-320 to 2^256: holds every float32 and every square of one."""
MAX_ROWS = 1 << 14
"""Rows per inner sum: 2^14 digits under 2^33 stay under 2^53, so float64 adds them without rounding."""


class ExactSum:
    """Column sums of float64 values whose lowest bit is at least 2^-320, exact in any order."""

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
            digit = torch.add(rest, magic, out=scratch).sub_(
                magic
            )  # rounded to a multiple of `unit`
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
