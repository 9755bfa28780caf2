"""One pass over a run's held-out data: what every latent of every member does, packed as it lies in an index.

A context in an index is a place in the text and what fires around it; the text itself is kept once, as token ids.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from wsae.acts.source import HeldoutRows
from wsae.acts.stream import HeldOut
from wsae.acts.tokens import TokenTable, alone
from wsae.core.errors import UserError
from wsae.core.progress import Progress, quiet
from wsae.core.seeds import seed_for
from wsae.evals.latents import (
    Entries,
    Kept,
    TopContexts,
    Wanted,
    by_strength,
    kept_bytes,
    places,
    span_of,
)
from wsae.kernels.eager import SparseCode
from wsae.sae.model import SAE, Encoder
from wsae.serve.config import IndexConfig
from wsae.serve.schema import BINS, bin_of

DRAWN = 50
"""Random firings kept of each latent: what it fires on most is counted over these, and the samples are of them."""
TYPICAL = 8
"""Tokens on which it fires most."""
SEARCHED = 5
"""Contexts of a latent that a search looks through."""
RECENT = 4096
"""Sequences whose text is remembered."""
Say = Callable[[str], object]


class Seen:
    """What one member's latents do while the rows go by: counts, strongest activations, contexts."""

    def __init__(self, d_sae: int, chosen: Int64[Tensor, " latents"], wanted: Wanted) -> None:
        self.top = TopContexts(chosen, d_sae, wanted)
        self.chosen = np.isin(np.arange(d_sae), chosen.numpy())
        self.n = 0
        self.count = torch.zeros(d_sae, dtype=torch.int64)
        self.peak = torch.zeros(d_sae, dtype=torch.float64)
        self.histogram = torch.zeros(d_sae, BINS, dtype=torch.int32)

    def update(self, code: SparseCode, seq: Tensor, pos: Tensor) -> None:
        """Add some rows."""
        entries = Entries(code)
        self.top.update(entries, seq.long(), pos.long())
        self.n += entries.batch
        self.count += torch.bincount(entries.indices, minlength=len(self.count))
        self.peak.scatter_reduce_(0, entries.indices, entries.values, "amax")
        flat = bin_of(entries.values).add_(entries.indices, alpha=BINS)
        ones = torch.ones_like(flat, dtype=torch.int32)
        self.histogram.view(-1).scatter_add_(0, flat, ones)

    @property
    def density(self) -> Float64[np.ndarray, " d_sae"]:
        """Share of the rows on which each latent fires."""
        return (self.count.double() / max(1, self.n)).numpy()


@dataclass
class Gathered:
    """What all members' latents do, and the text that they do it on."""

    table: TokenTable
    cfg: IndexConfig
    seen: dict[int, Seen] = field(default_factory=dict)
    """By the member's number."""

    def contexts(self, member: int) -> "MemberContexts":
        """Return the contexts of a member's latents, chosen and packed."""
        return MemberContexts(self.seen[member].top.kept(), self)

    def __post_init__(self) -> None:
        self.texts: Callable[[int], list[str]] = lru_cache(RECENT)(self._texts)
        """Sequence -> what its tokens read, the latest ones remembered."""

    def ids(self, seq: int) -> Int64[Tensor, " length"]:
        """Return the token ids of a sequence."""
        return self.table.ids[seq, : int(self.table.lengths[seq])].long()

    def _texts(self, seq: int) -> list[str]:
        return self.table.decode(self.ids(seq).tolist())


class Watched(NamedTuple):
    """A member whose latents are watched: its number, hook, SAE, and those of its latents that get contexts."""

    id: int
    hook: str
    sae: SAE
    chosen: Int64[Tensor, " latents"]


