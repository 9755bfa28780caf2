"""Where latents fire: streaming contexts of every latent, the strongest of each sequence and random firings.

Of a context only the firings in reach of its window are kept, so memory depends on latents x contexts, not on the
number of tokens. Rows arrive sequence by sequence (the order `heldout` promises).
"""

from collections.abc import Callable
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
    return np.arange(len(groups)) - np.searchsorted(groups, groups)


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


def spans_of(
    starts: Int64[np.ndarray, " n"], counts: Int64[np.ndarray, " n"]
) -> Int64[np.ndarray, " total"]:
    """Return start, start + 1, ... for each of some spans, one after the other."""
    return np.arange(counts.sum()) + np.repeat(starts - np.cumsum(counts) + counts, counts)


def by_latent(latent: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """Return the order by latent that keeps the order within one; narrow numbers sort faster."""
    return torch.from_numpy(latent.astype(np.int32)).argsort(stable=True).numpy()


def kept_bytes(wanted: Wanted, latents: int) -> int:
    """Return about what the contexts of so many latents hold in memory, whatever the number of tokens."""
    return int(latents * (wanted.strongest + wanted.random) * (1 + SLACK) * (52 + 6 * 4))


SLACK = 0.5
"""Room for new contexts beside the kept ones: more needs more memory and less time."""


class TopContexts:
    """Running contexts of some latents of one member; the result does not depend on how the rows were split.

    A firing is looked at twice: is it above the weakest of its latent's strongest, is its draw below the largest of its
    latent's random ones? Few are, and only these are ranked.
    """

    def __init__(self, latents: Int64[Tensor, " latents"], d_sae: int, wanted: Wanted) -> None:
        self.latents, self.wanted = latents, wanted
        self.sequences: Int64[np.ndarray, " d_sae"] = np.zeros(d_sae, dtype=np.int64)
        """In how many sequences each of them fires."""
        self._is_shown = torch.zeros(d_sae, dtype=torch.bool)
        self._is_shown[latents] = True
        self._open: list[Firings] = []
        self._kept, self._sorted = _KEPT, 0
        self._floor = np.zeros(d_sae, dtype=np.float32)
        self._ceiling = np.full(d_sae, 1 << 32 if wanted.random else 0)

    def update(
        self, entries: Entries, seq: Int64[Tensor, " batch"], pos: Int64[Tensor, " batch"]
    ) -> None:
        """Add the codes of some rows; `seq` and `pos` place each row."""
        if not len(seq):
            return
        shown = self._is_shown[entries.indices]
        rows = entries.rows[shown]
        columns = (entries.indices[shown], seq[rows], pos[rows], entries.values[shown].float())
        self._open.append(Firings(*(column.numpy() for column in columns)))
        if sum(len(part.latent) for part in self._open) >= CHUNK:
            firings = Firings.join(*self._open)
            rest = firings.window == int(seq[-1])
            self._open = [firings.take(rest)]
            self._add(firings.take(~rest))

    def _add(self, firings: Firings) -> None:
        """Look at the firings of some whole sequences."""
        if not len(firings.latent):
            return
        number = np.cumsum(np.diff(firings.window, prepend=firings.window[0]) != 0)
        order = by_latent(firings.latent)
        latent, seq, pos, value = firings = firings.take(order)
        reach = self.wanted.width - 1
        span = int(pos.max()) + reach + 2
        group = latent * (int(number[-1]) + 1) + number[order]
        where = group * span + pos  # ascends; more than `reach` lies between two sequences
        starts = np.flatnonzero(np.diff(group, prepend=-1))
        self.sequences += np.bincount(latent[starts], minlength=len(self.sequences))
        peak = np.repeat(np.maximum.reduceat(value, starts), np.diff(starts, append=len(group)))
        high = np.flatnonzero(value == peak)
        best = np.zeros(len(group), dtype=bool)
        best[high[np.diff(group[high], prepend=-1) != 0]] = True
        place = (seq.astype(np.uint64) << np.uint64(32)) | pos.astype(np.uint64)
        draw = (mix64(place, self.wanted.seed) >> np.uint64(32)).astype(np.int64)
        enters = (best & (value > self._floor[latent])) | (draw < self._ceiling[latent])
        at = np.flatnonzero(enters)
        first = np.searchsorted(where, where[at] - reach)
        count = np.searchsorted(where, where[at] + reach, side="right") - first
        inside = spans_of(first, count)
        offset = (pos[inside] - np.repeat(pos[at], count)).astype(np.int16)
        no = np.zeros(len(at), dtype=bool)
        columns = (*firings.take(at), draw[at], best[at], no, no, count, offset, value[inside])
        pairs = zip(self._kept, columns, strict=True)
        self._kept = Kept(*(np.concatenate(pair) for pair in pairs))
        if len(self._kept.latent) > (1 + SLACK) * self._sorted:
            self._prune()

    def _prune(self) -> None:
        """Drop what is among neither the strongest nor the random of its latent, and renew what is asked of others."""
        kept = self._kept
        bits = kept.value.view(np.int32).astype(np.int64)
        best = np.flatnonzero(kept.best)
        top, last = self._first(best, (1 << 31) - bits[best], self.wanted.strongest)
        self._floor[kept.latent[last]] = kept.value[last]
        rows = np.arange(len(kept.latent))
        random, last = self._first(rows, kept.draw, self.wanted.random)
        self._ceiling[kept.latent[last]] = kept.draw[last]
        stays = np.flatnonzero(top | random)
        stays = stays[by_latent(kept.latent[stays])]
        self._kept = kept._replace(top=top, random=random).take(stays)
        self._sorted = len(stays)

    def _first(
        self, rows: Int64[np.ndarray, " n"], key: Int64[np.ndarray, " n"], n: int
    ) -> "Ranked":
        """Return which contexts are among the n of smallest key of their latent, and each full latent's n-th.

        Ties go to the earlier place in the text: contexts lie in its order within a latent.
        """
        chosen = np.zeros(len(self._kept.latent), dtype=bool)
        latent = self._kept.latent[rows]
        order = torch.from_numpy(latent << 32 | key).argsort(stable=True).numpy()
        rank = places(latent[order])
        chosen[rows[order[rank < n]]] = True
        return Ranked(chosen, rows[order[rank == n - 1]])

    def kept(self) -> Kept:
        """Return the contexts of all latents, when all rows have gone by."""
        if self._open:
            self._add(Firings.join(*self._open))
            self._open = []
        self._prune()
        return self._kept

    def result(self) -> dict[int, list["Context"]]:
        """Return each latent's strongest contexts, strongest first: the peak and every activation in its reach."""
        kept = self.kept()
        rows = np.flatnonzero(kept.top)
        rows = rows[np.lexsort((-kept.value[rows], kept.latent[rows]))]
        out: dict[int, list[Context]] = {int(latent): [] for latent in self.latents}
        for latent, found in zip(
            kept.latent[rows].tolist(), kept.take(rows).contexts(), strict=True
        ):
            out[latent].append(found)
        return out


class Ranked(NamedTuple):
    """Which contexts are among the first of their latent, and each full latent's last of these."""

    chosen: Bool[np.ndarray, " contexts"]
    last: Int64[np.ndarray, " latents"]


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
