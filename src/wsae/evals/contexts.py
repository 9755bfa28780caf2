"""Where latents fire: streaming contexts of every latent, the strongest of each sequence and random firings.

Of a context only the firings in reach of its window are kept, so memory depends on latents x contexts, not on the
number of tokens. Rows arrive sequence by sequence (the order `heldout` promises).
"""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int16, Int64
from torch import Tensor

from wsae.acts.tokens import REACH
from wsae.core.seeds import mix64, seed_for
from wsae.evals.latents import Entries

BEFORE = 2 / 3
"""Share of a window that lies before its strongest token: a latent reacts to what came earlier."""


def sample_latents(
    density: Float64[Tensor, " d_sae"], n_latents: int, seed: int, *names: str
) -> Int64[Tensor, " latents"]:
    """Return up to n_latents live latents, one drawn at random from each of n equal-count density strata, sorted."""
    alive = density.nonzero()[:, 0]
    ranked = alive[density[alive].argsort(stable=True)]
    if len(ranked) <= n_latents:
        return ranked.sort().values
    picks = one_per_stratum(len(ranked), n_latents, seed_for(seed, "contexts", *names))
    return ranked[torch.from_numpy(picks)].sort().values


def one_per_stratum(n_ranked: int, n: int, seed: int) -> Int64[np.ndarray, " n"]:
    """Return a random place in each of n runs of equal length (they differ by one at most) of n_ranked >= n places."""
    edges = np.arange(n + 1) * n_ranked // n
    share = np.random.default_rng(seed).random(n)
    return edges[:-1] + (share * np.diff(edges)).astype(np.int64)


