"""What is kept of the windows that go by, in memory fixed beforehand.

Per latent and side the strongest and random ones, and random ones for all latents together. "Random" is the smallest
of a seeded hash, so what is kept does not depend on how the rows were split.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64, UInt8, UInt64
from torch import Tensor

from wsae.core.errors import UserError
from wsae.core.seeds import mix64, seed_for
from wsae.evals.autointerp.config import ContextConfig
from wsae.evals.autointerp.documents import EXPLAIN, SCORE, Slab
from wsae.evals.contexts import one_per_stratum, sample_latents
from wsae.evals.latents import unit_rows
from wsae.ops import SparseCode

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


class WindowActivations(NamedTuple):
    """Activations sorted by (window, latent)."""

    latent: Int64[np.ndarray, " hits"]
    window: Int64[np.ndarray, " hits"]
    side: Int64[np.ndarray, " hits"]
    offset: Int64[np.ndarray, " hits"]
    value: Float32[np.ndarray, " hits"]


class KeptWindows(NamedTuple):
    """One latent's windows on one side: peak activation, activations, and rank among the strongest and the random."""

    window: Int64[np.ndarray, " n"]
    peak: Float32[np.ndarray, " n"]
    acts: Float32[np.ndarray, "n width"]
    top: Bool[np.ndarray, " n"]
    random: Bool[np.ndarray, " n"]


@dataclass(frozen=True)
class ReservoirSize:
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

    def __init__(self, size: ReservoirSize) -> None:
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

    def add(self, hits: WindowActivations, tracked: Bool[np.ndarray, " d_sae"]) -> None:
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

    def _fill(
        self, rows: slice, hits: WindowActivations, starts: np.ndarray, ends: np.ndarray
    ) -> None:
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

    def kept(self, tracked: Bool[np.ndarray, " d_sae"]) -> "KeptByLatent":
        """Return what is kept, ready to be looked up."""
        self.compact(tracked)
        top, _ = self._ranked(-self._peak[: self._n], self._cfg.n_top)
        random, _ = self._ranked(self._priority[: self._n], self._cfg.reservoir)
        order = np.lexsort((self._window[: self._n], self._group[: self._n]))
        columns = KeptWindows(self._window, self._peak, self._acts, top, random)
        return KeptByLatent(self._group[order], order, columns, self._d_sae)


class KeptByLatent(NamedTuple):
    """Kept windows of all latents and sides."""

    group: Int64[np.ndarray, " n"]
    order: Int64[np.ndarray, " n"]
    columns: KeptWindows
    d_sae: int

    def of(self, latent: int, side: int) -> KeptWindows:
        """Return those of one latent on one side, in the text's order."""
        key = side * self.d_sae + latent
        rows = self.order[slice(*np.searchsorted(self.group, [key, key + 1]))]
        return KeptWindows(*(column[rows] for column in self.columns))


# One member while the rows go by: how often each latent fires, its windows, and the activity in the
# pool's windows.

OVERSAMPLE = 2
"""Latents tracked per latent wanted: one of each two neighbours in density is then drawn."""
_DENSE = 1 << 24
"""Booleans held at once while the pool's activity is packed."""


class Events(NamedTuple):
    """Active entries in row order: latent, window in the slab, place in the window, value."""

    latent: Int64[np.ndarray, " n"]
    window: Int64[np.ndarray, " n"]
    offset: Int64[np.ndarray, " n"]
    value: Float32[np.ndarray, " n"]

    def take(self, keep: np.ndarray | slice) -> "Events":
        """Return those at `keep`."""
        return Events(*(column[keep] for column in self))

    def joined(self, after: "Events") -> "Events":
        """Return these and then others."""
        return Events(*(np.concatenate(pair) for pair in zip(self, after, strict=True)))


class _Entries(NamedTuple):
    """Active entries of a slab's rows, in row order."""

    latent: Int64[np.ndarray, " n"]
    row: Int64[np.ndarray, " n"]
    value: Float32[np.ndarray, " n"]

    @staticmethod
    def of(code: SparseCode) -> "_Entries":
        columns = (code.indices, code.rows(), code.values.float())
        active = code.values != 0
        if not bool(active.all()):  # only padding of the Top-k kinds is 0
            columns = tuple(column[active] for column in columns)
        return _Entries(*(column.cpu().numpy() for column in columns))

    def placed(self, at: np.ndarray | slice, slab: Slab) -> Events:
        row = self.row[at]
        return Events(self.latent[at], slab.row_window[row], slab.row_offset[row], self.value[at])


