"""Contexts of latents from one pass over the held-out rows, for all hooks and members together.

Per latent and side the strongest and random windows are kept, and random ones for all latents together, in memory fixed
beforehand. "Random" is the smallest of a seeded hash, so what is kept does not depend on how the rows were split.

Contexts are windows that tile the text. Fragments, for simulation, are as in the paper's Appendix B.4: one random
stretch of 64 tokens from each document; shorter documents have none, and tokens whose rows were left out of the data
(attention sinks, special tokens) count as silent.
"""

from collections import Counter
from dataclasses import replace
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64, UInt8, UInt64
from torch import Tensor

from wsae.acts.stream import HeldOut
from wsae.core.errors import UserError, nearest
from wsae.core.progress import Progress, quiet
from wsae.core.seeds import mix64, seed_for
from wsae.evals.config import ContextConfig, FragmentConfig
from wsae.evals.interpret.windows import (
    EXPLAIN,
    SCORE,
    SIDES,
    STRADDLING,
    Collected,
    Fragments,
    FragmentTiling,
    LatentContexts,
    LatentFragments,
    Shown,
    Slab,
    Tiling,
    documents_of,
)
from wsae.evals.latents import (
    NO_FIRINGS,
    Firings,
    one_per_stratum,
    places,
    sample_latents,
    unit_rows,
)
from wsae.kernels.eager import SparseCode
from wsae.sae.model import SAE, Encoder

Members = dict[str, dict[str, SAE]]
"""Hook -> member name -> SAE."""
Latents = dict[str, dict[str, Int64[Tensor, " latents"]]]
"""Hook -> member name -> latents."""
N_TOP = 20
"""Fragments of largest activation, from which explaining and top scoring ones are dealt; fewer varying: skipped."""
RANKS_EXPLAIN, RANKS_TOP = slice(0, N_TOP, 4), slice(2, N_TOP, 4)
"""Their ranks: 0, 4, 8, 12, 16 explain, 2, 6, 10, 14, 18 are scored (Cunningham et al.'s code)."""
N_RANDOM = 5
"""Random varying fragments scored, none of the ten above."""
FEW_FRAGMENTS = "fewer than 20 varying fragments"
ByLatent = TypeVar("ByLatent", LatentContexts, LatentFragments)
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
    """Up to `size` scoring windows of the smallest priority; a window's slot is its row in whatever is kept for it."""

    def __init__(self, size: int, seed: int) -> None:
        self._size, self._seed = size, seed
        self.window = np.zeros(0, dtype=np.int64)
        self._priority = np.zeros(0, dtype=np.uint64)

    def enter(self, slab: Slab) -> Int64[np.ndarray, " windows"]:
        """Offer a slab's complete scoring windows; return the slot of every window, -1 for none."""
        slots = np.full(len(slab.number), -1)
        offered = (slab.side[: slab.closed] == SCORE).nonzero()[0]
        slots[offered] = self.admit(slab.number[offered])
        return slots

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


class KeptWindows(NamedTuple):
    """One latent's windows on one side: peak activation, activations, and rank among the strongest and the random."""

    window: Int64[np.ndarray, " n"]
    peak: Float32[np.ndarray, " n"]
    acts: Float32[np.ndarray, "n width"]
    top: Bool[np.ndarray, " n"]
    random: Bool[np.ndarray, " n"]


def _rows(cfg: ContextConfig, latents: int) -> int:
    """Return the windows held at most: those kept of each latent and side, and new ones until the next compaction."""
    kept = 2 * latents * (cfg.n_top + cfg.reservoir)
    return kept + max(1, int(SLACK * kept))


