"""Latents: where and how often each fires on held-out data, how its direction lies among others, which match which.

Members of a family start from the same weights, so latents that never fire keep nearly identical directions in both;
counting them would fake agreement. Only latents that fire on held-out data take part in the pairing and its statistics.

Contexts of every latent are streamed: the strongest of each sequence and random firings. Of a context only the firings
in reach of its window are kept, so memory depends on latents x contexts, not on the number of tokens. Rows arrive
sequence by sequence (the order `heldout` promises).
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int16, Int64
from torch import Tensor

from wsae.acts.tokens import REACH
from wsae.core.seeds import mix64, seed_for
from wsae.kernels.eager import SparseCode

HISTOGRAM_EDGES = [-7.0 + 0.25 * i for i in range(29)]
"""Edges of the log10-density histogram: 1e-7 to 1, four bins per decade."""
_BLOCK = 1 << 25
"""Cosines held at once (128 MB in fp32), so that a full d_sae x d_sae matrix never exists."""


class Entries:
    """The active entries of a code on the CPU in fp64: exact zeros (padding of the top-k kinds) are left out."""

    def __init__(self, code: SparseCode) -> None:
        rows, indices, values = code.rows(), code.indices, code.values
        if not bool((active := values != 0).all()):
            rows, indices, values = rows[active], indices[active], values[active]
        self.batch = code.batch
        self.rows: Int64[Tensor, " nnz"] = rows.cpu()
        self.indices: Int64[Tensor, " nnz"] = indices.cpu()
        self.values: Float64[Tensor, " nnz"] = values.double().cpu()

    def l0(self) -> Float64[Tensor, " batch"]:
        """Active latents per row."""
        return torch.bincount(self.rows, minlength=self.batch).double()


class LatentActivity:
    """Running count, sum, sum of squares and maximum of every latent, over all held-out rows (zeros included)."""

    def __init__(self, d_sae: int) -> None:
        self.n = 0
        self.count = torch.zeros(d_sae, dtype=torch.int64)
        self.peak = torch.zeros(d_sae, dtype=torch.float64)
        self._sum = torch.zeros(d_sae, dtype=torch.float64)
        self._square = torch.zeros(d_sae, dtype=torch.float64)

    def update(self, entries: Entries) -> None:
        """Add the codes of some rows."""
        size = len(self.count)
        self.n += entries.batch
        self.count += torch.bincount(entries.indices, minlength=size)
        self._sum += torch.bincount(entries.indices, entries.values, minlength=size)
        self.peak.scatter_reduce_(0, entries.indices, entries.values, "amax")
        self._square += torch.bincount(entries.indices, entries.values.square(), minlength=size)

    @property
    def l0(self) -> float:
        """Mean number of active latents per row."""
        return float(self.count.sum()) / self.n

    @property
    def alive(self) -> Int64[Tensor, " alive"]:
        """Latents that fired at least once."""
        return self.count.nonzero()[:, 0]

    @property
    def density(self) -> Float64[Tensor, " d_sae"]:
        """Share of rows on which each latent is active."""
        return self.count.double() / self.n

    @property
    def variance(self) -> Float64[Tensor, " d_sae"]:
        """E[z_j^2] - E[z_j]^2 over all rows, at least 0."""
        return (self._square / self.n - (self._sum / self.n).square()).clamp_min(0.0)


def density_histogram(
    density: Float64[Tensor, " d_sae"],
) -> dict[str, list[float] | list[int] | int]:
    """Return counts of log10(density) between `edges` for the latents that fired, and how many never did.

    Densities under the lowest edge are counted in the lowest bin.
    """
    alive = density[density > 0].log10().clamp_min(HISTOGRAM_EDGES[0])
    edges = torch.tensor(HISTOGRAM_EDGES, dtype=torch.float64)
    counts = torch.histogram(alive, edges).hist.long()
    return {
        "edges": HISTOGRAM_EDGES,
        "counts": counts.tolist(),
        "never": int((density == 0).sum()),
    }


RELATIVE_NORM = "relative_norm"
"""Array of a crosscoder's latents: their decoder rows' share in a source, named behind it in brackets."""
ALONE, EVEN = 0.9, 0.8


def whose(
    relative: dict[str, Float64[Tensor, " d_sae"]], density: Float64[Tensor, " d_sae"]
) -> dict[str, dict[str, int]]:
    """Return how many live latents of a crosscoder are one source's (r > 0.9), shared evenly by all, or neither.

    Shared evenly: no source has under 0.8 of its even share (of two: r between 0.4 and 0.6).
    """
    r = torch.stack([*relative.values()])[:, density > 0]
    alone, even = r > ALONE, r.amin(0) >= EVEN / len(r)
    found = dict(zip(relative, alone.sum(1).tolist(), strict=True))
    between = int((~even & ~alone.any(0)).sum())
    return {"alone": found, "of_all": {"evenly": int(even.sum()), "between": between}}


def unit_rows(W: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "d_sae d_in"]:
    """Scale each row to length 1 (fp32); a row of zeros stays zero."""
    return torch.nn.functional.normalize(W.detach().float(), dim=1)


def decoder_max_cosine(W_dec: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, " d_sae"]:
    """Return max over k != j of |cos(W_dec[j], W_dec[k])| for every latent j; NaN when there is only one."""
    units = unit_rows(W_dec)
    d_sae = len(units)
    if d_sae < 2:
        return torch.full((d_sae,), float("nan"), dtype=torch.float32)
    out, size = [], max(1, _BLOCK // d_sae)
    for start in range(0, d_sae, size):
        block = (units[start : start + size] @ units.T).abs_()
        block.diagonal(start).fill_(-1.0)
        out.append(block.amax(1).clamp_max(1.0))
    return torch.cat(out).cpu()


def nearest(
    a: Float[Tensor, "n_a d_in"], b: Float[Tensor, "n_b d_in"]
) -> tuple[Float[Tensor, " n_a"], Int64[Tensor, " n_a"]]:
    """Return, for each unit row of `a`, the largest signed cosine with the unit rows of `b` and where it is."""
    if not len(a):
        return torch.zeros(0, dtype=torch.float32), torch.zeros(0, dtype=torch.int64)
    size = max(1, _BLOCK // len(b))
    best = [(a[start : start + size] @ b.T).max(1) for start in range(0, len(a), size)]
    cosine = torch.cat([part.values for part in best]).clamp(-1.0, 1.0)
    return cosine.cpu(), torch.cat([part.indices for part in best]).cpu()


# Which latent of one SAE corresponds to which of another, by the direction of their decoder rows.


@dataclass(frozen=True)
class LiveDecoder:
    """The decoder of one SAE and the latents of it that fired."""

    W_dec: Float[Tensor, "d_sae d_in"]
    alive: Int64[Tensor, " alive"]


@dataclass(frozen=True)
class Matching:
    """Latents of `a` against latents of `b`: the nearest for every latent, and a one-to-one pairing of live ones."""

    index: Int64[Tensor, " d_sae"]
    """Nearest live latent of b for each latent of a; -1 when b has none."""
    cosine: Float[Tensor, " d_sae"]
    """Cosine with it; NaN when b has none."""
    pair_a: Int64[Tensor, " pairs"]
    pair_b: Int64[Tensor, " pairs"]
    pair_cosine: Float[Tensor, " pairs"]
    method: str
    """assignment: the pairing of largest total cosine. mutual: pairs in which each is the other's nearest."""
    random_cosine: float
    """Mean nearest cosine of a's live latents with as many random directions as b has live latents: chance level."""

    def summary(self) -> dict[str, float | int | str | None]:
        """Return the statistics over pairs, JSON-ready."""
        n = len(self.pair_a)
        cosine = self.pair_cosine.double()
        return {
            "method": self.method,
            "n_pairs": n,
            "decoder_cosine_mean": float(cosine.mean()) if n else None,
            "frac_above_0.9": float((cosine > 0.9).double().mean()) if n else None,
            "frac_above_0.7": float((cosine > 0.7).double().mean()) if n else None,
            "random_cosine_mean": self.random_cosine if n else None,
        }


