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

from wsae.core.files import Json
from wsae.core.seeds import seed_for
from wsae.evals.config import FREE, EvalConfig, InterpretConfig, Score
from wsae.evals.intervals import (
    Difference,
    Estimate,
    effect_size,
    percentiles,
    resampled_means,
    resampled_sums,
)

Pairs = Float64[np.ndarray, "latents 2"]
FEWEST_RANKED = 3
"""Latents below which no correlation is reported."""


def agreement(record: Json, cfg: InterpretConfig, asked: str = "detection") -> list[Json]:
    """Return a line per free score: Spearman's correlation with an asked one over all latents that have both.

    Latents of all hooks and members (not controls), each in its member's own sample: score, with, value, low, high, n.
    """
    members = [m for hook in record["hooks"].values() for m in hook["members"].values()]
    rows = [latent["scores"] for member in members for latent in member["latents"]]
    out = []
    for score in FREE:
        both = [(row.get(score), row.get(asked)) for row in rows]
        known = [pair for pair in both if None not in pair]
        values = np.array(known, dtype=np.float64).reshape(len(known), 2)
        found = rank_correlation(values, cfg)
        out.append({"score": score, "with": asked, **found._asdict(), "n": len(values)})
    return out


def rank_correlation(values: Pairs, cfg: InterpretConfig) -> Estimate:
    """Return Spearman's rho (Pearson's r of ranks, ties at their mean rank) with its interval over latents.

    Percentile bootstrap: latents are drawn with replacement and ranked anew. None for fewer than three latents or a
    column without variance; draws without variance are left out.
    """
    value = spearman(values)
    if value is None:
        return Estimate(None, None, None)
    rng = np.random.default_rng(cfg.seed)
    picks = rng.integers(0, len(values), size=(cfg.draws, len(values)))
    found = [rho for pick in picks if (rho := spearman(values[pick])) is not None]
    return Estimate(value, *percentiles(np.array(found), cfg.confidence, len(values)))


def spearman(values: Pairs) -> float | None:
    """Return Spearman's rank correlation of two columns."""
    from scipy.stats import rankdata  # a third of a second to import, needed here only

    if len(values) < FEWEST_RANKED:
        return None
    ranks = rankdata(values, axis=0)
    centred = ranks - ranks.mean(0)
    scale = float(np.sqrt((centred**2).sum(0).prod()))
    return float((centred[:, 0] * centred[:, 1]).sum()) / scale if scale > 0 else None


METRIC: dict[Score, str] = {
    "embedding": "auc",
    "surprisal": "auc",
    "detection": "balanced_accuracy",
    "fuzzing": "balanced_accuracy",
    "simulation": "mixed",
}
"""The number that stands for a score; what else is known of a latent is beside it."""


Values = Float64[np.ndarray, " _"]


class LatentScore(NamedTuple):
    """One latent's score by any scorer; positives and random negatives make the counts, hard negatives have their own.

    A context without a usable verdict (a reply that could not be parsed, a text without tokens; NaN in `Verdicts`) is
    counted in `failed` and enters nothing else.
    """

    latent: int
    density: float
    """Share of tokens on which it fires: denser latents score differently."""
    auc: float | None
    """Area under the curve against random negatives; None without verdicts on both sides."""
    auc_hard: float | None
    """The same against hard negatives; None without any."""
    balanced_accuracy: float | None
    tp: int
    fn: int
    tn: int
    fp: int
    hard_tn: int = 0
    hard_fp: int = 0
    failed: int = 0
    """Contexts without a usable verdict."""


class Verdicts(NamedTuple):
    """One latent's contexts as numbers, larger = more likely to activate; NaN = no usable verdict."""

    positive: Values
    negative: Values
    hard: Values


def half_way(own: Values, foreign: Values) -> float:
    """Return the middle of the mean of a latent's own scores and the median of others'; NaN where a side has none.

    The threshold of what has no natural one; no scored context sets it.
    """
    own, foreign = own[~np.isnan(own)], foreign[~np.isnan(foreign)]
    return float((own.mean() + np.median(foreign)) / 2) if len(own) and len(foreign) else np.nan


def judge(latent: int, density: float, verdicts: Verdicts, threshold: float = 0.5) -> LatentScore:
    """Return the score of one latent whose contexts count as active where verdict >= threshold.

    For yes/no answers (1 and 0) the AUC with ties at one half equals the balanced accuracy. A NaN threshold (none
    could be set) leaves the AUC alone: all counts are 0.
    """
    usable = [np.asarray(values, dtype=np.float64) for values in verdicts]
    failed = sum(int(np.isnan(values).sum()) for values in usable)
    positive, negative, hard = (values[~np.isnan(values)] for values in usable)
    tp, fp, hard_fp = (int((values >= threshold).sum()) for values in (positive, negative, hard))
    fn, tn, hard_tn = (int((values < threshold).sum()) for values in (positive, negative, hard))
    return LatentScore(
        latent,
        density,
        auc(positive, negative),
        auc(positive, hard),
        balanced_accuracy(tp, fn, tn, fp),
        *(tp, fn, tn, fp, hard_tn, hard_fp, failed),
    )


def auc(positive: Values, negative: Values) -> float | None:
    """Return the probability that a positive exceeds a negative, ties counting half (Mann-Whitney U / (n_p n_n)).

    AUC = sum_i sum_j ([p_i > n_j] + [p_i = n_j] / 2) / (n_p n_n); NaN entries are left out; None when a side is empty.
    """
    positive, negative = positive[~np.isnan(positive)], np.sort(negative[~np.isnan(negative)])
    if not len(positive) or not len(negative):
        return None
    below = np.searchsorted(negative, positive, side="left")
    not_above = np.searchsorted(negative, positive, side="right")
    wins = int(below.sum()) + int(not_above.sum())  # twice the wins, a tie counting 1
    return wins / (2 * len(positive) * len(negative))


