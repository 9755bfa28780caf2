"""What is kept of the windows that go by, in memory fixed beforehand.

Per latent and side the strongest and random ones, and random ones for all latents together. "Random" is the smallest
of a seeded hash, so what is kept does not depend on how the rows were split.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt64

from wsae.core.seeds import mix64, seed_for
from wsae.evals.autointerp.config import ContextConfig

SLACK = 0.5
"""Room for new windows beside the kept ones, as a share of these: more needs more memory and fewer compactions."""
_BLOCK = 4096
"""Rows moved at once."""
_LATEST = np.uint64(2**64 - 1)


def priority(
    seed: int, window: Int64[np.ndarray, " n"], latent: Int64[np.ndarray, " n"] | int = -1
) -> UInt64[np.ndarray, " n"]:
    """Return a hash of (seed, window, latent), alike for all members: what is random is shared by those compared."""
    mixed = mix64(window.astype(np.uint64), seed_for(seed, "windows"))
    return mix64(mixed ^ np.asarray(latent).astype(np.uint64), seed_for(seed, "latents"))


class Pool:
    """Up to `size` windows of the smallest priority; a window's slot is its row in whatever is kept for it."""

    def __init__(self, size: int, seed: int) -> None:
        self._size, self._seed = size, seed
        self.window = np.zeros(0, dtype=np.int64)
        self._priority = np.zeros(0, dtype=np.uint64)

    def admit(self, window: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """Offer windows; return the slot of each, -1 where it was refused."""
        offered = priority(self._seed, window)
        have = len(self.window)
        joined = np.concatenate([self._priority, offered])
        kept = np.argsort(joined, kind="stable")[: self._size]
        stays = np.zeros(len(joined), dtype=bool)
        stays[kept] = True
        free = (~stays[:have]).nonzero()[0]
        entering = stays[have:].nonzero()[0]
        slots = np.concatenate([free, np.arange(have, have + len(entering) - len(free))])
        grown = np.full(max(have, len(kept)) - have, 0)
        self.window = np.concatenate([self.window, grown])
        self._priority = np.concatenate([self._priority, grown.astype(np.uint64)])
        self.window[slots], self._priority[slots] = window[entering], offered[entering]
        out = np.full(len(window), -1)
        out[entering] = slots
        return out


class Hits(NamedTuple):
    """Activations sorted by (window, latent)."""

    latent: Int64[np.ndarray, " hits"]
    window: Int64[np.ndarray, " hits"]
    side: Int64[np.ndarray, " hits"]
    offset: Int64[np.ndarray, " hits"]
    value: Float32[np.ndarray, " hits"]


class Kept(NamedTuple):
    """One latent's windows on one side: peak activation, activations, and rank among the strongest and the random."""

    window: Int64[np.ndarray, " n"]
    peak: Float32[np.ndarray, " n"]
    acts: Float32[np.ndarray, "n width"]
    top: Bool[np.ndarray, " n"]
    random: Bool[np.ndarray, " n"]


@dataclass(frozen=True)
class Size:
    """The shapes behind a member's memory."""

    cfg: ContextConfig
    d_sae: int
    latents: int
    """Latents tracked at once."""

    @property
    def kept(self) -> int:
        """Windows kept at most: the strongest and the random ones of each latent and side."""
        return 2 * self.latents * (self.cfg.n_top + self.cfg.reservoir)

    @property
    def rows(self) -> int:
        """Windows held at most: those kept, and new ones until the next compaction."""
        return self.kept + max(1, int(SLACK * self.kept))

    @property
    def bytes(self) -> int:
        """Memory: rows (4 width + 28) for windows with their activations, 2 d_sae 20 for the thresholds to enter."""
        return self.rows * (4 * self.cfg.width + 28) + 2 * self.d_sae * 20


class Reservoirs:
    """The strongest n_top and `reservoir` random activating windows of every tracked latent on each side.

    A new window enters when it beats the last one kept of its latent and side; the thresholds are renewed each time the
    room is full (`compact`), which is also when latents no longer tracked leave.
    """

    def __init__(self, size: Size) -> None:
        self._cfg, self._d_sae, self._kept = size.cfg, size.d_sae, size.kept
        self._n = 0
        self._group = np.empty(size.rows, dtype=np.int64)
        self._window = np.empty(size.rows, dtype=np.int64)
        self._priority = np.empty(size.rows, dtype=np.uint64)
        self._peak = np.empty(size.rows, dtype=np.float32)
        self._acts = np.empty((size.rows, size.cfg.width), dtype=np.float32)
        groups = 2 * size.d_sae
        self.seen: Int64[np.ndarray, " groups"] = np.zeros(groups, dtype=np.int64)
        """Activating windows by side x d_sae + latent."""
        self._above = np.full(groups, np.inf if not size.cfg.n_top else -np.inf, dtype=np.float32)
        self._before = np.full(groups, _LATEST if size.cfg.reservoir else 0, dtype=np.uint64)

    @property
    def bytes(self) -> int:
        """Memory of all arrays."""
        arrays = (self._group, self._window, self._priority, self._peak, self._acts)
        return sum(a.nbytes for a in (*arrays, self.seen, self._above, self._before))

    def add(self, hits: Hits, tracked: Bool[np.ndarray, " d_sae"]) -> None:
        """Offer the windows of some hits, whole windows only; `tracked` marks the latents to keep."""
        if not len(hits.latent):
            return
        edges = np.ones(len(hits.latent), dtype=bool)
        edges[1:] = (np.diff(hits.window) != 0) | (np.diff(hits.latent) != 0)
        starts = edges.nonzero()[0]
        latent, window = hits.latent[starts], hits.window[starts]
        group = hits.side[starts] * self._d_sae + latent
        self.seen += np.bincount(group, minlength=len(self.seen))
        peak = np.maximum.reduceat(hits.value, starts)
        rank = priority(self._cfg.seed, window, latent)
        ends = np.append(starts[1:], len(edges))
        left = self._enters(group, peak, rank).nonzero()[0]
        while len(left):
            now = left[: len(self._group) - self._n]
            rows = slice(self._n, self._n + len(now))
            self._group[rows], self._window[rows] = group[now], window[now]
            self._priority[rows], self._peak[rows] = rank[now], peak[now]
            self._fill(rows, hits, starts[now], ends[now])
            self._n = rows.stop
            left = left[len(now) :]
            if self._n == len(self._group):
                self.compact(tracked)
                left = left[self._enters(group[left], peak[left], rank[left])]

    def _enters(
        self,
        group: Int64[np.ndarray, " n"],
        peak: Float32[np.ndarray, " n"],
        rank: UInt64[np.ndarray, " n"],
    ) -> Bool[np.ndarray, " n"]:
        return (peak > self._above[group]) | (rank < self._before[group])

    def _fill(self, rows: slice, hits: Hits, starts: np.ndarray, ends: np.ndarray) -> None:
        """Write the activations starts[i] .. ends[i] of the hits as row i, zero elsewhere."""
        self._acts[rows] = 0
        counts = ends - starts
        row = np.repeat(np.arange(rows.start, rows.stop), counts)
        hit = np.arange(counts.sum()) + np.repeat(starts - np.cumsum(counts) + counts, counts)
        self._acts[row, hits.offset[hit]] = hits.value[hit]

    def compact(self, tracked: Bool[np.ndarray, " d_sae"]) -> None:
        """Drop what is among neither the strongest nor the random of its latent and side, and renew the thresholds."""
        group = self._group[: self._n]
        top, by_peak = self._ranked(-self._peak[: self._n], self._cfg.n_top)
        random, by_priority = self._ranked(self._priority[: self._n], self._cfg.reservoir)
        self._above[group[by_peak]] = self._peak[by_peak]
        self._before[group[by_priority]] = self._priority[by_priority]
        stays = ((top | random) & tracked[group % self._d_sae]).nonzero()[0]
        for first in range(0, len(stays), _BLOCK):  # ascending, so nothing is overwritten unread
            source = stays[first : first + _BLOCK]
            target = slice(first, first + len(source))
            for array in (self._group, self._window, self._priority, self._peak, self._acts):
                array[target] = array[source]
        self._n = len(stays)

    def _ranked(
        self, key: np.ndarray, n: int
    ) -> tuple[Bool[np.ndarray, " rows"], Int64[np.ndarray, " last"]]:
        """Return which rows are among the first n of their group by (key, window), and each full group's n-th row."""
        group = self._group[: self._n]
        order = np.lexsort((self._window[: self._n], key, group))
        ranked = group[order]
        rank = np.arange(self._n) - np.searchsorted(ranked, ranked)
        chosen = np.zeros(self._n, dtype=bool)
        chosen[order[rank < n]] = True
        return chosen, order[rank == n - 1]

    def kept(self, tracked: Bool[np.ndarray, " d_sae"]) -> "Shelf":
        """Return what is kept, ready to be looked up."""
        self.compact(tracked)
        top, _ = self._ranked(-self._peak[: self._n], self._cfg.n_top)
        random, _ = self._ranked(self._priority[: self._n], self._cfg.reservoir)
        order = np.lexsort((self._window[: self._n], self._group[: self._n]))
        columns = Kept(self._window, self._peak, self._acts, top, random)
        return Shelf(self._group[order], order, columns, self._d_sae)


class Shelf(NamedTuple):
    """Kept windows of all latents and sides."""

    group: Int64[np.ndarray, " n"]
    order: Int64[np.ndarray, " n"]
    columns: Kept
    d_sae: int

    def of(self, latent: int, side: int) -> Kept:
        """Return those of one latent on one side, in the text's order."""
        key = side * self.d_sae + latent
        rows = self.order[slice(*np.searchsorted(self.group, [key, key + 1]))]
        return Kept(*(column[rows] for column in self.columns))
