"""Documents and windows of text, and what a latent does in them: what collection hands to every scorer.

Documents are numbered in the text's order. The token that ends a document belongs to it. A document that runs on over
several sequences keeps its number, and so its side: explaining and scoring share no document. An end-of-text token
written out in a text splits it in two.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, Int64

from wsae.acts.stream import HeldOut
from wsae.acts.tokens import REACH, TokenTable
from wsae.core.errors import UserError
from wsae.core.seeds import mix64, seed_for
from wsae.evals.config import FragmentConfig

EXPLAIN, SCORE = 0, 1
SIDES = ("explain", "score")
_BLOCK = 256
"""Sequences of a table looked at together."""


@dataclass(frozen=True)
class Windows:
    """Distinct windows of `width` tokens or fewer, each once, whoever shows them; -1 pads `ids`."""

    ids: Int32[np.ndarray, "windows width"]
    seq: Int64[np.ndarray, " windows"]
    start: Int64[np.ndarray, " windows"]
    """Position of the first token in its sequence."""
    document: Int64[np.ndarray, " windows"]
    decode: Callable[..., list[str]]
    """(token ids, part of them) -> the texts of the part, leading spaces included (`TokenTable.decode`)."""
    beyond: Int32[np.ndarray, "windows beyond"] | None = None
    """The ids just before and just after each window, as many of each: a character may be split there."""

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.ids)

    def tokens(self, window: int) -> list[str]:
        """Return the texts of a window's tokens."""
        ids = self.ids[window]
        inside = ids[ids >= 0].tolist()
        if self.beyond is None:
            return self.decode(inside)
        before, after = (side[side >= 0].tolist() for side in np.split(self.beyond[window], 2))
        part = slice(len(before), len(before) + len(inside))
        return self.decode([*before, *inside, *after], part)

    def text(self, window: int) -> str:
        """Return a window as one string."""
        return "".join(self.tokens(window))


def cut_windows(
    table: TokenTable,
    seq: Int64[np.ndarray, " windows"],
    start: Int64[np.ndarray, " windows"],
    document: Int64[np.ndarray, " windows"],
    width: int,
) -> Windows:
    """Return the windows that begin at `start` of sequences `seq`, shorter where a sequence ends."""

    def taken(first: int, stop: int) -> Int32[np.ndarray, "windows _"]:
        place = start[:, None] + np.arange(first, stop)
        inside = (place >= 0) & (place < table.lengths.numpy()[seq][:, None])
        ids = table.ids.numpy()[seq[:, None], np.where(inside, place, 0)]
        return np.where(inside, ids, -1).astype(np.int32)

    beyond = np.concatenate([taken(-REACH, 0), taken(width, width + REACH)], axis=1)
    return Windows(taken(0, width), seq, start, document, table.decode, beyond)


@dataclass(frozen=True)
class Shown:
    """Some windows of one latent: rows of `Windows`, and its activation on each token (0 where silent or padded)."""

    window: Int64[np.ndarray, " n"]
    acts: Float32[np.ndarray, "n width"]

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.window)


@dataclass(frozen=True)
class LatentContexts:
    """One latent's windows in every role."""

    latent: int
    density: float
    """Share of the collected tokens on which it fires."""
    peak: float
    """Its largest activation on them."""
    explain: Shown
    """Activating, from explaining documents, strongest first."""
    positive: Shown
    """Activating, from scoring documents."""
    negative: Shown
    """Random windows of scoring documents in which it is silent."""
    hard: Shown
    """Windows of scoring documents in which it is silent and a neighbour is not; may be empty."""

    def scored(self) -> tuple[Shown, Shown, Shown]:
        """Return the windows that are scored: positive, negative and hard."""
        return self.positive, self.negative, self.hard


@dataclass(frozen=True)
class Collected:
    """One member's latents with their contexts, and those left out for want of them."""

    windows: Windows
    latents: list[LatentContexts]
    skipped: dict[str, int]
    """Reason ("silent", "few windows", "few silent windows") -> latents of the sample left out for it."""
    counts: dict[str, int] = field(default_factory=dict)
    """Complete windows of the pass: "explain", "score", and "straddling" two documents (dropped)."""
    left_out: dict[int, str] = field(default_factory=dict)
    """Latent -> the reason for which it was skipped."""


