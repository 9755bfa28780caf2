"""A member against its plain twin, and everybody against the controls: differences a - b of mean scores.

Over "matched" latents: pairs of the one-to-one matching, both scored, resampled together. Over "all": the two samples,
each resampled on its own. Over "density": both samples in strata of density, and "adjusted": by a regression on it, so
that a shift in density cannot pass for a change in interpretability. Over "control": a sample against a control's.
"""

from typing import Any

import numpy as np

from wsae.evals.autointerp.config import InterpretConfig
from wsae.evals.autointerp.pairs import Sides
from wsae.evals.autointerp.results import bootstrap
from wsae.evals.autointerp.subjects import Named, Subject
from wsae.evals.autointerp.summary import Sample, density_adjusted, matched_density
from wsae.evals.intervals import Difference, mean, paired_difference, unpaired_difference

Json = dict[str, Any]


def comparisons(sides: Sides, named: Named, cfg: InterpretConfig) -> list[Json]:
    """Return the lines of one hook: a, b, metric (the score), over, difference, low, high, effect_size, n, unit.

    Those over matched latents also have `sampled` (the member's latents of which n are compared), `cosine` (the mean
    decoder cosine of the n pairs) and `chance` (that of random directions).
    """
    out = []
    for member, twin in sides.family.twins.items():
        a, b = named[member], named[twin]
        for score in (s for s in a.parts if s in b.parts):
            samples = _sample(a, score), _sample(b, score)
            found = {
                "matched": _matched(a, b, sides.partners(member), score, cfg),
                "all": _unpaired(a, b, score, cfg),
                "density": matched_density(*samples, bootstrap(cfg)),
                "adjusted": density_adjusted(*samples, bootstrap(cfg)),
            }
            lines = [_line((member, twin), score, over, gap) for over, gap in found.items()]
            lines[0] |= _pairs(sides, member, a.own(score), b.values(score))
            out += lines
    return out + _against_controls(named, cfg)


def _against_controls(named: Named, cfg: InterpretConfig) -> list[Json]:
    members = {name: subject for name, subject in named.items() if subject.control is None}
    controls = {name: subject for name, subject in named.items() if subject.control is not None}
    return [
        _line((a, b), score, "control", _unpaired(member, control, score, cfg))
        for a, member in members.items()
        for b, control in controls.items()
        for score in member.parts
        if score in control.parts
    ]


def _line(names: tuple[str, str], score: str, over: str, found: Difference) -> Json:
    a, b = names
    paired = {"unit": "latent", "paired": over == "matched"}
    return {"a": a, "b": b, "metric": score, "over": over, **found._asdict(), **paired}


def _matched(
    a: Subject, b: Subject, partners: dict[int, int], score: str, cfg: InterpretConfig
) -> Difference:
    left, right = a.own(score), b.values(score)
    pairs = [(left[j], right[k]) for j, k in partners.items() if j in left and k in right]
    values = np.array(pairs, dtype=np.float64).reshape(len(pairs), 2)
    return paired_difference(mean(values[:, 0]), mean(values[:, 1]), bootstrap(cfg))


def _pairs(sides: Sides, member: str, left: dict[int, float], right: dict[int, float]) -> Json:
    """Return how many of a member's sampled latents are compared, and how alike the pairs are."""
    matching = sides.matching[member]
    cosines = dict(zip(matching.pair_a.tolist(), matching.pair_cosine.tolist(), strict=True))
    partners = sides.partners(member).items()
    compared = [cosines[j] for j, k in partners if j in left and k in right]
    return {
        "sampled": len(sides.sample[member]),
        "cosine": float(np.mean(compared)) if compared else None,
        "chance": matching.summary()["random_cosine_mean"],
    }


def _unpaired(a: Subject, b: Subject, score: str, cfg: InterpretConfig) -> Difference:
    return unpaired_difference(_sample(a, score).score, _sample(b, score).score, bootstrap(cfg))


def _sample(subject: Subject, score: str) -> Sample:
    """Return the densities and scores of a subject's own sample."""
    own, density = subject.own(score), subject.parts[score]["density"]
    columns = ([density[str(latent)] for latent in own], list(own.values()))
    return Sample(*(np.array(column, dtype=np.float64) for column in columns))
