"""A member against its plain twin, and against the controls: differences a - b of mean scores.

all       the two sets of scored latents, each resampled on its own
matched   pairs of latents by decoder direction, both scored, resampled together
density   both sets in strata of density (support), so that a shift in density cannot pass for one in consistency
adjusted  the same by a regression on density
within    within classes: means of the latents of each class, classes weighted as both have them on average; what is
          left of `all` is that one has more latents of the classes that are easy to tell
images    all scored latents, leaving out groups of images: both members lose the same ones
control   as all, against a control
"""

import numpy as np
from jaxtyping import Int64
from torch import Tensor

from wsae.core.seeds import seed_for
from wsae.evals.autointerp.summary import Sample, density_adjusted, matched_density
from wsae.evals.classes.config import ClassesConfig
from wsae.evals.classes.score import OVER_IMAGES, SCORES, Json, Scored
from wsae.evals.intervals import Difference, mean, paired_difference
from wsae.evals.matching import LiveDecoder, Matching, match
from wsae.stats.classes import gap, jackknife

Named = dict[str, Scored]


def comparisons(
    members: Named, controls: Named, twins: dict[str, str], cfg: ClassesConfig
) -> list[Json]:
    """Return the lines: a, b, metric (the score), over, difference, low, high, effect_size, n."""
    out = []
    for member, twin in twins.items():
        a, b = members[member], members[twin]
        matching = matched(a, b, cfg)
        for score in SCORES:
            found = differences(a, b, score, matching, cfg)
            out += [_line(member, twin, score, over, gap) for over, gap in found.items()]
    for name, member in members.items():
        for control, other in controls.items():
            found = {score: _unpaired(member, other, score, cfg) for score in SCORES}
            out += [_line(name, control, score, "control", gap) for score, gap in found.items()]
    return out


def differences(
    a: Scored, b: Scored, score: str, matching: Matching, cfg: ClassesConfig
) -> dict[str, Difference]:
    """Return a - b of one score over all latents, matched ones, equal density, and over images."""
    samples, bootstrap = (_sample(a, score), _sample(b, score)), cfg.bootstrap()
    found = {
        "all": _unpaired(a, b, score, cfg),
        "matched": _paired(a, b, score, matching, cfg),
        "density": matched_density(*samples, bootstrap),
        "adjusted": density_adjusted(*samples, bootstrap),
        "within": _within(a, b, score, cfg),
    }
    if score in OVER_IMAGES and score in a.images and score in b.images:
        between = gap(a.images[score], b.images[score])
        spread = jackknife(between, cfg.confidence)
        found["images"] = Difference(between.value, *spread, None, len(between.without))
    return found


def matched(a: Scored, b: Scored, cfg: ClassesConfig) -> Matching:
    """Return which live latent of `a` goes with which of `b`, by decoder direction."""
    assert a.sae is not None
    assert b.sae is not None
    sides = [LiveDecoder(side.sae.W_dec, _alive(side)) for side in (a, b) if side.sae is not None]
    return match(sides[0], sides[1], cfg.assignment_max, cfg.seed)


def _alive(side: Scored) -> Int64[Tensor, " alive"]:
    return side.arrays["support"].nonzero()[:, 0]


def _paired(a: Scored, b: Scored, score: str, matching: Matching, cfg: ClassesConfig) -> Difference:
    left = a.values(score)[matching.pair_a.numpy()]
    right = b.values(score)[matching.pair_b.numpy()]
    both = ~np.isnan(left) & ~np.isnan(right)
    return paired_difference(mean(left[both]), mean(right[both]), cfg.bootstrap())


def _unpaired(a: Scored, b: Scored, score: str, cfg: ClassesConfig) -> Difference:
    """Return the difference of means, each side resampled on its own, once for all comparisons it takes part in."""
    x, y = a.known(score), b.known(score)
    n = min(len(x), len(y))
    if n < 2:
        return Difference(float(x.mean() - y.mean()) if n else None, None, None, None, n)
    difference, tail = float(x.mean() - y.mean()), (1 - cfg.confidence) / 2
    low, high = np.quantile(a.resampled(score, cfg) - b.resampled(score, cfg), [tail, 1 - tail])
    spread = float(np.sqrt((x.var(ddof=1) + y.var(ddof=1)) / 2))
    effect = difference / spread if spread > 0 else None
    return Difference(difference, float(low), float(high), effect, n)


def _within(a: Scored, b: Scored, score: str, cfg: ClassesConfig) -> Difference:
    """Return the difference of means at the mean mix of classes, each side's latents resampled on their own.

    A latent is of the class it fires on most; classes that one side has no latent of are left out.
    """
    sides = [
        (side.known(score), side.arrays["label"].numpy()[~np.isnan(side.values(score))])
        for side in (a, b)
    ]
    n_classes = 1 + max((int(labels.max(initial=0)) for _, labels in sides), default=0)
    n = min(len(values) for values, _ in sides)
    difference = _at_one_mix(*(_by_class(v, c, n_classes) for v, c in sides))
    if n < 2 or difference is None:
        return Difference(difference, None, None, None, n)
    rng = np.random.default_rng(seed_for(cfg.seed, "within", a.name, b.name, score))
    draws = []
    for _ in range(cfg.draws):
        chosen = [rng.integers(0, len(values), len(values)) for values, _ in sides]
        parts = [_by_class(v[i], c[i], n_classes) for (v, c), i in zip(sides, chosen, strict=True)]
        drawn = _at_one_mix(*parts)
        draws += [] if drawn is None else [drawn]
    tail = (1 - cfg.confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Difference(difference, float(low), float(high), None, n)


def _by_class(values: np.ndarray, labels: np.ndarray, n_classes: int) -> np.ndarray:
    """Return [2, n_classes]: how many latents each class has, and the sum of their scores."""
    weights = (None, values)
    return np.stack([np.bincount(labels, weights=w, minlength=n_classes) for w in weights])


def _at_one_mix(a: np.ndarray, b: np.ndarray) -> float | None:
    both = (a[0] > 0) & (b[0] > 0)
    if not both.any():
        return None
    mix = (a[0] / a[0].sum() + b[0] / b[0].sum())[both]
    gaps = a[1, both] / a[0, both] - b[1, both] / b[0, both]
    return float((mix / mix.sum() * gaps).sum())


def _sample(side: Scored, score: str) -> Sample:
    return Sample(side.density, side.values(score))


def _line(a: str, b: str, score: str, over: str, found: Difference) -> Json:
    return {"a": a, "b": b, "metric": score, "over": over, **found._asdict()}