def match(a: LiveDecoder, b: LiveDecoder, assignment_max: int, seed: int = 0) -> Matching:
    """Match the latents of `a` with those of `b` by decoder cosine (signed: latents are non-negative)."""
    units_a, units_b = unit_rows(a.W_dec), unit_rows(b.W_dec).to(a.W_dec.device)
    d_sae = len(units_a)
    if len(b.alive) == 0:
        none = torch.zeros(0, dtype=torch.int64)
        index = torch.full((d_sae,), -1, dtype=torch.int64)
        nan = torch.full((d_sae,), float("nan"), dtype=torch.float32)
        return Matching(
            index, nan, none, none, torch.zeros(0, dtype=torch.float32), "none", float("nan")
        )
    cosine, where = nearest(units_a, units_b[b.alive])
    live_a, live_b = units_a[a.alive], units_b[b.alive]
    pair = _assignment if max(len(a.alive), len(b.alive)) <= assignment_max else _mutual
    rows, columns = pair(live_a, live_b)
    pair_cosine = (live_a[rows] * live_b[columns]).sum(1).cpu()
    chance = _random_level(live_a, live_b, seed)
    method = pair.__name__.removeprefix("_")
    pairs = (a.alive[rows], b.alive[columns], pair_cosine)
    return Matching(b.alive[where], cosine, *pairs, method, chance)


def _assignment(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Pair one-to-one with the largest total cosine (Hungarian method)."""
    from scipy.optimize import linear_sum_assignment  # takes a third of a second, needed here only

    rows, columns = linear_sum_assignment((a @ b.T).cpu().numpy(), maximize=True)
    return torch.from_numpy(np.asarray(rows)), torch.from_numpy(np.asarray(columns))


def _mutual(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Pair the latents that are each other's nearest."""
    rows = torch.arange(len(a))
    if not len(a):
        return rows, rows
    to_b, to_a = nearest(a, b)[1], nearest(b, a)[1]
    keep = to_a[to_b] == rows
    return rows[keep], to_b[keep]


def _random_level(a: Tensor, b: Tensor, seed: int) -> float:
    """Mean nearest cosine with random directions, as many as `b` has."""
    if not len(a):
        return float("nan")
    generator = torch.Generator().manual_seed(seed_for(seed, "matching", "random"))
    random = torch.randn(b.shape, generator=generator, dtype=torch.float32).to(a.device)
    return float(nearest(a, unit_rows(random))[0].double().mean())


# Contexts: where latents fire.

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
