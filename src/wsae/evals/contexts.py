"""Where sampled latents fire most: streaming top contexts per latent, each from another sequence.

Only the entries of sequences that may still be shown are kept, so memory depends on latents x contexts x sequence
length, not on the number of tokens. Rows arrive sequence by sequence (the order `heldout` promises).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from wsae.core.seeds import seed_for
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


class LatentFirings(NamedTuple):
    """Active entries of sampled latents: slot (place among the sampled), sequence, position, value."""

    slot: Int64[np.ndarray, " hits"]
    seq: Int64[np.ndarray, " hits"]
    pos: Int64[np.ndarray, " hits"]
    value: Float64[np.ndarray, " hits"]

    def take(self, keep: np.ndarray) -> "LatentFirings":
        """Return the entries at `keep` (mask or index)."""
        return LatentFirings(*(column[keep] for column in self))

    @staticmethod
    def join(parts: Sequence["LatentFirings"]) -> "LatentFirings":
        """Concatenate."""
        return LatentFirings(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


_EMPTY = np.zeros(0, dtype=np.int64)
_NONE = LatentFirings(_EMPTY, _EMPTY, _EMPTY, np.zeros(0))


class TopContexts:
    """Running top contexts of some latents of one member."""

    def __init__(self, latents: Int64[Tensor, " latents"], d_sae: int, n_contexts: int) -> None:
        self.latents = latents
        self.n_contexts = n_contexts
        self._slot = torch.full((d_sae,), -1, dtype=torch.int64)
        self._slot[latents] = torch.arange(len(latents))
        self._hits = _NONE

    def update(
        self, entries: Entries, seq: Int64[Tensor, " batch"], pos: Int64[Tensor, " batch"]
    ) -> None:
        """Add the codes of some rows; `seq` and `pos` place each row."""
        slot = self._slot[entries.indices]
        rows = entries.rows[slot >= 0]
        new = LatentFirings(
            slot[slot >= 0].numpy(),
            seq[rows].numpy(),
            pos[rows].numpy(),
            entries.values[slot >= 0].float().numpy(),
        )
        hits = LatentFirings.join([self._hits, new])
        unfinished = hits.seq == int(seq[-1]) if len(seq) else np.zeros(len(hits.seq), dtype=bool)
        self._hits = hits.take(unfinished | _among(hits, self._best(hits)))

    def _best(self, hits: LatentFirings) -> LatentFirings:
        """Return the strongest entry of each shown (slot, seq), strongest first within a slot.

        Ties go to the earlier sequence and position, so the result does not depend on how rows were split.
        """
        hits = hits.take(np.lexsort((hits.pos, -hits.value, hits.seq, hits.slot)))
        first = np.ones(len(hits.seq), dtype=bool)
        first[1:] = (np.diff(hits.slot) != 0) | (np.diff(hits.seq) != 0)
        peaks = hits.take(first)
        peaks = peaks.take(np.lexsort((peaks.seq, -peaks.value, peaks.slot)))
        rank = np.arange(len(peaks.slot)) - np.searchsorted(peaks.slot, peaks.slot)
        return peaks.take(rank < self.n_contexts)

    def result(self) -> dict[int, list["Context"]]:
        """Return each latent's contexts, strongest first: the peak and every activation in its sequence."""
        best = self._best(self._hits)
        hits = self._hits.take(np.lexsort((self._hits.pos, self._hits.seq, self._hits.slot)))
        order = _key(hits)
        out: dict[int, list[Context]] = {int(latent): [] for latent in self.latents}
        for slot, seq, pos, value in zip(*best, strict=True):
            key = slot * _stride(hits) + seq
            span = slice(*np.searchsorted(order, [key, key + 1]))
            acts = dict(zip(hits.pos[span].tolist(), hits.value[span].tolist(), strict=True))
            context = Context(int(seq), int(pos), float(value), acts)
            out[int(self.latents[slot])].append(context)
        return out


class Context(NamedTuple):
    """One sequence in which a latent fires: where it peaks, and its activation by position."""

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
        start = max(0, min(self.pos - int(width * BEFORE), len(ids) - width))
        stop = min(len(ids), start + width)
        return {
            "tokens": decode(ids.tolist(), slice(start, stop)),
            "acts": [float(f"{self.acts.get(p, 0.0):.4g}") for p in range(start, stop)],
            "peak": self.pos - start,
            "seq": self.seq,
        }


def _stride(hits: LatentFirings) -> int:
    return int(hits.seq.max(initial=0)) + 1


def _key(hits: LatentFirings) -> np.ndarray:
    """One number per (slot, seq), in that order."""
    return hits.slot * _stride(hits) + hits.seq


def _among(hits: LatentFirings, shown: LatentFirings) -> np.ndarray:
    """Which entries belong to a shown (slot, seq)."""
    stride = _stride(hits)
    return np.isin(hits.slot * stride + hits.seq, shown.slot * stride + shown.seq)
