"""Bootstrap intervals over independent units (sequences or latents), in fp64 and seeded.

Every estimate here is a ratio of sums R = sum_u num_u / sum_u den_u; a mean has den_u = 1. Resampling draws whole
units with replacement and takes the ratio of the resampled sums (Efron & Tibshirani 1993, percentile interval, its
tails widened as Student's are for few units). A paired comparison draws the same units for both members.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from wsae.evals.config import EvalConfig

_BLOCK = 1 << 22
"""Resampled units drawn at once: bounds memory at about 64 MB."""

Column = Float64[np.ndarray, " units"]


class Ratio(NamedTuple):
    """Per-unit numerators and denominators of R = sum num / sum den."""

    num: Column
    den: Column

    @property
    def value(self) -> float | None:
        """R over all units; None when it is undefined (no units, or no positive denominator)."""
        total = float(self.den.sum())
        return float(self.num.sum()) / total if total > 0 else None


class Estimate(NamedTuple):
    """A value with its percentile interval; None where it is undefined (few units have no interval)."""

    value: float | None
    low: float | None
    high: float | None


class Difference(NamedTuple):
    """R_a - R_b with its interval, effect size and the number of units."""

    difference: float | None
    low: float | None
    high: float | None
    effect_size: float | None
    n: int


def mean(values: Column) -> Ratio:
    """Return the mean of `values` as a ratio: num = values, den = 1."""
    values = np.asarray(values, dtype=np.float64)
    return Ratio(values, np.ones_like(values))


def resampled_sums(
    columns: Float64[np.ndarray, "units columns"], draws: int, seed: int
) -> Float64[np.ndarray, "draws columns"]:
    """Return sum_u n_u columns[u] for each draw, n ~ Multinomial(units; 1/units, ...).

    The draws depend on the number of units and the seed only, so columns resampled together stay paired.
    """
    units, parts = len(columns), []
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK // units)
    for start in range(0, draws, block):
        rows = min(block, draws - start)
        picks = rng.integers(0, units, size=(rows, units))
        picks += np.arange(rows)[:, None] * units
        counts = np.bincount(picks.ravel(), minlength=rows * units)
        parts.append(counts.reshape(rows, units).astype(np.float64) @ columns)
    return np.concatenate(parts)


def resampled_means(values: Column, draws: int, seed: int) -> Float64[np.ndarray, " draws"]:
    """Return the mean of the resampled values for each draw."""
    return resampled_sums(values[:, None], draws, seed)[:, 0] / len(values)


FEWEST_UNITS = 5
"""Units below which there is no interval: draws of four hold their mean in nine cases of ten at most."""


def percentiles(
    draws: Column, confidence: float, n: int
) -> tuple[float, float] | tuple[None, None]:
    """Return the interval of a statistic resampled from n units: its quantiles at a and 1 - a.

    a = Phi(-sqrt(n / (n - 1)) t), t the (1 + confidence) / 2 quantile of Student's distribution of n - 1 degrees of
    freedom: resampled units vary by a share (n - 1) / n of what they should, about a mean that is not known (Hesterberg
    2015, the expanded percentile interval). None below 5 units.
    """
    if n < FEWEST_UNITS:
        return None, None
    from scipy.special import ndtr, stdtrit  # a tenth of a second to import, needed here only

    tail = ndtr(-((n / (n - 1)) ** 0.5) * stdtrit(n - 1, (1 + confidence) / 2))
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)


def effect_size(gap: float, spread: float) -> float | None:
    """Return gap / spread; no spread means no effect when there is no gap, and no finite effect otherwise."""
    if spread > abs(gap) * 1e-12:
        return gap / spread
    return 0.0 if gap == 0 else None


def estimate(ratio: Ratio, cfg: EvalConfig) -> Estimate:
    """Return R with its percentile bootstrap interval over units."""
    return estimates([ratio], cfg)[0]


def estimates(ratios: list[Ratio], cfg: EvalConfig) -> list[Estimate]:
    """Return several ratios over the same units, from one set of draws (much cheaper than one by one)."""
    if not ratios or (n := len(ratios[0].num)) < FEWEST_UNITS:
        return [Estimate(r.value, None, None) for r in ratios]
    columns = np.stack([column for r in ratios for column in r], axis=1)
    sums, out = resampled_sums(columns, cfg.draws, cfg.seed), []
    for ratio, num, den in zip(ratios, sums.T[::2], sums.T[1::2], strict=True):
        known = bool((den > 0).all())
        edges = percentiles(num / den, cfg.confidence, n) if known else (None, None)
        out.append(Estimate(ratio.value, *edges))
    return out


def paired_difference(a: Ratio, b: Ratio, cfg: EvalConfig) -> Difference:
    """Return R_a - R_b over the same units, with the paired bootstrap interval.

    effect_size = (R_a - R_b) / sd_u(d_u), the standardised mean of the paired differences (Cohen's d_z), where
    d_u = (R_a - R_b) + (num_a,u - R_a den_a,u) / mean(den_a) - (num_b,u - R_b den_b,u) / mean(den_b)
    is the unit's linearised share of the difference (for means: d_u = a_u - b_u) and sd divides by n - 1.
    """
    assert len(a.num) == len(b.num), "paired samples have the same units"
    n, r_a, r_b = len(a.num), a.value, b.value
    if r_a is None or r_b is None:
        return Difference(None, None, None, None, n)
    if n < 2:
        return Difference(r_a - r_b, None, None, None, n)
    sums = resampled_sums(np.stack([*a, *b], axis=1), cfg.draws, cfg.seed)
    if not ((sums[:, 1] > 0) & (sums[:, 3] > 0)).all():
        return Difference(r_a - r_b, None, None, None, n)
    edges = percentiles(sums[:, 0] / sums[:, 1] - sums[:, 2] / sums[:, 3], cfg.confidence, n)
    shares = (r_a - r_b) + _influence(a, r_a) - _influence(b, r_b)
    return Difference(r_a - r_b, *edges, effect_size(r_a - r_b, float(shares.std(ddof=1))), n)


def _influence(ratio: Ratio, value: float) -> Column:
    return (ratio.num - value * ratio.den) / ratio.den.mean()


def unpaired_difference(
    a: Float64[np.ndarray, " units_a"],
    b: Float64[np.ndarray, " units_b"],
    cfg: EvalConfig,
    means: Callable[[int], Column] | None = None,
) -> Difference:
    """Return mean(a) - mean(b) of independent samples, each resampled on its own.

    effect_size = (mean_a - mean_b) / sqrt((sd_a^2 + sd_b^2) / 2), Cohen's d; n = the smaller sample. `means` gives the
    resampled means of side 0 (a) or 1 (b) where they serve several comparisons.
    """
    n = min(len(a), len(b))
    if n == 0:
        return Difference(None, None, None, None, 0)
    gap = float(a.mean() - b.mean())
    if n < 2:
        return Difference(gap, None, None, None, n)
    if means is None:
        drawn = [resampled_means(x, cfg.draws, cfg.seed + side) for side, x in enumerate((a, b))]
    else:
        drawn = [means(0), means(1)]
    spread = float(np.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 2))
    edges = percentiles(drawn[0] - drawn[1], cfg.confidence, n)
    return Difference(gap, *edges, effect_size(gap, spread), n)
