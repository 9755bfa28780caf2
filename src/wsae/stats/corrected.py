"""Class scores with chance taken out, and their intervals over images.

    corrected_i = (beta_i - E[beta | s_i]) / (1 - E[beta | s_i])

beta_i is the share of the most frequent class among the s_i samples unit i is active on, E its expectation for a unit
that is active on as many samples whatever their class (`wsae.stats.chance`). 1 means one class only, 0 chance; units
with little support stay out, since their share says little either way.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64
from scipy import stats
from torch import Tensor

from wsae.stats.chance import Chance
from wsae.stats.classes import ClassTable, information
from wsae.stats.consistency import largest_share

Values = Float64[Tensor, " units"]


def corrected_share(
    counts: Int64[Tensor, "units n_classes"], chance: Chance, min_support: int = 1
) -> Values:
    """Return (beta - E) / (1 - E) of each unit; NaN under `min_support`, or where E is 1."""
    support = counts.sum(1)
    expected = torch.from_numpy(chance.share)[support]
    value = (largest_share(counts) - expected) / (1 - expected)
    known = (support >= max(1, min_support)) & (expected < 1)
    return torch.where(known, value, torch.nan)


def corrected_information(
    counts: Int64[Tensor, "units n_classes"],
    totals: Int64[Tensor, " n_classes"],
    chance: Chance,
    min_support: int = 1,
) -> Values:
    """Return I - E[I | s] in bits, the mutual information beyond chance; NaN under `min_support`."""
    support = counts.sum(1)
    value = information(counts, totals) - torch.from_numpy(chance.information)[support]
    return torch.where(support >= max(1, min_support), value, torch.nan)


class OverImages(NamedTuple):
    """A mean over units and the same without each group of images."""

    value: float
    without: Float64[np.ndarray, " groups"]


def over_images(
    table: ClassTable,
    score: Callable[[Int64[Tensor, "units n_classes"]], Values],
    units: Bool[Tensor, " units"],
) -> OverImages | None:
    """Return the mean score of the marked units, with all images and without each group; None for no units or groups.

    The units stay the same when a group is left out (a unit whose support sinks below a minimum still counts). Groups
    are left out rather than images drawn with replacement: a sample drawn twice agrees with itself, which would raise
    every share.
    """
    if not bool(units.any()) or not table.n_groups:
        return None
    counts = table.counts[units]
    whole = float(score(counts).nanmean())
    parts = (score(counts - group[units]) for group in table.group_counts)
    return OverImages(whole, np.array([float(part.nanmean()) for part in parts]))


def jackknife(found: OverImages, confidence: float = 0.95) -> tuple[float, float]:
    """Return value -+ t_(G-1) se with se^2 = (G - 1) / G sum_g (without_g - mean)^2 (delete-a-group jackknife)."""
    groups = len(found.without)
    spread = ((found.without - found.without.mean()) ** 2).sum()
    error = float(np.sqrt((groups - 1) / groups * spread))
    half = float(stats.t.ppf((1 + confidence) / 2, groups - 1)) * error
    return found.value - half, found.value + half


def gap(a: OverImages, b: OverImages) -> OverImages:
    """Return a - b, paired: both leave out the same images."""
    return OverImages(a.value - b.value, a.without - b.without)