class Firings(NamedTuple):
    """Active entries: latent, number of the window (or sequence), place in it, activation."""

    latent: Int64[np.ndarray, " n"]
    window: Int64[np.ndarray, " n"]
    offset: Int64[np.ndarray, " n"]
    value: Float32[np.ndarray, " n"]

    def take(self, keep: np.ndarray | slice) -> "Firings":
        """Return the entries at `keep` (mask, index or slice)."""
        return Firings(*(column[keep] for column in self))

    @staticmethod
    def join(*parts: "Firings") -> "Firings":
        """Concatenate."""
        return Firings(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


_NONE = np.zeros(0, dtype=np.int64)
NO_FIRINGS = Firings(_NONE, _NONE, _NONE, _NONE.astype(np.float32))


def places(groups: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """Return each entry's place in its group, from 0 on; the groups ascend."""
    starts = np.flatnonzero(np.diff(groups, prepend=groups[:1] - 1))
    return np.arange(len(groups)) - np.repeat(starts, np.diff(starts, append=len(groups)))


class Wanted(NamedTuple):
    """What is kept of each latent: its strongest firings, each from another sequence, and firings drawn at random."""

    strongest: int
    width: int
    """Tokens of a window: what fires in its reach is kept."""
    random: int = 0
    seed: int = 0


class Kept(NamedTuple):
    """Contexts of many latents, by latent and in the text's order: where each peaks, and what fires around it.

    Context i owns `size[i]` entries of `offset` (from the peak) and `act`, in the order of the contexts.
    """

    latent: Int64[np.ndarray, " n"]
    seq: Int64[np.ndarray, " n"]
    pos: Int64[np.ndarray, " n"]
    value: Float32[np.ndarray, " n"]
    draw: Int64[np.ndarray, " n"]
    """A hash of seed and place: the smallest of a latent are its random firings."""
    best: Bool[np.ndarray, " n"]
    """Whether it is the strongest firing of its sequence."""
    top: Bool[np.ndarray, " n"]
    random: Bool[np.ndarray, " n"]
    size: Int64[np.ndarray, " n"]
    offset: Int16[np.ndarray, " entries"]
    act: Float32[np.ndarray, " entries"]

    def take(self, rows: Int64[np.ndarray, " m"]) -> "Kept":
        """Return the contexts at `rows`."""
        inside = spans_of((np.cumsum(self.size) - self.size)[rows], self.size[rows])
        columns = (column[rows] for column in self[:-2])
        return Kept._make((*columns, self.offset[inside], self.act[inside]))

    def contexts(self) -> list["Context"]:
        """Return each as an object."""
        ends = np.cumsum(self.size)
        out = []
        columns = (self.seq.tolist(), self.pos.tolist(), self.value.tolist(), self.size.tolist())
        for seq, pos, value, count, end in zip(*columns, ends.tolist(), strict=True):
            part = slice(end - count, end)
            places = (self.offset[part].astype(np.int64) + pos).tolist()
            acts = dict(zip(places, self.act[part].tolist(), strict=True))
            out.append(Context(seq, pos, value, acts))
        return out


_FLAGS = np.zeros(0, dtype=bool)
_KEPT = Kept(
    *(_NONE, _NONE, _NONE, _NONE.astype(np.float32), _NONE, _FLAGS, _FLAGS, _FLAGS, _NONE),
    *(_NONE.astype(np.int16), _NONE.astype(np.float32)),
)
CHUNK = 1 << 18
"""Firings gathered before they are looked at."""
CELLS = 1 << 24
"""Pairs of latent and sequence looked at together, at most (a byte each)."""


class _Rows(NamedTuple):
    """Rows in the text's order, and what fires in them."""

    seq: Int64[np.ndarray, " rows"]
    pos: Int64[np.ndarray, " rows"]
    row: Int64[np.ndarray, " n"]
    latent: Int64[np.ndarray, " n"]
    value: Float32[np.ndarray, " n"]

    @staticmethod
    def join(parts: "list[_Rows]") -> "_Rows":
        """Concatenate."""
        starts = np.cumsum([0, *(len(part.seq) for part in parts)]).tolist()
        moved = [
            part._replace(row=part.row + start)
            for part, start in zip(parts, starts[:-1], strict=True)
        ]
        return _Rows(*(np.concatenate(columns) for columns in zip(*moved, strict=True)))

    def part(self, first: int, last: int) -> "_Rows":
        """Return the rows from one to before another."""
        rows, inside = slice(first, last), slice(*np.searchsorted(self.row, [first, last]))
        columns = (self.row[inside] - first, self.latent[inside], self.value[inside])
        return _Rows(self.seq[rows], self.pos[rows], *columns)


def spans_of(
    starts: Int64[np.ndarray, " n"], counts: Int64[np.ndarray, " n"]
) -> Int64[np.ndarray, " total"]:
    """Return start, start + 1, ... for each of some spans, one after the other."""
    return np.arange(counts.sum()) + np.repeat(starts - np.cumsum(counts) + counts, counts)


def within(
    where: Int64[np.ndarray, " all"], at: Int64[np.ndarray, " n"], reach: int, step: int
) -> Int64[np.ndarray, " n"]:
    """Return how many entries before (step -1) or after (1) each entry at `at` are in its reach; `where` ascends.

    Few have any: a step at a time, with those that are still in reach, takes a third of two binary searches.
    """
    many = np.zeros(len(at), dtype=np.int64)
    fenced = np.concatenate([where[:1] - reach - 1, where, where[-1:] + reach + 1])
    left, look, of = np.arange(len(at)), at + 1 + step, where[at]
    while len(left):
        inside = np.flatnonzero(np.abs(fenced[look] - of) <= reach)
        left, look, of = left[inside], look[inside] + step, of[inside]
        many[left] += 1
    return many


def by_latent(latent: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """Return the order by latent that keeps the order within one; narrow numbers sort faster."""
    if len(latent) and latent.max() < 1 << 16:
        return latent.astype(np.uint16).argsort(kind="stable")
    return torch.from_numpy(latent.astype(np.int32)).argsort(stable=True).numpy()


def by_strength(
    latent: Int64[np.ndarray, " n"], value: Float32[np.ndarray, " n"]
) -> Int64[np.ndarray, " n"]:
    """Return the order by latent, its largest value first (values above 0); ties keep their order."""
    key = latent << 32 | (1 << 31) - value.view(np.int32).astype(np.int64)
    return torch.from_numpy(key).argsort(stable=True).numpy()


def kept_bytes(wanted: Wanted, latents: int) -> int:
    """Return about what the contexts of so many latents hold in memory, whatever the number of tokens."""
    return int(latents * (wanted.strongest + wanted.random) * (1 + SLACK) * (52 + 6 * 4))


SLACK = 0.5
"""Room for new contexts beside the kept ones: more needs more memory and less time."""


class TopContexts:
    """Running contexts of some latents of one member; the result does not depend on how the rows were split.

    A firing is looked at twice: is it above the weakest of its latent's strongest, is its draw below the largest of its
    latent's random ones? Few are, and only these are ranked, with what fires in their sequences.
    """

    def __init__(self, latents: Int64[Tensor, " latents"], d_sae: int, wanted: Wanted) -> None:
        self.latents, self.wanted = latents, wanted
        self.sequences: Int64[np.ndarray, " d_sae"] = np.zeros(d_sae, dtype=np.int64)
        """In how many sequences each of them fires."""
        self._is_shown = torch.zeros(d_sae, dtype=torch.bool)
        self._is_shown[latents] = True
        self._open: list[_Rows] = []
        self._kept, self._unsorted = _KEPT, 0
        self._fresh: list[Kept] = []
        self._floor = np.zeros(d_sae, dtype=np.float32)
        self._ceiling = np.full(d_sae, 1 << 32 if wanted.random else 0)

    def update(
        self, entries: Entries, seq: Int64[Tensor, " batch"], pos: Int64[Tensor, " batch"]
    ) -> None:
        """Add the codes of some rows; `seq` and `pos` place each row."""
        if not len(seq):
            return
        columns = (entries.rows, entries.indices, entries.values)
        if len(self.latents) < len(self._is_shown):
            shown = self._is_shown[entries.indices]
            columns = tuple(column[shown] for column in columns)
        row, latent, value = (column.numpy() for column in columns)
        self._open.append(_Rows(seq.numpy(), pos.numpy(), row, latent, value.astype(np.float32)))
        if sum(len(part.latent) for part in self._open) >= CHUNK:
            rows = _Rows.join(self._open)
            whole = int(np.argmax(rows.seq == rows.seq[-1]))
            self._open = [rows.part(whole, len(rows.seq))]
            self._add(rows.part(0, whole))

    def _add(self, rows: _Rows) -> None:
        """Look at some whole sequences, as many together as have room."""
        number = np.cumsum(np.diff(rows.seq, prepend=rows.seq[:1]) != 0)
        together = max(1, CELLS // len(self._floor))
        edges = [*np.flatnonzero(np.diff(number // together, prepend=-1)).tolist(), len(number)]
        for first, last in pairwise(edges):
            self._look(rows.part(first, last), number[first:last] - number[first])

    def _look(self, rows: _Rows, number: Int64[np.ndarray, " rows"]) -> None:
        """Pass on what fires in the same sequences as a firing that may be kept; `number` counts the sequences."""
        latent, n = rows.latent, int(number[-1]) + 1
        place = (rows.seq.astype(np.uint64) << np.uint64(32)) | rows.pos.astype(np.uint64)
        draw = (mix64(place, self.wanted.seed) >> np.uint64(32)).astype(np.int64)
        cell = latent * n + number[rows.row]
        seen = np.zeros(len(self._floor) * n, dtype=bool)
        seen[cell] = True
        self.sequences += np.count_nonzero(seen.reshape(-1, n), axis=1)
        may = (rows.value > self._floor[latent]) | (draw[rows.row] < self._ceiling[latent])
        seen[:] = False
        seen[cell[np.flatnonzero(may)]] = True  # by number: several times as fast as by mask
        near = np.flatnonzero(seen[cell])
        near = near[by_latent(latent[near])]
        row = rows.row[near]
        firings = Firings(latent[near], rows.seq[row], rows.pos[row], rows.value[near])
        self._keep(firings, cell[near], draw[row], may[near])

    def _keep(
        self,
        firings: Firings,
        group: Int64[np.ndarray, " n"],
        draw: Int64[np.ndarray, " n"],
        may: Bool[np.ndarray, " n"],
    ) -> None:
        """Keep those that may be, where they are the strongest of their sequence or drawn; groups ascend."""
        if not len(group):
            return
        latent, _, pos, value = firings
        reach = self.wanted.width - 1
        where = group * (int(pos.max()) + reach + 2) + pos
        starts = np.flatnonzero(np.diff(group, prepend=-1))  # more than `reach` lies between two
        peak = np.repeat(np.maximum.reduceat(value, starts), np.diff(starts, append=len(group)))
        high = np.flatnonzero(value == peak)
        best = np.zeros(len(group), dtype=bool)
        best[high[np.diff(group[high], prepend=-1) != 0]] = True
        at = np.flatnonzero(may & (best | (draw < self._ceiling[latent])))
        before, after = within(where, at, reach, -1), within(where, at, reach, 1)
        count = before + 1 + after
        inside = spans_of(at - before, count)
        offset = (pos[inside] - np.repeat(pos[at], count)).astype(np.int16)
        no = np.zeros(len(at), dtype=bool)
        columns = (*firings.take(at), draw[at], best[at], no, no, count, offset, value[inside])
        self._fresh.append(Kept._make(columns))
        self._unsorted += len(at)
        if self._unsorted > SLACK * len(self._kept.latent):
            self._prune()

    def _prune(self) -> None:
        """Drop what is among neither the strongest nor the random of its latent, and renew what is asked of others."""
        parts = [self._kept, *self._fresh]
        kept = Kept(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
        del parts, self._fresh[:]
        no = np.zeros(len(kept.latent), dtype=bool)
        kept, self._unsorted = kept._replace(top=no, random=no.copy()), 0
        rows = np.flatnonzero(kept.best & (kept.value >= self._floor[kept.latent]))
        rows = rows[by_strength(kept.latent[rows], kept.value[rows])]
        chosen, last = first_of_each(kept.latent[rows], self.wanted.strongest)
        kept.top[rows[chosen]] = True
        self._floor[kept.latent[rows[last]]] = kept.value[rows[last]]
        rows = np.flatnonzero(kept.draw <= self._ceiling[kept.latent])
        key = torch.from_numpy(kept.latent[rows] << 32 | kept.draw[rows])
        rows = rows[key.argsort(stable=True).numpy()]
        chosen, last = first_of_each(kept.latent[rows], self.wanted.random)
        kept.random[rows[chosen]] = True
        self._ceiling[kept.latent[rows[last]]] = kept.draw[rows[last]]
        self._kept = kept.take(np.flatnonzero(kept.top | kept.random))

    def kept(self) -> Kept:
        """Return the contexts of all latents, when all rows have gone by."""
        if self._open:
            self._add(_Rows.join(self._open))
            self._open = []
        self._prune()
        return self._kept.take(by_latent(self._kept.latent))

    def result(self) -> dict[int, list["Context"]]:
        """Return each latent's strongest contexts, strongest first: the peak and every activation in its reach."""
        kept = self.kept()
        rows = np.flatnonzero(kept.top)
        rows = rows[by_strength(kept.latent[rows], kept.value[rows])]
        out: dict[int, list[Context]] = {int(latent): [] for latent in self.latents}
        for latent, found in zip(
            kept.latent[rows].tolist(), kept.take(rows).contexts(), strict=True
        ):
            out[latent].append(found)
        return out


class Ranked(NamedTuple):
    """Which entries are among the first of their latent, and each full latent's last of these."""

    chosen: Bool[np.ndarray, " n"]
    last: Int64[np.ndarray, " latents"]


def first_of_each(latent: Int64[np.ndarray, " n"], n: int) -> Ranked:
    """Return the first n entries of each latent; the latents ascend."""
    chosen, full = np.ones(len(latent), dtype=bool), np.zeros(len(latent), dtype=bool)
    chosen[n:] = latent[n:] != latent[: max(0, len(latent) - n)]
    before = max(0, n - 1)
    full[before:] = latent[before:] == latent[: max(0, len(latent) - before)]
    return Ranked(chosen, np.flatnonzero(chosen & full))


def span_of(pos: int, length: int, width: int) -> slice:
    """Return the window around a place in a sequence: more of it lies before the place, none outside."""
    start = max(0, min(pos - int(width * BEFORE), length - width))
    return slice(start, min(length, start + width))


class Context(NamedTuple):
    """One place where a latent fires: its activation there, and by position in reach."""

    seq: int
    pos: int
    value: float
    acts: dict[int, float]

    def window(
        self, ids: Int64[Tensor, " length"], decode: Callable[..., list[str]], width: int
    ) -> dict[str, list[str] | list[float] | int]:
        """Return the tokens around the peak with their activations, JSON-ready.

        `decode` (ids, part) -> texts of the part (`TokenTable.decode`).
        """
        part = span_of(self.pos, len(ids), width)
        start, stop = part.start, part.stop
        first = max(0, start - REACH)
        shown = ids[first : stop + REACH].tolist()
        return {
            "tokens": decode(shown, slice(start - first, stop - first)),
            "acts": [float(f"{self.acts.get(p, 0.0):.4g}") for p in range(start, stop)],
            "peak": self.pos - start,
            "seq": self.seq,
        }