@dataclass(frozen=True)
class LatentFragments:
    """One latent's fragments by role, all from different documents."""

    latent: int
    density: float
    """Share of the fragments' tokens on which it fires."""
    explain: Shown
    top: Shown
    random: Shown


@dataclass(frozen=True)
class Fragments:
    """One member's latents with their fragments, and those skipped."""

    windows: Windows
    latents: list[LatentFragments]
    skipped: dict[str, int] = field(default_factory=dict)
    """Reason -> latents skipped for it."""
    n_fragments: int = 0


class Spans(NamedTuple):
    """The documents of spans of tokens: of the first and of the last token, and the length of the sequence."""

    first: Int64[np.ndarray, " spans"]
    last: Int64[np.ndarray, " spans"]
    length: Int64[np.ndarray, " spans"]


class Documents:
    """Document numbers by sequence and position, read along a text; only the sequences asked for are in memory."""

    def __init__(self, tables: Iterator[TokenTable]) -> None:
        self._tables = tables
        self._first = self._next = self._base = self._lead = 0
        self._kept: deque[tuple[Int64[np.ndarray, " seq_len"], int]] = deque()
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
        while self._first < seq[0] or self._next <= seq[-1]:
            if self._kept and self._first < seq[0]:
                self._kept.popleft()
                self._first += 1
            elif not self._read():
                raise UserError(
                    f"sequence {int(seq[-1])} has no tokens in the data; harvest them again"
                )
        row = seq - self._first
        kept = list(islice(self._kept, int(row[-1]) + 1))
        numbers, length = np.stack([one for one, _ in kept]), np.array([n for _, n in kept])[row]
        stop = np.minimum(start + width, length)
        return Spans(numbers[row, start], numbers[row, stop - 1], length)

    def _read(self) -> bool:
        """Number the documents of the next sequences; False when there are none."""
        table = next(self._tables, None)
        if table is None:
            return False
        ids, lengths = table.ids.numpy(), table.lengths.tolist()
        self.seq_len = ids.shape[1]
        self._kept += zip(self._numbered(ids, lengths, table.ends), lengths, strict=True)
        self._next += len(ids)
        return True

    def _numbered(
        self, ids: np.ndarray, lengths: list[int], ends: tuple[int, ...] | None
    ) -> Int64[np.ndarray, "n_seq seq_len"]:
        if ends is None:
            raise UserError(
                "the data do not say where documents end, so explaining and scoring cannot be kept apart; "
                "harvest with one document per sequence (pack false), or with a tokenizer that has an end token"
            )
        if not ends:
            number = np.arange(self._next, self._next + len(ids), dtype=np.int64)
            return np.broadcast_to(number[:, None], ids.shape)
        end = np.isin(ids, ends) & (np.arange(ids.shape[1]) < np.array(lengths)[:, None])
        if self._next == 0 and len(ids):
            self._lead = int(end[0, 0])  # no end starts a text: the token put before sequences
        end[:, : self._lead] = False
        total = end.sum(axis=1)
        base = self._base + np.cumsum(total) - total
        self._base += int(total.sum())
        return base[:, None] + np.cumsum(end, axis=1) - end