def balanced_accuracy(tp: int, fn: int, tn: int, fp: int) -> float | None:
    """Return (TPR + TNR) / 2 = (tp / (tp + fn) + tn / (tn + fp)) / 2; None when a side is empty."""
    if tp + fn == 0 or tn + fp == 0:
        return None
    return (tp / (tp + fn) + tn / (tn + fp)) / 2


N_STRATA = 10
"""Strata of equal count in the pooled sample: with more, few latents are left on each side."""
FEWEST = 2
"""Latents that each member needs in a stratum: one alone has no spread to resample."""
KNOTS = (0.1, 0.5, 0.9)
"""Quantiles of the pooled d at which the spline bends (Harrell 2015 for three knots)."""


class Sample(NamedTuple):
    """One member's latents: the share of tokens on which each fires (above 0), and its score; NaN = not scored."""

    density: Values
    score: Values


def pooled_accuracy(scores: Sequence[LatentScore], cfg: EvalConfig) -> Estimate:
    """Return the balanced accuracy of all contexts together, resampling latents with all their contexts.

    (sum tp / sum (tp + fn) + sum tn / sum (tn + fp)) / 2 over the latents of a draw.
    """
    counts = [(score.tp, score.fn, score.tn, score.fp) for score in scores]
    columns = np.array(counts, dtype=np.float64).reshape(len(scores), 4)
    value = balanced_accuracy(*map(int, columns.sum(0)))
    if value is None or len(scores) < FEWEST:
        return Estimate(value, None, None)
    tp, fn, tn, fp = resampled_sums(columns, cfg.draws, cfg.seed).T
    if not ((tp + fn > 0) & (tn + fp > 0)).all():
        return Estimate(value, None, None)
    found = (tp / (tp + fn) + tn / (tn + fp)) / 2
    return Estimate(value, *percentiles(found, cfg.confidence, len(scores)))


def matched_density(a: Sample, b: Sample, cfg: EvalConfig) -> Difference:
    """Return sum_k w_k (mean_a,k - mean_b,k), w_k the stratum's share of the latents compared.

    Strata: 10 quantile bins of the pooled d; those with fewer than 2 latents of a member are left out. Latents are
    resampled within member and stratum. effect_size divides by sqrt(sum_k w_k (var_a,k + var_b,k) / 2); n is the
    number of latents compared of the member that has fewer.
    """
    sides = _known(a), _known(b)
    pairs: list[list[Values]] = []
    if all(len(side.score) for side in sides):
        d = [np.log10(side.density) for side in sides]
        edges = np.unique(np.quantile(np.concatenate(d), np.linspace(0, 1, N_STRATA + 1))[1:-1])
        place = [np.searchsorted(edges, one, side="right") for one in d]
        for k in range(len(edges) + 1):
            pair = [side.score[at == k] for side, at in zip(sides, place, strict=True)]
            pairs += [pair] if min(map(len, pair)) >= FEWEST else []
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
        for side, part in enumerate(pair):
            seed, few = seed_for(cfg.seed, "density", "stratum", k, side), len(part)
            found = resampled_means(part, cfg.draws, seed) - part.mean()
            # draws of few latents vary by a share (n - 1) / n of what they should
            draws += (1 - 2 * side) * weight * found * (few / (few - 1)) ** 0.5
    draws += gap
    n = min(sum(len(pair[side]) for pair in pairs) for side in (0, 1))
    return Difference(
        gap, *percentiles(draws, cfg.confidence, n), effect_size(gap, float(np.sqrt(spread))), n
    )


def density_adjusted(a: Sample, b: Sample, cfg: EvalConfig) -> Difference:
    """Return delta of the least squares fit score = delta [a] + c_0 + c_1 d + sum_j c_j (d - knot_j)_+.

    Knots are the 0.1, 0.5 and 0.9 quantiles of the pooled d. Each member's latents are resampled on their own and
    the fit repeated. effect_size divides delta by the standard deviation of the residuals; where there are no more
    latents than terms these say nothing, and there is no difference.
    """
    sides = _known(a), _known(b)
    n = min(len(side.score) for side in sides)
    if n < FEWEST:
        return Difference(None, None, None, None, n)
    score = np.concatenate([side.score for side in sides])
    d = np.log10(np.concatenate([side.density for side in sides]))
    knots = np.unique(np.quantile(d, KNOTS))
    is_a = np.repeat([1.0, 0.0], [len(side.score) for side in sides])
    hinges = np.maximum(d[:, None] - knots, 0)  # d is centred, which changes the constant alone
    design = np.column_stack([is_a, np.ones_like(d), d - d.mean(), hinges])
    columns = np.concatenate([design, score[:, None]], axis=1)
    moments = (columns[:, :, None] * columns[:, None, :]).reshape(len(columns), -1)
    fit = _solve(moments.sum(0))
    residual = score - design @ fit
    free = len(score) - int(np.linalg.matrix_rank(design))
    if not free:
        return Difference(None, None, None, None, n)
    spread = float(np.sqrt((residual**2).sum() / free))
    cut = len(sides[0].score)
    sums = sum(
        resampled_sums(part, cfg.draws, seed_for(cfg.seed, "adjusted", side))
        for side, part in enumerate((moments[:cut], moments[cut:]))
    )
    draws = np.array([_solve(one)[0] for one in np.asarray(sums)])
    return Difference(
        float(fit[0]), *percentiles(draws, cfg.confidence, n), effect_size(float(fit[0]), spread), n
    )


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