def _no_events() -> Events:
    none = np.zeros(0, dtype=np.int64)
    return Events(none, none, none, none.astype(np.float32))


def member_bytes(cfg: ContextConfig, d_sae: int, given: int | None = None) -> int:
    """Return the memory of a member's arrays while it is collected, whatever the number of tokens.

    With L = OVERSAMPLE n_latents latents tracked (or `given`), each with K = n_top + reservoir windows on 2 sides:

        1.5 * 2 L K (4 width + 28)     windows: activations, and 28 bytes of place, rank and peak
        + pool * ceil(d_sae / 8)       who is active in the pool's windows, one bit a latent
        + d_sae (2 * 20 + 8 + 4 + 8 + 1)   thresholds and counts per latent

    Beside it: one batch of activations and codes, and at the end what is handed out.
    """
    size = _size(cfg, d_sae, given)
    return size.bytes + cfg.pool * _packed(d_sae) + d_sae * 21


def _size(cfg: ContextConfig, d_sae: int, given: int | None) -> ReservoirSize:
    return ReservoirSize(
        cfg, d_sae, min(d_sae, OVERSAMPLE * cfg.n_latents) if given is None else given
    )


def _packed(d_sae: int) -> int:
    return -(-d_sae // 8)


class Tracked:
    """What one member's latents do: exact counts for all, windows for some, activity in the pool's windows for all.

    Without `latents` those tracked are a uniform random sample of the latents that fire at all. It is exact in one
    pass: latents have a random rank, the L lowest ranks that have fired are tracked, and a latent that joins does so
    at its first firing, so that nothing of it is missed; the latents it displaces do not return.
    """

    def __init__(
        self,
        name: str,
        d_sae: int,
        cfg: ContextConfig,
        latents: Int64[torch.Tensor, " latents"] | None = None,
    ) -> None:
        self.name, self._d_sae, self._cfg = name, d_sae, cfg
        size = _size(cfg, d_sae, None if latents is None else len(latents))
        self.reservoirs = Reservoirs(size)
        self.active: UInt8[np.ndarray, "pool packed"] = np.zeros(
            (cfg.pool, _packed(d_sae)), np.uint8
        )
        self.n = 0
        self.count = np.zeros(d_sae, dtype=np.int64)
        self.peak = torch.zeros(d_sae, dtype=torch.float32)
        self.tracked: Bool[np.ndarray, " d_sae"] = np.zeros(d_sae, dtype=bool)
        rng = np.random.default_rng(seed_for(cfg.seed, "interpret", "latents", name))
        self._rank = rng.permutation(d_sae)
        self._given, self._wanted = latents, size.latents
        if latents is not None:
            self.tracked[latents.numpy()] = True
        self._carry = _no_events()

    @property
    def bytes(self) -> int:
        """Memory of the arrays that live as long as the pass (`member_bytes` says it beforehand)."""
        own = (self.active, self.count, self.tracked, self._rank, self.peak.numpy())
        return self.reservoirs.bytes + sum(array.nbytes for array in own)

    def update(self, code: SparseCode, slab: Slab, slots: Int64[np.ndarray, " windows"]) -> None:
        """Add the codes of a slab's rows; `slots` are the places of its windows in the pool, -1 for none."""
        entries = _Entries.of(code)
        self.n += code.batch
        self.count += np.bincount(entries.latent, minlength=self._d_sae)
        latent, value = torch.from_numpy(entries.latent), torch.from_numpy(entries.value)
        self.peak.scatter_reduce_(0, latent, value, "amax")
        if not bool(torch.isfinite(self.peak).all()):
            raise UserError(f"{self.name}: NaN or infinite activations on the held-out rows")
        self._track()
        first_open = int(np.searchsorted(slab.row_window, slab.closed))
        cut = int(np.searchsorted(entries.row, first_open))
        closed = _Entries(*(column[:cut] for column in entries))
        self._add(closed, slab, slots)
        after = entries.placed(slice(cut, None), slab)
        self._carry = after if slab.closed else self._carry.joined(after)
        self._carry.window[:] = 0

    def finish(self, slab: Slab, slots: Int64[np.ndarray, " windows"]) -> None:
        """Add what is left of the last window."""
        none = np.zeros(0, dtype=np.int64)
        self._add(_Entries(none, none, none.astype(np.float32)), slab, slots)

    def _track(self) -> None:
        """Track the fired latents of the lowest ranks."""
        if self._given is not None:
            return
        fired = self.count.nonzero()[0]
        ranks = self._rank[fired]
        if len(fired) > self._wanted:
            fired = fired[ranks <= np.partition(ranks, self._wanted - 1)[self._wanted - 1]]
        self.tracked[:] = False
        self.tracked[fired] = True

    def _add(self, new: _Entries, slab: Slab, slots: Int64[np.ndarray, " windows"]) -> None:
        """Add entries of closed windows, those carried over first."""
        if not slab.closed:
            return
        self._note_pool(new, slab, slots)
        events = self._carry.take(self.tracked[self._carry.latent])
        events = events.joined(new.placed(self.tracked[new.latent].nonzero()[0], slab))
        events = events.take(slab.side[events.window] >= 0)
        events = events.take(np.argsort(events.window * self._d_sae + events.latent, kind="stable"))
        window, side = slab.number[events.window], slab.side[events.window]
        self.reservoirs.add(
            WindowActivations(events.latent, window, side, events.offset, events.value),
            self.tracked,
        )

    def _note_pool(self, new: _Entries, slab: Slab, slots: Int64[np.ndarray, " windows"]) -> None:
        """Write which latents are active in the windows that entered the pool."""
        entering = (slots >= 0).nonzero()[0]
        size = max(1, _DENSE // self._d_sae)
        for first in range(0, len(entering), size):
            windows = entering[first : first + size]
            place = np.full(len(slots), -1)
            place[windows] = np.arange(len(windows))
            dense = np.zeros((len(windows), self._d_sae), dtype=bool)
            at = place[slab.row_window][new.row]
            mine = (at >= 0).nonzero()[0]
            dense[at[mine], new.latent[mine]] = True
            if place[0] >= 0:
                dense[place[0], self._carry.latent] = True
            self.active[slots[windows]] = np.packbits(dense, axis=1)

    def active_in(
        self, latents: Int64[np.ndarray, " latents"], size: int
    ) -> Bool[np.ndarray, "size latents"]:
        """Return whether each latent is active anywhere in each of the pool's first `size` windows."""
        bits = self.active[:size, latents >> 3] >> (7 - (latents & 7)).astype(np.uint8)
        return (bits & 1).astype(bool)


def entering(pool: Pool, slab: Slab) -> Int64[np.ndarray, " windows"]:
    """Offer a slab's complete scoring windows to the pool; return the slot of every window, -1 for none."""
    slots = np.full(len(slab.number), -1)
    offered = (slab.side[: slab.closed] == SCORE).nonzero()[0]
    slots[offered] = pool.admit(slab.number[offered])
    return slots


# Which windows play which role for a latent: explaining, positive, negative and hard.

NEIGHBOURS = 10
"""Nearest latents by decoder cosine whose windows are hard negatives."""
_COSINES = 1 << 24
"""Cosines held at once."""
SILENT, FEW, FEW_SILENT = "silent", "few windows", "few silent windows"
"""Why a latent is left out: it never fires, too few activating windows on a side, or too few without it."""


class Picked(NamedTuple):
    """Windows by their number in the text, and one latent's activations on their tokens."""

    window: Int64[np.ndarray, " n"]
    acts: Float32[np.ndarray, "n width"]


class Roles(NamedTuple):
    """One latent's windows."""

    explain: Picked
    positive: Picked
    negative: Picked
    hard: Picked


def neighbours(
    units: Float[Tensor, "d_sae d_in"],
    alive: Bool[Tensor, " d_sae"],
    latents: Int64[Tensor, " latents"],
) -> Int64[Tensor, "latents n"]:
    """Return the NEIGHBOURS live latents of largest decoder cosine with each latent, nearest first; -1 for none."""
    out = []
    for block in latents.split(max(1, _COSINES // len(units))):
        cosine = units[block] @ units.T
        cosine[:, ~alive] = -torch.inf
        cosine[torch.arange(len(block)), block] = -torch.inf
        best = cosine.topk(min(NEIGHBOURS, len(units)), dim=1)
        out.append(best.indices.masked_fill(best.values.isinf(), -1))
    return torch.cat([torch.zeros(0, min(NEIGHBOURS, len(units)), dtype=torch.int64), *out])


class RoleAssignment:
    """Gives the kept windows of one member to the roles of each latent."""

    def __init__(self, member: Tracked, pool: Pool, W_dec: Tensor, cfg: ContextConfig) -> None:
        self._member, self._pool, self._cfg = member, pool, cfg
        self._shelf: KeptByLatent = member.reservoirs.kept(member.tracked)
        self._units = unit_rows(W_dec).cpu()

    def roles(self, given: Int64[Tensor, " latents"] | None) -> Iterator[tuple[int, Roles | str]]:
        """Yield each latent with its windows, or with why it is left out.

        Latents are those given, or one tracked latent from each stratum of density.
        """
        latents = self._sampled() if given is None else given
        alive = torch.from_numpy(self._member.count > 0)
        near = neighbours(self._units, alive, latents).numpy()
        for latent, others in zip(latents.tolist(), near, strict=True):
            yield latent, self._of(latent, others[others >= 0])

    def _sampled(self) -> Int64[Tensor, " latents"]:
        density = np.where(self._member.tracked, self._member.count, 0) / max(1, self._member.n)
        cfg = self._cfg
        return sample_latents(
            torch.from_numpy(density), cfg.n_latents, cfg.seed, "interpret", self._member.name
        )

    def _of(self, latent: int, near: Int64[np.ndarray, " neighbours"]) -> Roles | str:
        if not self._member.count[latent]:
            return SILENT
        seen = self._member.reservoirs.seen.reshape(2, -1)[:, latent]
        if seen.min() < self._cfg.min_windows:
            return FEW
        positive = self._spread(self._shelf.of(latent, SCORE), self._cfg.n_score, latent, "score")
        silent = self._silent(latent)
        if len(silent) < len(positive.window):
            return FEW_SILENT
        negative, others = silent[: len(positive.window)], silent[len(positive.window) :]
        return Roles(
            self._explain(latent),
            positive,
            self._without(negative),
            self._without(self._hard(near, others)),
        )

    def _explain(self, latent: int) -> Picked:
        kept = self._shelf.of(latent, EXPLAIN)
        rest = kept._replace(random=kept.random & ~kept.top)
        spread = self._spread(rest, self._cfg.n_quantile, latent, "explain")
        window = np.concatenate([kept.window[kept.top], spread.window])
        acts = np.concatenate([kept.acts[kept.top], spread.acts])
        order = np.lexsort((window, -acts.max(axis=1, initial=0)))
        return Picked(window[order], acts[order])

    def _spread(self, kept: KeptWindows, n: int, latent: int, role: str) -> Picked:
        """Return one random window from each of n equal-count quantiles of peak activation, strongest first."""
        ranked = kept.random.nonzero()[0]
        ranked = ranked[np.argsort(-kept.peak[ranked], kind="stable")]
        if len(ranked) > n:
            seed = seed_for(self._cfg.seed, "interpret", role, latent)
            ranked = ranked[one_per_stratum(len(ranked), n, seed)]
        return Picked(kept.window[ranked], kept.acts[ranked])

    def _silent(self, latent: int) -> Int64[np.ndarray, " slots"]:
        """Return the pool's slots without the latent, in an order of its own."""
        active = self._active(np.array([latent]))[:, 0]
        slots = np.flatnonzero(~active)
        order = priority(self._cfg.seed, self._pool.window[slots], latent)
        return slots[np.argsort(order, kind="stable")]

    def _hard(
        self, near: Int64[np.ndarray, " neighbours"], silent: Int64[np.ndarray, " silent"]
    ) -> Int64[np.ndarray, " hard"]:
        """Return the silent slots with an active neighbour, those of the nearest neighbour first."""
        active = self._active(near)[silent]
        found = np.flatnonzero(active.any(axis=1))
        nearest = active[found].argmax(axis=1) if len(found) else found
        return silent[found[np.argsort(nearest, kind="stable")]][: self._cfg.n_hard]

    def _active(self, latents: Int64[np.ndarray, " latents"]) -> Bool[np.ndarray, "pool latents"]:
        return self._member.active_in(latents, len(self._pool.window))

    def _without(self, slots: Int64[np.ndarray, " slots"]) -> Picked:
        return Picked(
            self._pool.window[slots], np.zeros((len(slots), self._cfg.width), dtype=np.float32)
        )
