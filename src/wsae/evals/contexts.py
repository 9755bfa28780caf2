"""Where sampled latents fire most: streaming top contexts per latent, each from another sequence.

Only the entries of sequences that may still be shown are kept, so memory depends on latents x contexts x sequence
length, not on the number of tokens. Rows arrive sequence by sequence (the order `heldout` promises).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64
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


class TopContexts:
    """Running top contexts of some latents of one member: their firings in the sequences that may still be shown.

    `wsae.evals.interpret.collect` keeps the strongest and random windows of fixed width in arrays of fixed size. Here
    whole sequences of unknown length are kept, as sparse as their firings: as rows of such arrays they would need
    latents x contexts x sequence length, and a row a sequence where there is no text.
    """

    def __init__(self, latents: Int64[Tensor, " latents"], d_sae: int, n_contexts: int) -> None:
        self.latents = latents
        self.n_contexts = n_contexts
        self._is_shown = torch.zeros(d_sae, dtype=torch.bool)
        self._is_shown[latents] = True
        self._firings = NO_FIRINGS

    def update(
        self, entries: Entries, seq: Int64[Tensor, " batch"], pos: Int64[Tensor, " batch"]
    ) -> None:
        """Add the codes of some rows; `seq` and `pos` place each row."""
        if not len(seq):
            return
        shown = self._is_shown[entries.indices]
        rows = entries.rows[shown]
        columns = (entries.indices[shown], seq[rows], pos[rows], entries.values[shown].float())
        new = Firings(*(column.numpy() for column in columns))
        firings = Firings.join(self._firings, new)
        best, stride = self._best(firings), int(firings.window.max(initial=0)) + 1
        among = np.isin(_key(firings, stride), _key(best, stride))
        self._firings = firings.take((firings.window == int(seq[-1])) | among)

    def _best(self, firings: Firings) -> Firings:
        """Return the strongest firing of each shown (latent, sequence), strongest first within a latent.

        Ties go to the earlier sequence and position, so the result does not depend on how rows were split.
        """
        latent, seq, pos, value = firings
        firings = firings.take(np.lexsort((pos, -value, seq, latent)))
        first = np.ones(len(seq), dtype=bool)
        first[1:] = (np.diff(firings.latent) != 0) | (np.diff(firings.window) != 0)
        peaks = firings.take(first)
        peaks = peaks.take(np.lexsort((peaks.window, -peaks.value, peaks.latent)))
        return peaks.take(places(peaks.latent) < self.n_contexts)

    def result(self) -> dict[int, list["Context"]]:
        """Return each latent's contexts, strongest first: the peak and every activation in its sequence."""
        latent, seq, pos, _ = self._firings
        firings = self._firings.take(np.lexsort((pos, seq, latent)))
        stride = int(seq.max(initial=0)) + 1
        order = _key(firings, stride)
        out: dict[int, list[Context]] = {int(latent): [] for latent in self.latents}
        for peak in zip(*self._best(self._firings), strict=True):
            latent, seq, pos, value = peak
            key = latent * stride + seq
            span = slice(*np.searchsorted(order, [key, key + 1]))
            inside = zip(firings.offset[span].tolist(), firings.value[span].tolist(), strict=True)
            out[int(latent)].append(Context(int(seq), int(pos), float(value), dict(inside)))
        return out


def _key(firings: Firings, stride: int) -> Int64[np.ndarray, " n"]:
    """Return one number per (latent, sequence), in that order."""
    return firings.latent * stride + firings.window


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
