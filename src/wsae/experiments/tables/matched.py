"""A weighted SAE beside a plain one of the same FVU.

Weights raise the plain FVU, and an SAE that reconstructs less may be easier to read for that reason alone. So plain
SAEs with a higher FVU are trained too, in two ways: with fewer active latents, or with the same number trained too
slowly (same density). Along each way, ordered by FVU f_1 < f_2 < ..., the plain score is read at the weighted SAE's
FVU f in [f_i, f_(i+1)] by linear interpolation:

    s(f) = (1 - t) s_i + t s_(i+1),    t = (f - f_i) / (f_(i+1) - f_i),    difference = s_weighted - s(f).

Intervals resample the latents of the three SAEs independently; the FVUs' own errors are a hundred times smaller than
the gaps between them and are left out.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

Scores = Float64[np.ndarray, " latents"]


class Point(NamedTuple):
    """One plain SAE: its FVU and its latents' scores."""

    fvu: float
    scores: Scores
    label: str


class AtFVU(NamedTuple):
    """A weighted SAE's mean score minus the plain one's at the same FVU, with its interval."""

    difference: float | None
    low: float | None
    high: float | None
    n: int
    between: tuple[str, str] | None
    """The plain SAEs on either side; none: no plain SAE here has such an FVU."""
    share: float | None
    """t, the weight of the second."""


def bracket(curve: Sequence[Point], fvu: float) -> tuple[Point, Point, float] | None:
    """Return the neighbours f_i <= fvu <= f_(i+1) on the curve and t; None outside it."""
    ordered = sorted(curve, key=lambda point: point.fvu)
    for left, right in zip(ordered, ordered[1:], strict=False):
        if left.fvu <= fvu <= right.fvu:
            gap = right.fvu - left.fvu
            return left, right, (fvu - left.fvu) / gap if gap > 0 else 0.0
    return None


def at_fvu(
    member: Point, curve: Sequence[Point], draws: int, confidence: float, seed: int
) -> AtFVU:
    """Return member minus the curve at the member's FVU, with a percentile bootstrap interval over latents."""
    found = bracket(curve, member.fvu)
    if found is None:
        return AtFVU(None, None, None, len(member.scores), None, None)
    left, right, t = found
    parts = [(member.scores, 1.0), (left.scores, t - 1.0), (right.scores, -t)]
    parts = [(scores, weight) for scores, weight in parts if weight]
    names = (left.label, right.label)
    if not all(len(scores) for scores, _ in parts):
        return AtFVU(None, None, None, len(member.scores), names, t)
    value = sum(weight * float(scores.mean()) for scores, weight in parts)
    if not all(len(scores) > 1 for scores, _ in parts):
        return AtFVU(value, None, None, len(member.scores), names, t)
    rng = np.random.default_rng(seed)
    spread = sum(weight * _resampled(scores, draws, rng) for scores, weight in parts)
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.asarray(spread), [tail, 1 - tail])
    return AtFVU(value, float(low), float(high), len(member.scores), names, t)


def _resampled(
    scores: Scores, draws: int, rng: np.random.Generator
) -> Float64[np.ndarray, " draws"]:
    picks = rng.integers(0, len(scores), size=(draws, len(scores)))
    return scores[picks].mean(axis=1)
