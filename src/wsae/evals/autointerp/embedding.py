"""Embedding detection: a latent's held-out contexts told from others by a sentence encoder, without any LLM.

With v(c) the unit vector of window c and m the mean of v over all latents' explaining windows, u(c) = v(c) - m. A
latent is explained by its centroid g = sum_i u(e_i) / |u(e_i)| over its explaining windows e_i, or by words: then
g = v(words). A context scores s(c) = cos(u(c), g). What windows of one corpus have in common says nothing of a latent:
on hand-made features and on latents of SmolLM2-135M taking m away raises the mean AUC (docs/benchmarks.md).
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float32, Float64, Int64

from wsae.core.progress import Progress, quiet
from wsae.evals.autointerp.encoder import Encoder
from wsae.evals.autointerp.metrics import LatentScore, Verdicts, judge
from wsae.evals.autointerp.windows import Collected, LatentContexts, Windows

_BLOCK = 64
"""Latents scored at once: bounds memory at about 64 x contexts x dim x 8 bytes (15 MB)."""


def embedding_scores(
    collected: Collected,
    encoder: Encoder,
    words: Mapping[int, str] | None = None,
    progress: Progress = quiet,
) -> list[LatentScore]:
    """Return the score of every latent, or of those that `words` (latent -> explanation) explains.

    A context counts as active above a threshold that no scored context sets: half-way between the mean similarity of
    the latent's own explaining windows (each to the centroid of the others) and the median one of the other latents'
    explaining windows, most of which do not activate it. With one latent there are no others: no counts, AUC alone.
    """
    latents = [one for one in collected.latents if words is None or one.latent in words]
    if not latents:
        return []
    space = Space(collected, encoder, progress)
    texts = [] if words is None else [words[one.latent] for one in latents]
    named = encoder.encode(texts, progress).astype(np.float64) if texts else None
    out: list[LatentScore] = []
    for start in range(0, len(latents), _BLOCK):
        part = latents[start : start + _BLOCK]
        given = None if named is None else named[start : start + _BLOCK]
        out += _scored(space, part, given)
    return out


class Space:
    """The unit vectors of every window that some latent shows, about their mean."""

    def __init__(self, collected: Collected, encoder: Encoder, progress: Progress = quiet) -> None:
        used = np.unique(np.concatenate([_shown(one) for one in collected.latents]))
        self._row = np.full(
            len(collected.windows) + 1, -1, dtype=np.int64
        )  # the last one is padding
        self._row[used] = np.arange(len(used))
        vectors = window_vectors(collected.windows, used, encoder, progress)
        explaining = [one.explain.window for one in collected.latents]
        self.reference = np.unique(np.concatenate(explaining))
        """Explaining windows of all latents."""
        known = vectors[self._row[self.reference]]
        known = known[~np.isnan(known).any(1)].astype(np.float64)
        if len(collected.latents) > 1 and len(known):
            vectors = vectors - known.mean(0).astype(np.float32)
        else:
            self.reference = self.reference[:0]
        padding = np.full((1, vectors.shape[1]), np.nan, dtype=np.float32)
        self._units = np.concatenate([_unit(vectors), padding])

    def units(self, windows: Int64[np.ndarray, "..."]) -> Float64[np.ndarray, "... dim"]:
        """Return unit vectors; NaN for padding (-1) and for windows without tokens."""
        return self._units[self._row[windows]].astype(np.float64)


def window_vectors(
    windows: Windows, used: Int64[np.ndarray, " used"], encoder: Encoder, progress: Progress = quiet
) -> Float32[np.ndarray, "used dim"]:
    """Return the encoder's vectors of some windows."""
    return encoder.encode([windows.text(int(window)) for window in used], progress)


def _scored(
    space: Space, latents: list[LatentContexts], named: np.ndarray | None
) -> list[LatentScore]:
    explain = space.units(_padded([one.explain.window for one in latents]))
    if named is None:
        centroid, own = _centroids(explain)
    else:
        centroid = _unit(named)
        own = np.einsum("lnd,ld->ln", explain, centroid)
    thresholds = _thresholds(space, latents, centroid, own)
    roles = [
        np.einsum("lnd,ld->ln", space.units(_padded(shown)), centroid)
        for shown in (
            [one.positive.window for one in latents],
            [one.negative.window for one in latents],
            [one.hard.window for one in latents],
        )
    ]
    out = []
    for i, one in enumerate(latents):
        sizes = (len(one.positive), len(one.negative), len(one.hard))
        verdicts = Verdicts(*(role[i, :n] for role, n in zip(roles, sizes, strict=True)))
        out.append(judge(one.latent, one.density, verdicts, float(thresholds[i])))
    return out


def _centroids(
    explain: Float64[np.ndarray, "latents n dim"],
) -> tuple[Float64[np.ndarray, "latents dim"], Float64[np.ndarray, "latents n"]]:
    """Return unit centroids g, and each explaining window's cosine with the centroid of the others.

    With S the sum of unit vectors u_i: cos_i = u_i . (S - u_i) / |S - u_i|, |S - u_i|^2 = |S|^2 - 2 u_i . S + 1.
    """
    total = np.where(np.isnan(explain), 0, explain).sum(1)  # a row is NaN as a whole
    along = np.einsum("lnd,ld->ln", explain, total)
    rest = np.maximum((total**2).sum(1)[:, None] - 2 * along + 1, 0)
    cosine = np.divide(
        along - 1, np.sqrt(rest), out=np.full_like(along, np.nan), where=rest > _TINY
    )
    return _unit(total), cosine


_TINY = 1e-12
"""Squared length below which a sum of unit vectors has no direction."""


def _thresholds(
    space: Space,
    latents: list[LatentContexts],
    centroid: Float64[np.ndarray, "latents dim"],
    own: Float64[np.ndarray, "latents n"],
) -> Float64[np.ndarray, " latents"]:
    """Return half-way points; NaN where there is nothing on a side."""
    others = space.units(space.reference) @ centroid.T
    out = np.full(len(latents), np.nan)
    for i, one in enumerate(latents):
        foreign = others[~np.isin(space.reference, one.explain.window), i]
        foreign, mine = foreign[~np.isnan(foreign)], own[i][~np.isnan(own[i])]
        if len(foreign) and len(mine):
            out[i] = (np.median(foreign) + mine.mean()) / 2
    return out


def _shown(one: LatentContexts) -> np.ndarray:
    roles = (one.explain, one.positive, one.negative, one.hard)
    return np.concatenate([role.window for role in roles])


def _padded(windows: Sequence[np.ndarray]) -> Int64[np.ndarray, "latents n"]:
    """Return rows of equal length, filled with -1."""
    out = np.full((len(windows), max(map(len, windows))), -1, dtype=np.int64)
    for row, one in zip(out, windows, strict=True):
        row[: len(one)] = one
    return out


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Return rows of length 1; NaN where a row has no direction."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