def collect(
    members: list[Watched],
    data: HeldOut,
    table: TokenTable,
    cfg: IndexConfig,
    progress: Progress = quiet,
    say: Say = str,
) -> Gathered:
    """Return what the latents of some members do, all in one pass; `say` is told beforehand what it takes."""
    wanted = Wanted(cfg.per_latent, cfg.window, DRAWN, seed_for(cfg.seed, "draw"))
    out = Gathered(table, cfg, {m.id: Seen(m.sae.cfg.d_sae, m.chosen, wanted) for m in members})
    encoders = {member.id: Encoder(member.sae) for member in members}
    total = int(table.lengths.sum())

    work: list[Future[None]] = []

    def finish() -> None:
        for one in work:
            one.result()

    def add(chunk: HeldoutRows) -> None:
        codes = {m.id: encoders[m.id](chunk.x[m.hook]) for m in members}
        finish()  # the chunk before is kept while this one is encoded, so that no core stands idle
        work[:] = [
            pool.submit(out.seen[number].update, code, chunk.seq, chunk.pos)
            for number, code in codes.items()
        ]

    with torch.inference_mode(), ThreadPoolExecutor(torch.get_num_threads()) as pool:
        chunks = data.heldout(cfg.batch_size)
        first = next(iter(_timed(chunks, add)), None)
        if first is None:
            raise UserError(
                "there are no held-out rows to collect contexts from; hold out more data"
            )
        say(_beforehand(members, wanted, total, total * first))
        with progress("contexts", total, "rows", min(total, cfg.batch_size)) as tick:
            for chunk in chunks:
                add(chunk)
                tick(len(chunk.seq))
        finish()
    return out


def _timed(chunks: Iterator[HeldoutRows], add: Callable[[HeldoutRows], None]) -> Iterator[float]:
    """Yield the seconds a row of each chunk takes; the second half of a chunk, when everything is warm."""
    for chunk in chunks:
        half = len(chunk.seq) // 2
        for part in (slice(half), slice(half, None)):
            begin = time.perf_counter()
            x = {hook: values[part] for hook, values in chunk.x.items()}
            add(HeldoutRows(x, chunk.seq[part], chunk.pos[part]))
        yield (time.perf_counter() - begin) / max(1, len(chunk.seq) - half)


def _beforehand(members: list[Watched], wanted: Wanted, rows: int, seconds: float) -> str:
    """Return in one line what collecting takes: rows, time, memory, and room in the index."""
    latents = sum(len(member.chosen) for member in members)
    memory, disk = kept_bytes(wanted, latents) / 1e6, latents * PACKED / 1e6
    return (
        f"contexts of {latents:,} latents from {rows:,} tokens: about {max(1, round(seconds)):,} s, "
        f"{memory:,.0f} MB of memory, {disk:,.0f} MB in the index"
    )


PACKED = 1000
"""Bytes of a latent's contexts and counts in the index, about."""


