"""Scores over latents: pooled accuracy with its interval, and members compared when density differs between them.

Denser latents score differently, so a shift in density could pass for a change in interpretability. Two adjusted
differences a - b stand beside the raw one, with d = log10(density):
- matched density: sum_k w_k (mean_a,k - mean_b,k) over strata k of d that both members have;
- regression: the coefficient delta in score = delta [member is a] + f(d) + noise, f a linear spline.
Bootstrap percentile intervals over latents, seeded, fp64.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from wsae.core.seeds import seed_for
from wsae.evals.autointerp.metrics import LatentScore, pooled_balanced_accuracy, pooled_counts
from wsae.evals.config import EvalConfig
from wsae.evals.intervals import Difference, Estimate, resampled_sums

N_STRATA = 10
"""Strata of equal count in the pooled sample: with more, few latents are left on each side."""
FEWEST = 2
"""Latents that each member needs in a stratum: one alone has no spread to resample."""
KNOTS = (0.1, 0.5, 0.9)
"""Quantiles of the pooled d at which the spline bends (Harrell 2015 for three knots)."""

Values = Float64[np.ndarray, " _"]


class Sample(NamedTuple):
    """One member's latents: the share of tokens on which each fires (above 0), and its score; NaN = not scored."""

    density: Values
    score: Values


def pooled_accuracy(scores: Sequence[LatentScore], cfg: EvalConfig) -> Estimate:
    """Return the balanced accuracy of all contexts together, resampling latents with all their contexts.

    (sum tp / sum (tp + fn) + sum tn / sum (tn + fp)) / 2 over the latents of a draw.
    """
    value = pooled_balanced_accuracy(scores)
    if value is None or len(scores) < FEWEST:
        return Estimate(value, None, None)
    tp, fn, tn, fp = resampled_sums(pooled_counts(scores), cfg.draws, cfg.seed).T
    if not ((tp + fn > 0) & (tn + fp > 0)).all():
        return Estimate(value, None, None)
    return Estimate(value, *_interval((tp / (tp + fn) + tn / (tn + fp)) / 2, cfg))


def matched_density(a: Sample, b: Sample, cfg: EvalConfig) -> Difference:
    """Return sum_k w_k (mean_a,k - mean_b,k), w_k the stratum's share of the latents compared.

    Strata: 10 quantile bins of the pooled d; those with fewer than 2 latents of a member are left out. Latents are
    resampled within member and stratum. effect_size divides by sqrt(sum_k w_k (var_a,k + var_b,k) / 2); n is the
    number of latents compared of the member that has fewer.
    """
    pairs = _strata(_known(a), _known(b))
    if not pairs:
        return Difference(None, None, None, None, 0)
    weights = np.array([len(left) + len(right) for left, right in pairs], dtype=np.float64)
    weights /= weights.sum()
    gap = float(sum(w * (x.mean() - y.mean()) for w, (x, y) in zip(weights, pairs, strict=True)))
    spread = sum(
        w * (x.var(ddof=1) + y.var(ddof=1)) / 2 for w, (x, y) in zip(weights, pairs, strict=True)
    )
    draws = np.zeros(cfg.draws)
    for k, (weight, pair) in enumerate(zip(weights, pairs, strict=True)):
        x, y = (_means(part, cfg, "stratum", k, side) for side, part in enumerate(pair))
        draws += weight * (x - y)
    n = min(sum(len(pair[side]) for pair in pairs) for side in (0, 1))
    return Difference(gap, *_interval(draws, cfg), _effect(gap, float(np.sqrt(spread))), n)


def _strata(a: Sample, b: Sample) -> list[tuple[Values, Values]]:
    """Return both members' scores in each stratum that both have."""
    if not len(a.score) or not len(b.score):
        return []
    d = [np.log10(side.density) for side in (a, b)]
    edges = np.unique(np.quantile(np.concatenate(d), np.linspace(0, 1, N_STRATA + 1))[1:-1])
    place = [np.searchsorted(edges, side, side="right") for side in d]
    pairs = [(a.score[place[0] == k], b.score[place[1] == k]) for k in range(len(edges) + 1)]
    return [pair for pair in pairs if min(map(len, pair)) >= FEWEST]


def density_adjusted(a: Sample, b: Sample, cfg: EvalConfig) -> Difference:
    """Return delta of the least squares fit score = delta [a] + c_0 + c_1 d + sum_j c_j (d - knot_j)_+.

    Knots are the 0.1, 0.5 and 0.9 quantiles of the pooled d. Each member's latents are resampled on their own and
    the fit repeated. effect_size divides delta by the standard deviation of the residuals.
    """
    sides = _known(a), _known(b)
    n = min(len(side.score) for side in sides)
    if n < FEWEST:
        return Difference(None, None, None, None, n)
    design, score = _design(*sides), np.concatenate([side.score for side in sides])
    columns = np.concatenate([design, score[:, None]], axis=1)
    moments = (columns[:, :, None] * columns[:, None, :]).reshape(len(columns), -1)
    fit = _solve(moments.sum(0))
    residual = score - design @ fit
    spread = float(np.sqrt((residual**2).sum() / max(1, len(score) - design.shape[1])))
    cut = len(sides[0].score)
    sums = sum(
        resampled_sums(part, cfg.draws, seed_for(cfg.seed, "adjusted", side))
        for side, part in enumerate((moments[:cut], moments[cut:]))
    )
    draws = np.array([_solve(one)[0] for one in np.asarray(sums)])
    return Difference(float(fit[0]), *_interval(draws, cfg), _effect(float(fit[0]), spread), n)


def _design(a: Sample, b: Sample) -> Float64[np.ndarray, "latents columns"]:
    """Return [member is a], 1, d, (d - knot)_+ ...; d is centred, which changes the constant alone."""
    d = np.log10(np.concatenate([a.density, b.density]))
    knots = np.unique(np.quantile(d, KNOTS))
    member = np.repeat([1.0, 0.0], [len(a.score), len(b.score)])
    hinges = np.maximum(d[:, None] - knots, 0)
    return np.column_stack([member, np.ones_like(d), d - d.mean(), hinges])


def _solve(moments: Float64[np.ndarray, " moments"]) -> Values:
    """Return the least squares solution from sums of products (of least norm where columns coincide)."""
    side = int(np.sqrt(len(moments)))
    square = moments.reshape(side, side)
    return np.linalg.lstsq(square[:-1, :-1], square[:-1, -1], rcond=_RANK)[0]


_RANK = 1e-10
"""Singular values below this share of the largest count as zero: products in fp64 know no finer."""


def _known(sample: Sample) -> Sample:
    density, score = (np.asarray(column, dtype=np.float64) for column in sample)
    keep = ~np.isnan(score)
    assert (density[keep] > 0).all(), "a latent that was scored has fired"
    return Sample(density[keep], score[keep])


def _means(values: Values, cfg: EvalConfig, *names: str | int) -> Float64[np.ndarray, " draws"]:
    seed = seed_for(cfg.seed, "density", *names)
    return resampled_sums(values[:, None], cfg.draws, seed)[:, 0] / len(values)


def _interval(draws: Float64[np.ndarray, " draws"], cfg: EvalConfig) -> tuple[float, float]:
    tail = (1 - cfg.confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)


def _effect(gap: float, spread: float) -> float | None:
    if spread > abs(gap) * 1e-12:
        return gap / spread
    return 0.0 if gap == 0 else None
