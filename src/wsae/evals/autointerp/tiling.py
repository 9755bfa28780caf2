"""Rows of held-out data to windows of text: which window each row is in, and which windows are complete."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from wsae.core.errors import UserError
from wsae.evals.autointerp.documents import SIDES, Documents, side_of

DROPPED = -1
"""Side of a window that is not used."""
STRADDLING = "straddling"


@dataclass(frozen=True)
class Slab:
    """The windows that some consecutive rows touch, in order; the last one may go on in the rows to come."""

    number: Int64[np.ndarray, " windows"]
    side: Int64[np.ndarray, " windows"]
    row_window: Int64[np.ndarray, " rows"]
    """Window of each row, counted in this slab."""
    row_offset: Int64[np.ndarray, " rows"]
    """Place of each row in its window."""
    closed: int
    """Windows that get no more rows: all, or all but the last, which is window 0 of the next slab."""


class Tiling:
    """Windows of `width` tokens that tile every sequence from position 0, numbered in the text's order.

    A window is seen when it holds a held-out row. Windows with tokens of two documents are dropped and counted, rather
    than cut: cut ones would be shorter, and a latent is silent more often in a shorter window. So is the last window of
    the pass, unless its last token was seen: the rows end at a limit, not at a border of windows.
    """

    def __init__(self, documents: Documents, width: int, key: int) -> None:
        self.seq_len = documents.seq_len
        if self.width_too_large(width):
            raise UserError(
                f"windows of {width} tokens are wider than the sequences, which have {self.seq_len}; "
                "lower the width or harvest longer sequences"
            )
        self.width, self.per_seq = width, -(-self.seq_len // width)
        self.counts: dict[str, int] = dict.fromkeys((*SIDES, STRADDLING), 0)
        """Complete windows per side, and those dropped."""
        self._documents, self._key = documents, key
        self._open = np.zeros(0, dtype=np.int64)
        self._open_side, self._open_whole = DROPPED, False

    def width_too_large(self, width: int) -> bool:
        """Say whether no window would fit."""
        return 0 < self.seq_len < width

    def slab(self, seq: Int64[np.ndarray, " rows"], pos: Int64[np.ndarray, " rows"]) -> Slab:
        """Place the next rows (at least one)."""
        per_row = np.concatenate([self._open, seq * self.per_seq + pos // self.width])
        steps = np.diff(per_row)
        if (steps < 0).any():
            raise UserError("the held-out rows are not in the text's order; harvest the data again")
        number = per_row[np.concatenate([[True], steps > 0])]
        row_window = np.concatenate([[0], np.cumsum(steps > 0)])[len(self._open) :]
        side, stop = self._placed(number)
        closed = len(number) - 1
        self._count(side[:closed])
        self._open, self._open_side = number[-1:], int(side[-1])
        self._open_whole = int(pos[-1]) + 1 == stop[-1]
        return Slab(number, side, row_window, pos % self.width, closed)

    def last(self) -> Slab:
        """Return the window still open after the last row as closed, dropped if it may be incomplete."""
        side = np.full(len(self._open), self._open_side if self._open_whole else DROPPED)
        if self._open_whole:
            self._count(side)
        none = np.zeros(0, dtype=np.int64)
        return Slab(self._open, side, none, none, closed=len(side))

    def _placed(
        self, number: Int64[np.ndarray, " windows"]
    ) -> tuple[Int64[np.ndarray, " windows"], Int64[np.ndarray, " windows"]]:
        """Return each window's side, and the position after its last token."""
        start = number % self.per_seq * self.width
        spans = self._documents.of(number // self.per_seq, start, self.width)
        side = side_of(spans.first, self._key)
        side[spans.first != spans.last] = DROPPED
        return side, np.minimum(start + self.width, spans.length)

    def _count(self, side: Int64[np.ndarray, " windows"]) -> None:
        for name, n in zip((STRADDLING, *SIDES), np.bincount(side + 1, minlength=3), strict=True):
            self.counts[name] += int(n)
