"""Windows of text and what a latent does in them: what collection hands to every scorer.

The two sides, explain and score, share no document.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float32, Int32, Int64

from wsae.acts.tokens import REACH, TokenTable


@dataclass(frozen=True)
class Windows:
    """Distinct windows of `width` tokens or fewer, each once, whoever shows them; -1 pads `ids`."""

    ids: Int32[np.ndarray, "windows width"]
    seq: Int64[np.ndarray, " windows"]
    start: Int64[np.ndarray, " windows"]
    """Position of the first token in its sequence."""
    document: Int64[np.ndarray, " windows"]
    decode: Callable[..., list[str]]
    """(token ids, part of them) -> the texts of the part, leading spaces included (`TokenTable.decode`)."""
    beyond: Int32[np.ndarray, "windows beyond"] | None = None
    """The ids just before and just after each window, as many of each: a character may be split there."""

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.ids)

    def tokens(self, window: int) -> list[str]:
        """Return the texts of a window's tokens."""
        ids = self.ids[window]
        inside = ids[ids >= 0].tolist()
        if self.beyond is None:
            return self.decode(inside)
        before, after = (side[side >= 0].tolist() for side in np.split(self.beyond[window], 2))
        part = slice(len(before), len(before) + len(inside))
        return self.decode([*before, *inside, *after], part)

    def text(self, window: int) -> str:
        """Return a window as one string."""
        return "".join(self.tokens(window))


def cut_windows(
    table: TokenTable,
    seq: Int64[np.ndarray, " windows"],
    start: Int64[np.ndarray, " windows"],
    document: Int64[np.ndarray, " windows"],
    width: int,
) -> Windows:
    """Return the windows that begin at `start` of sequences `seq`, shorter where a sequence ends."""

    def taken(first: int, stop: int) -> Int32[np.ndarray, "windows _"]:
        place = start[:, None] + np.arange(first, stop)
        inside = (place >= 0) & (place < table.lengths.numpy()[seq][:, None])
        ids = table.ids.numpy()[seq[:, None], np.where(inside, place, 0)]
        return np.where(inside, ids, -1).astype(np.int32)

    beyond = np.concatenate([taken(-REACH, 0), taken(width, width + REACH)], axis=1)
    return Windows(taken(0, width), seq, start, document, table.decode, beyond)


@dataclass(frozen=True)
class Shown:
    """Some windows of one latent: rows of `Windows`, and its activation on each token (0 where silent or padded)."""

    window: Int64[np.ndarray, " n"]
    acts: Float32[np.ndarray, "n width"]

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.window)


@dataclass(frozen=True)
class LatentContexts:
    """One latent's windows in every role."""

    latent: int
    density: float
    """Share of the collected tokens on which it fires."""
    peak: float
    """Its largest activation on them."""
    explain: Shown
    """Activating, from explaining documents, strongest first."""
    positive: Shown
    """Activating, from scoring documents."""
    negative: Shown
    """Random windows of scoring documents in which it is silent."""
    hard: Shown
    """Windows of scoring documents in which it is silent and a neighbour is not; may be empty."""

    def scored(self) -> tuple[Shown, Shown, Shown]:
        """Return the windows that are scored: positive, negative and hard."""
        return self.positive, self.negative, self.hard


@dataclass(frozen=True)
class Collected:
    """One member's latents with their contexts, and those left out for want of them."""

    windows: Windows
    latents: list[LatentContexts]
    skipped: dict[str, int]
    """Reason ("silent", "few windows", "few silent windows") -> latents of the sample left out for it."""
    counts: dict[str, int] = field(default_factory=dict)
    """Complete windows of the pass: "explain", "score", and "straddling" two documents (dropped)."""
    left_out: dict[int, str] = field(default_factory=dict)
    """Latent -> the reason for which it was skipped."""


@dataclass(frozen=True)
class LatentFragments:
    """One latent's fragments by role, all from different documents."""

    latent: int
    density: float
    """Share of the fragments' tokens on which it fires."""
    explain: Shown
    top: Shown
    random: Shown


@dataclass(frozen=True)
class Fragments:
    """One member's latents with their fragments, and those skipped."""

    windows: Windows
    latents: list[LatentFragments]
    skipped: dict[str, int] = field(default_factory=dict)
    """Reason -> latents skipped for it."""
    n_fragments: int = 0
