"""Where documents begin and end in token sequences, and which side of the evaluation each is on.

Documents are numbered in the text's order. The token that ends a document belongs to it. A document that runs on over
several sequences keeps its number, and so its side. An end-of-text token written out in a text splits it in two.
"""

from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64

from wsae.acts.tokens import TokenTable
from wsae.core.errors import UserError
from wsae.core.seeds import mix64
from wsae.evals.data import HeldOut

EXPLAIN, SCORE = 0, 1
SIDES = ("explain", "score")
_BLOCK = 256
"""Sequences of a table looked at together."""


@runtime_checkable
class Previewed(Protocol):
    """A source that knows the held-out tokens before their activations (a live model's text)."""

    def preview(self) -> Iterator[TokenTable]:
        """Yield the held-out sequences in order, a few at a time."""
        ...


class Spans(NamedTuple):
    """The documents of spans of tokens: of the first and of the last token, and the length of the sequence."""

    first: Int64[np.ndarray, " spans"]
    last: Int64[np.ndarray, " spans"]
    length: Int64[np.ndarray, " spans"]


class Documents:
    """Document numbers by sequence and position, read along a text; only the sequences asked for are in memory."""

    def __init__(self, tables: Iterator[TokenTable]) -> None:
        self._tables = tables
        self._first = self._next = self._base = 0
        self._lead = 0
        self._numbers: deque[Int64[np.ndarray, " seq_len"]] = deque()
        self._lengths: deque[int] = deque()
        self.seq_len = 0
        self._read()

    def of(
        self,
        seq: Int64[np.ndarray, " spans"],
        start: Int64[np.ndarray, " spans"],
        width: int,
    ) -> Spans:
        """Return the documents of the tokens start .. start + width - 1 (less where the sequence ends).

        Sequences ascend, also from call to call.
        """
        if not len(seq):
            return Spans(seq, seq, seq)
        self._forget(int(seq[0]))
        while self._next <= seq[-1]:
            if not self._read():
                raise UserError(
                    f"sequence {int(seq[-1])} has no tokens in the data; harvest them again"
                )
        row = seq - self._first
        numbers = np.stack(list(islice(self._numbers, int(row[-1]) + 1)))
        length = np.array(self._lengths)[row]
        stop = np.minimum(start + width, length)
        return Spans(numbers[row, start], numbers[row, stop - 1], length)

    def _forget(self, before: int) -> None:
        while self._first < before and (self._numbers or self._read()):
            self._numbers.popleft()
            self._lengths.popleft()
            self._first += 1

    def _read(self) -> bool:
        """Number the documents of the next sequences; False when there are none."""
        table = next(self._tables, None)
        if table is None:
            return False
        ids = table.ids.numpy()
        lengths = table.lengths.numpy().astype(np.int64)
        self.seq_len = ids.shape[1]
        self._numbers += list(self._numbered(ids, lengths, table.ends))
        self._lengths += lengths.tolist()
        self._next += len(ids)
        return True

    def _numbered(
        self, ids: np.ndarray, lengths: np.ndarray, ends: tuple[int, ...] | None
    ) -> Int64[np.ndarray, "n_seq seq_len"]:
        if ends is None:
            raise UserError(
                "the data do not say where documents end, so explaining and scoring cannot be kept apart; "
                "harvest with one document per sequence (pack false), or with a tokenizer that has an end token"
            )
        if not ends:
            number = np.arange(self._next, self._next + len(ids), dtype=np.int64)
            return np.broadcast_to(number[:, None], ids.shape)
        position = np.arange(ids.shape[1])
        end = np.isin(ids, ends) & (position < lengths[:, None])
        if self._next == 0 and len(
            ids
        ):  # a text does not start with an end: this is the token put before sequences
            self._lead = int(end[0, 0])
        end[:, : self._lead] = False
        total = end.sum(axis=1)
        base = self._base + np.cumsum(total) - total
        self._base += int(total.sum())
        return base[:, None] + np.cumsum(end, axis=1) - end


def documents_of(source: HeldOut) -> Documents:
    """Return the documents of the held-out text; raises UserError when the data have no text."""
    if isinstance(source, Previewed):
        return Documents(source.preview())
    table = source.tokens()
    if table is None:
        raise UserError(
            "the data are an array or of images, with no text to show; give a store of text (wsae harvest) or a model "
            "with --text"
        )
    return Documents(blocks(table))


def blocks(table: TokenTable) -> Iterator[TokenTable]:
    """Yield a table a few sequences at a time."""
    for first in range(0, len(table.ids), _BLOCK):
        part = slice(first, first + _BLOCK)
        yield TokenTable(table.ids[part], table.lengths[part], {}, table.ends)


def side_of(document: Int64[np.ndarray, " n"], key: int) -> Int64[np.ndarray, " n"]:
    """Return EXPLAIN or SCORE for each document: of documents 2i and 2i + 1 one is on each side, by a hash of i."""
    pair = mix64((document >> 1).astype(np.uint64), key)
    return ((pair & np.uint64(1)).astype(np.int64) + document) & 1