def documents_of(source: HeldOut) -> Documents:
    """Return the documents of the held-out text; raises UserError when the data have no text."""
    preview = getattr(source, "preview", None)  # a live model's: tokens before their activations
    if preview is not None:
        return Documents(preview())
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
        if 0 < self.seq_len < width:
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

    def slab(self, seq: Int64[np.ndarray, " rows"], pos: Int64[np.ndarray, " rows"]) -> Slab:
        """Place the next rows (at least one)."""
        per_row = np.concatenate([self._open, seq * self.per_seq + pos // self.width])
        steps = np.diff(per_row)
        if (steps < 0).any():
            raise UserError("the held-out rows are not in the text's order; harvest the data again")
        number = per_row[np.concatenate([[True], steps > 0])]
        row_window = np.concatenate([[0], np.cumsum(steps > 0)])[len(self._open) :]
        start = number % self.per_seq * self.width
        spans = self._documents.of(number // self.per_seq, start, self.width)
        side = side_of(spans.first, self._key)
        side[spans.first != spans.last] = DROPPED
        closed = len(number) - 1
        self._count(side[:closed])
        self._open, self._open_side = number[-1:], int(side[-1])
        self._open_whole = int(pos[-1]) + 1 == min(start[-1] + self.width, spans.length[-1])
        return Slab(number, side, row_window, pos % self.width, closed)

    def last(self) -> Slab:
        """Return the window still open after the last row as closed, dropped if it may be incomplete."""
        side = np.full(len(self._open), self._open_side if self._open_whole else DROPPED)
        if self._open_whole:
            self._count(side)
        none = np.zeros(0, dtype=np.int64)
        return Slab(self._open, side, none, none, closed=len(side))

    def windows(self, number: Int64[np.ndarray, " windows"], table: TokenTable) -> Windows:
        """Return windows by their number, with their text."""
        seq, start = number // self.per_seq, number % self.per_seq * self.width
        document = Documents(blocks(table)).of(seq, start, self.width).first
        return cut_windows(table, seq, start, document, self.width)

    def _count(self, side: Int64[np.ndarray, " windows"]) -> None:
        for name, n in zip((STRADDLING, *SIDES), np.bincount(side + 1, minlength=3), strict=True):
            self.counts[name] += int(n)


class FragmentTiling:
    """One fragment of `width` tokens per document, in its first part of a sequence that is long enough.

    Uniform over the starts there, by a hash of the document, so that it does not depend on how the rows are split. A
    fragment has its document's number, and is closed when a row at or after its last token was seen.
    """

    def __init__(self, documents: Documents, cfg: FragmentConfig) -> None:
        self.width, self._limit = cfg.width, cfg.limit
        self._documents, self._key = documents, seed_for(cfg.seed, "fragments")
        self._place: dict[int, tuple[int, int]] = {}
        self._ends: list[tuple[int, int]] = []
        self._seen = (-1, 0)
        self._settled = -1
        self._here = self._open = np.zeros(0, dtype=np.int64)

    @property
    def n(self) -> int:
        """Complete fragments so far, those of whose rows none was seen too."""
        return bisect_right(self._ends, self._seen)

    def slab(
        self, seq: Int64[np.ndarray, " rows"], pos: Int64[np.ndarray, " rows"]
    ) -> tuple[Int64[np.ndarray, " inside"], Slab]:
        """Return which of the next rows lie in fragments, and place these."""
        document = np.full(len(seq), -1)
        cuts = np.flatnonzero(np.diff(seq)) + 1
        for rows in np.split(np.arange(len(seq)), cuts) if len(seq) else ():
            self._enter(int(seq[rows[0]]))
            document[rows] = self._here[pos[rows]]
            self._seen = (int(seq[rows[-1]]), int(pos[rows[-1]]) + 1)
        inside = np.flatnonzero(document >= 0)
        touched = np.concatenate([self._open, document[inside]])
        number, window = np.unique(touched, return_inverse=True)
        window = window[len(self._open) :]
        places = [self._place[one] for one in number.tolist()]
        starts = np.array([start for _, start in places], dtype=np.int64)
        closed = sum((at, start + self.width) <= self._seen for at, start in places)
        self._open = number[closed:]
        side = np.full(len(number), EXPLAIN)
        return inside, Slab(number, side, window, pos[inside] - starts[window], closed)

    def windows(self, number: Int64[np.ndarray, " n"], table: TokenTable) -> Windows:
        """Return fragments as windows."""
        places = [self._place[one] for one in number.tolist()]
        seq, start = np.array(places, dtype=np.int64).reshape(-1, 2).T
        return cut_windows(table, seq, start, number, self.width)

    def _enter(self, seq: int) -> None:
        """Choose the fragments of a sequence when its first row comes."""
        if seq == self._seen[0]:
            return
        if seq < self._seen[0]:
            raise UserError("the held-out rows are not in the text's order; harvest the data again")
        length = self._documents.seq_len
        spans = self._documents.of(np.full(length, seq), np.arange(length), 1)
        numbers = spans.first[: int(spans.length[0])]
        self._here = np.full(length, -1)
        for document in np.unique(numbers[numbers > self._settled]).tolist():
            first, last = np.flatnonzero(numbers == document)[[0, -1]].tolist()
            room = last + 1 - first - self.width
            if room < 0 or len(self._place) >= self._limit:
                continue
            hashed = mix64(np.array([document], dtype=np.uint64), self._key)
            start = first + int(hashed[0]) % (room + 1)
            self._here[start : start + self.width] = document
            self._place[document] = (seq, start)
            self._ends.append((seq, start + self.width))
            self._settled = document