class Reservoirs:
    """The strongest n_top and `reservoir` random activating windows of every tracked latent on each side.

    A new window enters when it beats the last one kept of its latent and side; the thresholds are renewed each time the
    room is full (`compact`), which is also when latents no longer tracked leave.
    """

    def __init__(self, cfg: ContextConfig, d_sae: int, latents: int) -> None:
        self._cfg, self._d_sae = cfg, d_sae
        self._n, rows, groups = 0, _rows(cfg, latents), 2 * d_sae
        self._group = np.empty(rows, dtype=np.int64)
        self._window = np.empty(rows, dtype=np.int64)
        self._priority = np.empty(rows, dtype=np.uint64)
        self._peak = np.empty(rows, dtype=np.float32)
        self._acts = np.empty((rows, cfg.width), dtype=np.float32)
        self.seen: Int64[np.ndarray, " groups"] = np.zeros(groups, dtype=np.int64)
        """Activating windows by side x d_sae + latent."""
        self._above = np.full(groups, -np.inf if cfg.n_top else np.inf, dtype=np.float32)
        self._before = np.full(groups, _LATEST if cfg.reservoir else 0, dtype=np.uint64)

    def add(
        self,
        firings: Firings,
        side: Int64[np.ndarray, " n"],
        tracked: Bool[np.ndarray, " d_sae"],
        varying: bool = False,
    ) -> None:
        """Offer the windows of some firings, whole windows only, sorted by (window, latent); keep those of `tracked`.

        With `varying`, windows in which a latent is equally active on every token are left out.
        """
        if not len(firings.latent):
            return
        edges = np.ones(len(firings.latent), dtype=bool)
        edges[1:] = (np.diff(firings.window) != 0) | (np.diff(firings.latent) != 0)
        starts = edges.nonzero()[0]
        ends = np.append(starts[1:], len(edges))
        peak = np.maximum.reduceat(firings.value, starts)
        if varying:
            flat = np.minimum.reduceat(firings.value, starts) == peak
            varies = (~flat | (ends - starts < self._cfg.width)).nonzero()[0]
            starts, ends, peak = starts[varies], ends[varies], peak[varies]
        latent, window = firings.latent[starts], firings.window[starts]
        group = side[starts] * self._d_sae + latent
        self.seen += np.bincount(group, minlength=len(self.seen))
        rank = priority(self._cfg.seed, window, latent)

        def enters(at: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " entering"]:
            above, before = self._above[group[at]], self._before[group[at]]
            return at[(peak[at] > above) | (rank[at] < before)]

        left = enters(np.arange(len(group)))
        while len(left):
            now = left[: len(self._group) - self._n]
            rows = slice(self._n, self._n + len(now))
            self._group[rows], self._window[rows] = group[now], window[now]
            self._priority[rows], self._peak[rows] = rank[now], peak[now]
            self._acts[rows] = 0
            counts = ends[now] - starts[now]
            row = np.repeat(np.arange(rows.start, rows.stop), counts)
            at = np.repeat(starts[now], counts) + places(row)
            self._acts[row, firings.offset[at]] = firings.value[at]
            self._n = rows.stop
            left = left[len(now) :]
            if self._n == len(self._group):
                self.compact(tracked)
                left = enters(left)

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
        rank = places(group[order])
        chosen = np.zeros(self._n, dtype=bool)
        chosen[order[rank < n]] = True
        return chosen, order[rank == n - 1]

    def finish(self, tracked: Bool[np.ndarray, " d_sae"]) -> None:
        """Sort what is kept, so that `of` finds it."""
        self.compact(tracked)
        self._is_top, _ = self._ranked(-self._peak[: self._n], self._cfg.n_top)
        self._is_random, _ = self._ranked(self._priority[: self._n], self._cfg.reservoir)
        self._order = np.lexsort((self._window[: self._n], self._group[: self._n]))
        self._sorted = self._group[self._order]

    def of(self, latent: int, side: int) -> "KeptWindows":
        """Return the windows of one latent on one side, in the text's order; `finish` comes first."""
        key = side * self._d_sae + latent
        rows = self._order[slice(*np.searchsorted(self._sorted, [key, key + 1]))]
        columns = (self._window, self._peak, self._acts, self._is_top, self._is_random)
        return KeptWindows(*(column[rows] for column in columns))


OVERSAMPLE = 2
"""Latents tracked per latent wanted: one of each two neighbours in density is then drawn."""
_DENSE = 1 << 24
"""Booleans held at once while the pool's activity is packed."""


