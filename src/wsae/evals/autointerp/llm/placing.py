"""Where each document's fragment lies, found as the rows go by."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from wsae.acts.tokens import TokenTable
from wsae.core.errors import UserError
from wsae.core.seeds import mix64, seed_for
from wsae.evals.autointerp.documents import Documents
from wsae.evals.autointerp.llm.config import FragmentConfig
from wsae.evals.autointerp.windows import Windows, cut_windows


class Placed(NamedTuple):
    """The rows of a chunk that lie in fragments, and the fragments that get no more rows."""

    rows: Int64[np.ndarray, " rows"]
    fragment: Int64[np.ndarray, " rows"]
    offset: Int64[np.ndarray, " rows"]
    closed: Int64[np.ndarray, " closed"]


class _Fragment(NamedTuple):
    seq: int
    start: int
    document: int


class Placer:
    """One fragment per document, in its first part of a sequence that is long enough.

    Uniform over the starts there, by a hash of the document, so that it does not depend on how the rows are split.
    """

    def __init__(self, documents: Documents, cfg: FragmentConfig) -> None:
        self.width, self._limit = cfg.width, cfg.limit
        self._documents = documents
        self._key = seed_for(cfg.seed, "fragments")
        self._all: list[_Fragment] = []
        self._settled = -1
        self._seq, self._pos = -1, -1
        self._map = np.zeros(0, dtype=np.int64)
        self._n_closed = 0

    @property
    def n(self) -> int:
        """Complete fragments so far."""
        return self._n_closed

    @property
    def full(self) -> bool:
        """Whether the limit is reached."""
        return self._n_closed >= self._limit

    def document(self, fragment: int) -> int:
        """Return the document of a fragment."""
        return self._all[fragment].document

    def place(self, seq: Int64[np.ndarray, " rows"], pos: Int64[np.ndarray, " rows"]) -> Placed:
        """Place the next rows."""
        fragment = np.full(len(seq), -1)
        cuts = np.flatnonzero(np.diff(seq)) + 1
        for rows in np.split(np.arange(len(seq)), cuts) if len(seq) else ():
            self._enter(int(seq[rows[0]]))
            fragment[rows] = self._map[pos[rows]]
            self._pos = int(pos[rows[-1]])
        inside = np.flatnonzero(fragment >= 0)
        starts = np.array([self._all[f].start for f in fragment[inside].tolist()], dtype=np.int64)
        closed = np.arange(self._n_closed, self._before(self._seq))
        self._n_closed += len(closed)
        return Placed(inside, fragment[inside], pos[inside] - starts, closed)

    def last(self) -> Int64[np.ndarray, " closed"]:
        """Return the fragments still open after the last row, without one that may be incomplete."""
        whole = [f for f in self._all[self._n_closed :] if f.start + self.width <= self._pos + 1]
        closed = np.arange(self._n_closed, self._n_closed + len(whole))
        self._n_closed += len(closed)
        return closed

    def windows(self, number: Int64[np.ndarray, " n"], table: TokenTable) -> Windows:
        """Return fragments as windows."""
        chosen = [self._all[i] for i in number.tolist()]
        seq, start, document = np.array(chosen, dtype=np.int64).reshape(len(chosen), 3).T
        return cut_windows(table, seq, start, document, self.width)

    def _before(self, seq: int) -> int:
        """Return how many fragments lie in sequences before this one, at most the limit."""
        n = len(self._all)
        while n and self._all[n - 1].seq >= seq:
            n -= 1
        return max(n, self._n_closed)

    def _enter(self, seq: int) -> None:
        """Choose the fragments of a sequence when its first row comes."""
        if seq == self._seq:
            return
        if seq < self._seq:
            raise UserError("the held-out rows are not in the text's order; harvest the data again")
        self._seq = seq
        length = self._documents.seq_len
        place = np.arange(length)
        spans = self._documents.of(np.full(length, seq), place, 1)
        numbers = spans.first[: int(spans.length[0])]
        self._map = np.full(length, -1)
        for document in np.unique(numbers[numbers > self._settled]).tolist():
            first, last = np.flatnonzero(numbers == document)[[0, -1]].tolist()
            room = last + 1 - first - self.width
            if room < 0 or len(self._all) >= self._limit:
                continue
            hashed = mix64(np.array([document], dtype=np.uint64), self._key)
            start = first + int(hashed[0]) % (room + 1)
            self._map[start : start + self.width] = len(self._all)
            self._all.append(_Fragment(seq, start, document))
            self._settled = document
