"""From scores of latents to what is reported: means with intervals, counts that add up, comparisons with the twin.

Means are over a member's own sample of latents. Its twin is compared over matched latents (the same pairs resampled
for both), over all latents of both samples, and over latents of equal density, since denser latents score differently.
"""

from collections import Counter
from typing import Any

import numpy as np

from wsae.acts.tokens import owner_of
from wsae.evals.autointerp.config import InterpretConfig
from wsae.evals.autointerp.metrics import LatentScore
from wsae.evals.autointerp.subjects import Subject, about
from wsae.evals.autointerp.summary import pooled_accuracy
from wsae.evals.autointerp.windows import Collected, LatentContexts
from wsae.evals.config import EvalConfig
from wsae.evals.intervals import estimate, mean

Json = dict[str, Any]
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
TYPICAL = 5
"""Tokens that say what a latent fires on where no model explains it."""


def entry(subject: Subject, cfg: InterpretConfig) -> Json:
    """Return what is reported of one member or control."""
    own = set(subject.sample)
    shown = {contexts.latent: contexts for contexts in subject.collected.latents}
    scored = (int(latent) for part in subject.parts.values() for latent in part["details"])
    rows = [latent_row(subject, j, shown.get(j)) for j in dict.fromkeys([*shown, *scored])]
    latents = [row for row in rows if row["latent"] in own]
    out: Json = {"about": about(subject)} if subject.control else {}
    return out | {
        "summary": {score: _summary(subject, score, cfg) for score in subject.parts},
        "density": _quantiles([row["density"] for row in latents]),
        "counts": _counts(subject, own & shown.keys()),
        "latents": latents,
        "partners": [row for row in rows if row["latent"] not in own],
    }


def latent_row(subject: Subject, latent: int, contexts: LatentContexts | None) -> Json:
    """Return what is reported of one latent: its scores, and beside them all that the scorers say.

    Simulation has a rule of its own for skipping, so a latent may have a score and no contexts.
    """
    key = str(latent)
    scored = {s: p for s, p in subject.parts.items() if key in p["details"]}
    details = {score: part["details"][key] for score, part in scored.items()}
    found = (part["density"][key] for part in scored.values())
    return {
        "latent": latent,
        "density": next(found, None) if contexts is None else contexts.density,
        "peak": None if contexts is None else contexts.peak,
        "explanation": subject.explanations.get(key),
        "tokens": [] if contexts is None else typical_tokens(subject.collected, contexts),
        "scores": {score: row.get(scored[score]["metric"]) for score, row in details.items()},
        "details": details,
    }


def typical_tokens(collected: Collected, contexts: LatentContexts) -> list[str]:
    """Return the tokens with the largest total activation in the explaining windows, at most 5."""
    total: dict[str, float] = {}
    for window, acts in zip(contexts.explain.window.tolist(), contexts.explain.acts, strict=True):
        texts = collected.windows.tokens(window)
        for place, act in enumerate(acts[: len(texts)].tolist()):
            if act > 0 and (text := owner_of(texts, place)):
                total[text] = total.get(text, 0.0) + act
    return sorted(total, key=lambda text: (-total[text], text))[:TYPICAL]


def _summary(subject: Subject, score: str, cfg: InterpretConfig) -> Json:
    """Return the mean of a score with its interval, every other number of the scorer likewise, and the counts."""
    part = subject.parts[score]
    sample = subject.sampled(score)
    rows = [part["details"][str(j)] for j in sample if str(j) in part["details"]]
    metric = part["metric"]
    out: Json = {"metric": metric, **_mean([row.get(metric) for row in rows], cfg)}
    out["also"] = {
        key: _mean([row.get(key) for row in rows], cfg) for key in _means(rows) if key != metric
    }
    pooled = _pooled(subject, score, cfg)
    out |= {} if pooled is None else {"pooled": pooled}
    for kind, prefix in (("tally", ""), ("explaining", "explanations_")):
        tally = part.get(kind)
        if tally:
            names = ("requested", "parsed", "failed", "not_asked", "cached")
            out |= {f"{prefix}{name}": tally[name] for name in names}
            out[f"{prefix}reasons"] = tally["reasons"]
    return out | ({"skipped": part["skipped"]} if "skipped" in part else {})


_COUNTS = ("tp", "fn", "tn", "fp", "hard_tn", "hard_fp", "failed", "n_top", "n_random")
"""Numbers of contexts, which have a sum rather than a mean."""


def _means(rows: list[Json]) -> list[str]:
    """Return the numbers that have a mean."""
    return [key for key in (rows[0] if rows else {}) if key not in _COUNTS]


def _mean(values: list[float | None], cfg: InterpretConfig) -> Json:
    known = np.array([value for value in values if value is not None], dtype=np.float64)
    if not len(known):
        return {"value": None, "low": None, "high": None, "n": 0}
    return {**estimate(mean(known), bootstrap(cfg))._asdict(), "n": len(known)}


def _pooled(subject: Subject, score: str, cfg: InterpretConfig) -> Json | None:
    """Return the balanced accuracy of all contexts together with its interval, and the sums of their counts."""
    details = subject.parts[score]["details"]
    rows = {j: details[str(j)] for j in subject.sampled(score) if str(j) in details}
    if not all("tp" in row for row in rows.values()) or not rows:
        return None
    scores = [LatentScore(latent=j, density=0.0, **row) for j, row in rows.items()]
    sums = {key: sum(row[key] for row in rows.values()) for key in _COUNTS if "n_" not in key}
    return {"balanced_accuracy": pooled_accuracy(scores, bootstrap(cfg))._asdict(), **sums}


def _counts(subject: Subject, shown: set[int]) -> Json:
    """Return what became of the sample: sampled = scored (those with contexts) + skipped."""
    left_out = subject.collected.left_out
    reasons = Counter(left_out[latent] for latent in subject.sample if latent in left_out)
    d_sae = subject.sae.cfg.d_sae
    out: Json = {"d_sae": d_sae, "sampled": len(subject.sample), "scored": len(shown)}
    if subject.alive is not None:
        out["silent"] = d_sae - subject.alive
    return out | {"skipped": dict(reasons)}


def _quantiles(densities: list[float]) -> dict[str, float | None]:
    if not densities:
        return {f"{q:g}": None for q in QUANTILES}
    values = np.quantile(np.array(densities), QUANTILES)
    return {f"{q:g}": float(value) for q, value in zip(QUANTILES, values, strict=True)}


def bootstrap(cfg: InterpretConfig) -> EvalConfig:
    """Return the settings of the intervals."""
    return EvalConfig(draws=cfg.draws, confidence=cfg.confidence, seed=cfg.seed)