def member_bytes(cfg: ContextConfig, d_sae: int, given: int | None = None) -> int:
    """Return the memory of a member's arrays while it is collected, whatever the number of tokens.

    With L = OVERSAMPLE n_latents latents tracked (or `given`), each with K = n_top + reservoir windows on 2 sides:

        1.5 * 2 L K (4 width + 28)     windows: activations, and 28 bytes of place, rank and peak
        + pool * ceil(d_sae / 8)       who is active in the pool's windows, one bit a latent
        + d_sae (2 * 20 + 8 + 4 + 8 + 1)   thresholds and counts per latent

    Beside it: one batch of activations and codes, and at the end what is handed out.
    """
    latents = min(d_sae, OVERSAMPLE * cfg.n_latents) if given is None else given
    packed = cfg.pool * -(-d_sae // 8)
    return _rows(cfg, latents) * (4 * cfg.width + 28) + packed + d_sae * (2 * 20 + 21)


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
        latents: Int64[Tensor, " latents"] | None = None,
        varying: bool = False,
    ) -> None:
        self.name, self._d_sae, self.cfg = name, d_sae, cfg
        self.given, self._varying = latents, varying
        self._wanted = min(d_sae, OVERSAMPLE * cfg.n_latents) if latents is None else len(latents)
        self.reservoirs = Reservoirs(cfg, d_sae, self._wanted)
        shape = (cfg.pool, -(-d_sae // 8))
        self.active: UInt8[np.ndarray, "pool packed"] = np.zeros(shape, np.uint8)
        self.n = 0
        self.count = np.zeros(d_sae, dtype=np.int64)
        self.peak = torch.zeros(d_sae, dtype=torch.float32)
        self.tracked: Bool[np.ndarray, " d_sae"] = np.zeros(d_sae, dtype=bool)
        rng = np.random.default_rng(seed_for(cfg.seed, "interpret", "latents", name))
        self._rank = rng.permutation(d_sae)
        if latents is not None:
            self.tracked[latents.numpy()] = True
        self.carried = NO_FIRINGS
        """Firings in the window that is still open."""

    def update(self, code: SparseCode, slab: Slab, slots: Int64[np.ndarray, " windows"]) -> None:
        """Add the codes of a slab's rows; `slots` are the places of its windows in the pool, -1 for none."""
        columns = (code.indices, code.rows(), code.values.float())
        active = code.values != 0
        if not bool(active.all()):  # only padding of the Top-k kinds is 0
            columns = tuple(column[active] for column in columns)
        latent, row, value = (column.cpu().numpy() for column in columns)
        self.n += code.batch
        self.count += np.bincount(latent, minlength=self._d_sae)
        self.peak.scatter_reduce_(0, torch.from_numpy(latent), torch.from_numpy(value), "amax")
        if not bool(torch.isfinite(self.peak).all()):
            raise UserError(f"{self.name}: NaN or infinite activations on the held-out rows")
        if self.given is None:  # track the fired latents of the lowest ranks
            fired = self.count.nonzero()[0]
            ranks = self._rank[fired]
            if len(fired) > self._wanted:
                last = np.partition(ranks, self._wanted - 1)[self._wanted - 1]
                fired = fired[ranks <= last]
            self.tracked[:] = False
            self.tracked[fired] = True
        self.close(slab, slots, Firings(latent, slab.row_window[row], slab.row_offset[row], value))

    def close(
        self, slab: Slab, slots: Int64[np.ndarray, " windows"], new: Firings = NO_FIRINGS
    ) -> None:
        """Offer the slab's closed windows with the firings carried over; those of an open one are carried on."""
        firings = Firings.join(self.carried, new)
        cut = int(np.searchsorted(firings.window, slab.closed))
        rest, firings = firings.take(slice(cut, None)), firings.take(slice(cut))
        self.carried = rest._replace(window=np.zeros_like(rest.window))
        if not slab.closed:
            return
        self._note_pool(firings, slab, slots)
        kept = (self.tracked[firings.latent] & (slab.side[firings.window] >= 0)).nonzero()[0]
        key = firings.window[kept] * self._d_sae + firings.latent[kept]
        firings = firings.take(kept[np.argsort(key, kind="stable")])
        side, number = slab.side[firings.window], slab.number[firings.window]
        self.reservoirs.add(
            firings._replace(window=number), side, self.tracked, varying=self._varying
        )

    def _note_pool(
        self, firings: Firings, slab: Slab, slots: Int64[np.ndarray, " windows"]
    ) -> None:
        """Write which latents are active in the windows that entered the pool."""
        entering = (slots >= 0).nonzero()[0]
        size = max(1, _DENSE // self._d_sae)
        for first in range(0, len(entering), size):
            windows = entering[first : first + size]
            place = np.full(len(slab.number), -1)
            place[windows] = np.arange(len(windows))
            dense = np.zeros((len(windows), self._d_sae), dtype=bool)
            at = place[firings.window]
            mine = (at >= 0).nonzero()[0]
            dense[at[mine], firings.latent[mine]] = True
            self.active[slots[windows]] = np.packbits(dense, axis=1)


NEIGHBOURS = 10
"""Nearest latents by decoder cosine whose windows are hard negatives."""
_COSINES = 1 << 24
"""Cosines held at once."""
SILENT, FEW, FEW_SILENT = "silent", "few windows", "few silent windows"
"""Why a latent is left out: it never fires, too few activating windows on a side, or too few without it."""


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
    """Gives the kept windows of one member to the roles of each latent: explaining, positive, negative and hard."""

    def __init__(self, member: Tracked, pool: Pool, W_dec: Tensor, cfg: ContextConfig) -> None:
        self._member, self._pool, self._cfg = member, pool, cfg
        member.reservoirs.finish(member.tracked)
        self._units = unit_rows(W_dec).cpu()

    def contexts(self, given: Int64[Tensor, " latents"] | None) -> dict[int, LatentContexts | str]:
        """Return each latent's windows, by their number in the text, or why it is left out.

        Latents are those given, or one tracked latent from each stratum of density.
        """
        member, cfg = self._member, self._cfg
        if given is None:
            density = np.where(member.tracked, member.count, 0) / max(1, member.n)
            names = ("interpret", member.name)
            given = sample_latents(torch.from_numpy(density), cfg.n_latents, cfg.seed, *names)
        near = neighbours(self._units, torch.from_numpy(member.count > 0), given).numpy()
        pairs = zip(given.tolist(), near, strict=True)
        return {latent: self._of(latent, others[others >= 0]) for latent, others in pairs}

    def _of(self, latent: int, near: Int64[np.ndarray, " neighbours"]) -> LatentContexts | str:
        member, cfg, shelf = self._member, self._cfg, self._member.reservoirs
        if not member.count[latent]:
            return SILENT
        if shelf.seen.reshape(2, -1)[:, latent].min() < cfg.min_windows:
            return FEW
        positive = self._spread(shelf.of(latent, SCORE), cfg.n_score, latent, "score")
        silent = self._silent(latent)
        n = len(positive)
        if len(silent) < n:
            return FEW_SILENT
        kept = shelf.of(latent, EXPLAIN)
        rest = kept._replace(random=kept.random & ~kept.top)
        spread = self._spread(rest, cfg.n_quantile, latent, "explain")
        window = np.concatenate([kept.window[kept.top], spread.window])
        acts = np.concatenate([kept.acts[kept.top], spread.acts])
        order = np.lexsort((window, -acts.max(axis=1, initial=0)))
        negative, hard = (
            Shown(self._pool.window[slots], np.zeros((len(slots), cfg.width), dtype=np.float32))
            for slots in (silent[:n], self._hard(near, silent[n:]))
        )
        density, peak = float(member.count[latent]) / member.n, float(member.peak[latent])
        explain = Shown(window[order], acts[order])
        return LatentContexts(latent, density, peak, explain, positive, negative, hard)

    def _spread(self, kept: KeptWindows, n: int, latent: int, role: str) -> Shown:
        """Return one random window from each of n equal-count quantiles of peak activation, strongest first."""
        ranked = kept.random.nonzero()[0]
        ranked = ranked[np.argsort(-kept.peak[ranked], kind="stable")]
        if len(ranked) > n:
            seed = seed_for(self._cfg.seed, "interpret", role, latent)
            ranked = ranked[one_per_stratum(len(ranked), n, seed)]
        return Shown(kept.window[ranked], kept.acts[ranked])

    def _silent(self, latent: int) -> Int64[np.ndarray, " slots"]:
        """Return the pool's slots without the latent, in an order of its own."""
        slots = np.flatnonzero(~self._active(np.array([latent]))[:, 0])
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

    def _active(self, latents: Int64[np.ndarray, " n"]) -> Bool[np.ndarray, "pool latents"]:
        """Return whether each latent is active anywhere in each of the pool's windows."""
        bits = self._member.active[: len(self._pool.window), latents >> 3]
        return (bits >> (7 - (latents & 7)).astype(np.uint8) & 1).astype(bool)


def collect(
    source: HeldOut,
    members: Members,
    cfg: ContextConfig,
    batch_size: int = 2048,
    latents: Latents | None = None,
    progress: Progress = quiet,
) -> dict[str, dict[str, Collected]]:
    """Return the contexts of some latents of every member: hook -> member -> windows by latent and role.

    Each row is encoded once per member. Latents are those given, in their order; for the other members they are one
    from each of n_latents equal-count strata of density, drawn from twice as many random live latents. All members
    share one `Windows`. The same rows give the same windows however they are split. Raises UserError when the data
    have no text, no held-out rows, no such hook, one document only, or sequences shorter than a window.
    """
    chosen = latents or {}
    _check(source, members, chosen)
    tiling = Tiling(documents_of(source), cfg.width, seed_for(cfg.seed, "sides"))
    pool = Pool(cfg.pool, cfg.seed)
    saes = {(hook, name): sae for hook, named in members.items() for name, sae in named.items()}
    given = {(hook, name): chosen.get(hook, {}).get(name) for hook, name in saes}
    encoders = {key: Encoder(sae) for key, sae in saes.items()}
    tracked = {
        key: Tracked("/".join(key), sae.cfg.d_sae, cfg, given[key]) for key, sae in saes.items()
    }
    with torch.inference_mode(), progress("contexts", None, "rows") as tick:
        for chunk in source.heldout(batch_size):
            if len(chunk.seq):
                slab = tiling.slab(chunk.seq.long().numpy(), chunk.pos.long().numpy())
                slots = pool.enter(slab)
                for key, sae in saes.items():
                    x = chunk.x[key[0]].to(sae.W_dec.device)
                    tracked[key].update(encoders[key](x), slab, slots)
            tick(len(chunk.seq))
        slab = tiling.last()
        slots = pool.enter(slab)
        for member in tracked.values():
            member.close(slab, slots)
    _check_sides(tiling)
    found = {
        key: RoleAssignment(tracked[key], pool, sae.directions, cfg).contexts(given[key])
        for key, sae in saes.items()
    }
    kept = {
        key: [one for one in named.values() if not isinstance(one, str)]
        for key, named in found.items()
    }
    number, located = _located(kept)
    table = source.tokens()
    assert table is not None
    windows = tiling.windows(number, table)
    out: dict[str, dict[str, Collected]] = {hook: {} for hook in members}
    for (hook, name), contexts in located.items():
        why = {j: one for j, one in found[hook, name].items() if isinstance(one, str)}
        skipped = dict(Counter(why.values()))
        out[hook][name] = Collected(windows, contexts, skipped, dict(tiling.counts), why)
    return out


def fragments(
    source: HeldOut,
    members: Members,
    latents: Latents,
    cfg: FragmentConfig,
    progress: Progress = quiet,
) -> dict[str, dict[str, Fragments]]:
    """Return the fragments of some latents of every member, from one pass: hook -> member -> fragments.

    Raises UserError when the data have no text, no such hook, or no document of `width` tokens.
    """
    _check(source, members, {})
    tiling = FragmentTiling(documents_of(source), cfg)
    saes = {(hook, name): sae for hook, named in members.items() for name, sae in named.items()}
    sizes = {"width": cfg.width, "n_top": N_TOP, "reservoir": 3 * N_RANDOM, "pool": 1}
    kept = ContextConfig(**sizes, seed=cfg.seed)
    tracked = {
        (hook, name): Tracked(
            f"{hook}/{name}", sae.cfg.d_sae, kept, latents[hook][name], varying=True
        )
        for (hook, name), sae in saes.items()
    }
    with torch.inference_mode(), progress("fragments", None, "rows") as tick:
        for chunk in source.heldout(cfg.batch_size):
            rows, slab = tiling.slab(chunk.seq.long().numpy(), chunk.pos.long().numpy())
            no_slots = np.full(len(slab.number), -1)
            for (hook, name), sae in saes.items():
                if len(rows):
                    code = sae.encode_code(chunk.x[hook][rows].to(sae.W_dec.device))
                    tracked[hook, name].update(code, slab, no_slots)
                else:
                    tracked[hook, name].close(slab, no_slots)
            tick(len(chunk.seq))
            if tiling.n >= cfg.limit:
                break
    if not tiling.n:
        raise UserError(
            f"no held-out document has {cfg.width} tokens in one sequence; lower the fragments' width"
        )
    number, located = _located({key: _dealt(tracked[key], tiling.n) for key in saes})
    table = source.tokens()
    assert table is not None
    windows = tiling.windows(number, table)
    out: dict[str, dict[str, Fragments]] = {hook: {} for hook in members}
    for (hook, name), found in located.items():
        few = len(latents[hook][name]) - len(found)
        skipped = {FEW_FRAGMENTS: few} if few else {}
        out[hook][name] = Fragments(windows, found, skipped, tiling.n)
    return out


def _dealt(member: Tracked, n_fragments: int) -> list[LatentFragments]:
    """Deal the kept fragments of each latent to its roles."""
    kept, cfg = member.reservoirs, member.cfg
    kept.finish(member.tracked)
    complete = member.count - np.bincount(member.carried.latent, minlength=len(member.count))
    out = []
    for latent in [] if member.given is None else member.given.tolist():
        if kept.seen[latent] < N_TOP:
            continue
        mine = kept.of(latent, EXPLAIN)
        top = np.lexsort((mine.window, -mine.peak, ~mine.top))[:N_TOP]
        dealt = [top[RANKS_EXPLAIN], top[RANKS_TOP]]
        mine.random[np.concatenate(dealt)] = False
        order = np.argsort(priority(cfg.seed, mine.window, latent), kind="stable")
        dealt.append(order[mine.random[order]][:N_RANDOM])
        roles = (Shown(mine.window[rows], mine.acts[rows]) for rows in dealt)
        density = float(complete[latent]) / (n_fragments * cfg.width)
        out.append(LatentFragments(latent, density, *roles))
    return out


def _located(
    found: dict[tuple[str, str], list[ByLatent]],
) -> tuple[Int64[np.ndarray, " windows"], dict[tuple[str, str], list[ByLatent]]]:
    """Return the numbers of all windows shown, and what was found with places in them for numbers."""

    def roles(one: ByLatent) -> dict[str, Shown]:
        return {name: shown for name, shown in vars(one).items() if isinstance(shown, Shown)}

    every = (one for latents in found.values() for one in latents)
    shown = [role.window for one in every for role in roles(one).values()]
    number = np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *shown]))

    def located(one: ByLatent) -> ByLatent:
        places = {
            name: replace(role, window=np.searchsorted(number, role.window))
            for name, role in roles(one).items()
        }
        return replace(one, **places)

    return number, {key: [located(one) for one in latents] for key, latents in found.items()}