class MemberContexts:
    """The contexts of one member's latents: the strongest, then some over the quantiles of the random firings."""

    def __init__(self, kept: Kept, gathered: Gathered) -> None:
        self._gathered = gathered
        token = gathered.table.ids.numpy()[kept.seq, kept.pos].astype(np.int64)
        self._fires = most_frequent(kept.latent[kept.random], token[kept.random])
        self._peaks = most_frequent(kept.latent[kept.top], token[kept.top])
        self._drawn = np.bincount(kept.latent[kept.random])
        spread = quantiles(kept, gathered.cfg.samples)
        rows = np.concatenate([np.flatnonzero(kept.top), spread])
        sample = np.arange(len(rows)) >= len(rows) - len(spread)
        order = by_strength(kept.latent[rows] << 1 | sample, kept.value[rows])
        self._kept, self._sample = kept.take(rows[order]), sample[order]
        self._ends = np.cumsum(self._kept.size)

    @property
    def sequences(self) -> set[int]:
        """The sequences that are shown."""
        return set(np.unique(self._kept.seq).tolist())

    @property
    def latents(self) -> list[int]:
        """The latents that have contexts."""
        return np.unique(self._kept.latent).tolist()

    def peaks(self, latent: int) -> list[str]:
        """Return the tokens of its strongest firings as they read by themselves, the most frequent first."""
        return self._read(self._peaks.of(latent))

    def fires(self, latent: int) -> list[str]:
        """Return the tokens of its random firings as they read by themselves, the most frequent first."""
        return self._read(self._fires.of(latent))

    def _read(self, found: list[tuple[int, int]]) -> list[str]:
        texts = self._gathered.table.texts([token for token, _ in found])
        return [alone(texts[token]) for token, _ in found]

    def shares(self, latent: int) -> bytes:
        """Return shares of the random firings (float32), then the tokens they are on (int32)."""
        found = self._fires.of(latent)
        shares = np.array([times / self._drawn[latent] for _, times in found], dtype=np.float32)
        return shares.tobytes() + np.array([t for t, _ in found], dtype=np.int32).tobytes()

    def packed(self, latent: int) -> bytes | None:
        """Return a latent's contexts as an index keeps them (`unpacked`); None without any."""
        first, last = np.searchsorted(self._kept.latent, [latent, latent + 1]).tolist()
        if first == last:
            return None
        kept, rows = self._kept, slice(first, last)
        begin = int(self._ends[first] - kept.size[first])
        inside = slice(begin, int(self._ends[last - 1]))
        samples = int(self._sample[rows].sum())
        sizes = np.array([last - first - samples, samples])
        numbers = np.concatenate([sizes, kept.seq[rows], kept.pos[rows], kept.size[rows]])
        acts = kept.act[inside].astype(np.float32).tobytes()
        return numbers.astype(np.int32).tobytes() + acts + kept.offset[inside].tobytes()

    def texts(self, latent: int) -> list[str]:
        """Return the text of a latent's strongest contexts, which a search looks through."""
        first, last = np.searchsorted(self._kept.latent, [latent, latent + 1]).tolist()
        top = range(first, min(last, first + SEARCHED))
        rows = [row for row in top if not self._sample[row]]
        return [self._around(int(self._kept.seq[row]), int(self._kept.pos[row])) for row in rows]

    def _around(self, seq: int, pos: int) -> str:
        """Return the text of a window."""
        texts = self._gathered.texts(seq)
        part = span_of(pos, len(texts), self._gathered.cfg.window)
        return "".join(texts[part])


def quantiles(kept: Kept, n: int) -> Int64[np.ndarray, " rows"]:
    """Return n random firings of each latent, one from the end of each of n equal shares of them by activation.

    Those that are among the strongest contexts are left out.
    """
    rows = np.flatnonzero(kept.random)
    rows = rows[by_strength(kept.latent[rows], kept.value[rows])]
    latent = kept.latent[rows]
    rank, size = places(latent), np.bincount(latent)[latent] if len(rows) else latent
    chosen = (rank + 1) * n // np.maximum(size, n) > rank * n // np.maximum(size, n)
    rows = rows[chosen]
    return rows[~kept.top[rows]]


class Frequent(NamedTuple):
    """The TYPICAL most frequent tokens of some latents, by latent, the most frequent first and ties by token."""

    latent: Int64[np.ndarray, " n"]
    token: Int64[np.ndarray, " n"]
    times: Int64[np.ndarray, " n"]

    def of(self, latent: int) -> list[tuple[int, int]]:
        """Return (token, times) of one latent."""
        part = slice(*np.searchsorted(self.latent, [latent, latent + 1]))
        return list(zip(self.token[part].tolist(), self.times[part].tolist(), strict=True))


def most_frequent(latent: Int64[np.ndarray, " n"], token: Int64[np.ndarray, " n"]) -> Frequent:
    """Count the tokens of each latent."""
    pairs = torch.from_numpy(latent << 32 | token).sort().values
    pair, times = (a.numpy() for a in pairs.unique_consecutive(return_counts=True))
    order = np.lexsort((-times, pair >> 32))
    order = order[places(pair[order] >> 32) < TYPICAL]
    return Frequent(pair[order] >> 32, pair[order] & 0xFFFFFFFF, times[order])