def _check(source: HeldOut, members: Members, latents: Latents) -> None:
    for hook in members:
        if hook not in source.hooks:
            raise UserError(f"the data have no hook {hook!r}; they have {', '.join(source.hooks)}")
    for hook, chosen in latents.items():
        for name, wanted in chosen.items():
            if name not in members.get(hook, {}):
                names = members.get(hook, {})
                raise UserError(f"latents of {hook}/{name}: no such member{nearest(name, names)}")
            d_sae = members[hook][name].cfg.d_sae
            if len(wanted.unique()) != len(wanted) or not all(
                0 <= j < d_sae for j in wanted.tolist()
            ):
                raise UserError(
                    f"latents of {hook}/{name}: give different numbers from 0 to {d_sae - 1}"
                )


def _check_sides(tiling: Tiling) -> None:
    explain, score = (tiling.counts[side] for side in SIDES)
    if explain and score:
        return
    straddling = tiling.counts[STRADDLING]
    if not explain + score + straddling:
        raise UserError("there are no held-out rows to collect windows from; hold out more data")
    if not explain + score:
        raise UserError(
            f"all {straddling} windows of {tiling.width} tokens lie across two documents; lower the width"
        )
    raise UserError(
        f"all {explain + score} windows are from documents on one side, and explaining and scoring need different "
        "documents; hold out more documents"
    )
