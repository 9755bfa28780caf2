"""Interpret a training run on held-out text: RUN/interpretation, whole or without a manifest.

Contexts are collected anew in one pass; scores that need no endpoint are kept part by part (`parts`), an endpoint's
answers one by one (`llm.cache`), so a killed run scores nothing twice and ends with the same bytes.
"""

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from wsae.acts.tokens import owner_of
from wsae.core.artifact import (
    CONTEXTS_FILE,
    INTERPRETATION,
    INTERPRETATION_PART,
    MANIFEST,
    read_manifest,
    write_manifest,
)
from wsae.core.files import digest, locked, read_json
from wsae.core.progress import Progress, quiet
from wsae.evals.autointerp.config import Asked, InterpretConfig
from wsae.evals.autointerp.llm.plan import Planned, dry_run
from wsae.evals.autointerp.scoring import Parts, all_fragments, score_all, write_ascii
from wsae.evals.autointerp.subjects import (
    InterpretJob,
    Named,
    ScorerModels,
    Scorers,
    Subject,
    Subjects,
    SurveyedHook,
    about,
    again,
    choose_scorers,
    selected,
    subjects,
    survey_hooks,
)
from wsae.evals.autointerp.summary import (
    LatentScore,
    Sample,
    density_adjusted,
    glossary,
    matched_density,
    pooled_accuracy,
)
from wsae.evals.autointerp.windows import Collected, LatentContexts
from wsae.evals.config import EvalConfig
from wsae.evals.data import HeldOut
from wsae.evals.intervals import Difference, estimate, mean, paired_difference, unpaired_difference
from wsae.evals.run import run_subject
from wsae.run import Run

# From scores of latents to what is reported: means with intervals, counts that add up, comparisons
# with the twin.
#
# Means are over a member's own sample of latents. Its twin is compared over matched latents (the
# same pairs resampled for both), over all latents of both samples, and over latents of equal
# density, since denser latents score differently.

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


# A member against its plain twin, and everybody against the controls: differences a - b of mean
# scores.
#
# Over "matched" latents: pairs of the one-to-one matching, both scored, resampled together. Over
# "all": the two samples, each resampled on its own. Over "density": both samples in strata of
# density, and "adjusted": by a regression on it, so that a shift in density cannot pass for a
# change in interpretability. Over "control": a sample against a control's.


def comparisons(sides: SurveyedHook, named: Named, cfg: InterpretConfig) -> list[Json]:
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
            lines = [_line(member, twin, score, over, gap) for over, gap in found.items()]
            lines[0] |= _pairs(sides, member, a.own(score), b.values(score))
            out += lines
    return out + _against_controls(named, cfg)


def _against_controls(named: Named, cfg: InterpretConfig) -> list[Json]:
    members = {name: subject for name, subject in named.items() if subject.control is None}
    controls = {name: subject for name, subject in named.items() if subject.control is not None}
    return [
        _line(a, b, score, "control", _unpaired(member, control, score, cfg))
        for a, member in members.items()
        for b, control in controls.items()
        for score in member.parts
        if score in control.parts
    ]


def _line(a: str, b: str, score: str, over: str, found: Difference) -> Json:
    paired = {"unit": "latent", "paired": over == "matched"}
    return {"a": a, "b": b, "metric": score, "over": over, **found._asdict(), **paired}


def _matched(
    a: Subject, b: Subject, partners: dict[int, int], score: str, cfg: InterpretConfig
) -> Difference:
    left, right = a.own(score), b.values(score)
    pairs = [(left[j], right[k]) for j, k in partners.items() if j in left and k in right]
    values = np.array(pairs, dtype=np.float64).reshape(len(pairs), 2)
    return paired_difference(mean(values[:, 0]), mean(values[:, 1]), bootstrap(cfg))


def _pairs(
    sides: SurveyedHook, member: str, left: dict[int, float], right: dict[int, float]
) -> Json:
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


# What is written: interpretation.json with every number, contexts.json with the text that a reader
# wants to see.

SHOWN = 6
"""Contexts of a latent that are written, the strongest explaining ones."""


def record_json(scorers: Scorers, sides: dict[str, SurveyedHook], found: Subjects) -> Json:
    """Return the content of interpretation.json."""
    return {
        "schema": 1,
        "config": scorers.cfg.to_dict(),
        "judges": scorers.names(),
        "hooks": {hook: _hook(scorers, sides[hook], named) for hook, named in found.items()},
        "glossary": glossary(scorers.cfg.scores),
    }


def _hook(scorers: Scorers, sides: SurveyedHook, named: Named) -> Json:
    entries = {name: entry(subject, scorers.cfg) for name, subject in named.items()}
    first = next(iter(named.values()))
    return {
        "heldout_tokens": sides.survey.moments.n,
        "windows": first.collected.counts,
        "reference": sides.reference,
        "members": {name: e for name, e in entries.items() if named[name].control is None},
        "controls": {name: e for name, e in entries.items() if named[name].control is not None},
        "matching": {
            member: {"with": sides.family.twins[member], **matching.summary()}
            for member, matching in sides.matching.items()
        },
        "comparisons": comparisons(sides, named, scorers.cfg),
    }


def contexts_json(sides: dict[str, SurveyedHook], found: Subjects) -> dict[str, Json]:
    """Return the content of contexts.json: as the evaluation's, with explanation, typical tokens and scores."""
    return {
        hook: {
            name: [_latent(sides[hook], name, subject, one) for one in subject.collected.latents]
            for name, subject in named.items()
            if subject.control is None
        }
        for hook, named in found.items()
    }


def _latent(sides: SurveyedHook, name: str, subject: Subject, contexts: LatentContexts) -> Json:
    latent = contexts.latent
    row = latent_row(subject, latent, contexts)
    return {
        "latent": latent,
        "density": contexts.density,
        "variance": float(sides.survey.activity[name].variance[latent]),
        "max": contexts.peak,
        "match": _match(sides, name, latent),
        "contexts": _shown(subject.collected, contexts),
        **{key: row[key] for key in ("explanation", "tokens", "scores")},
    }


def _match(sides: SurveyedHook, name: str, latent: int) -> Json | None:
    """Return the twin's latent that this one is paired with."""
    matching = sides.matching.get(name)
    if matching is None:
        return None
    place = (matching.pair_a == latent).nonzero()[:, 0].tolist()
    if not place:
        return None
    cosine = round(float(matching.pair_cosine[place[0]]), 6)
    partner = int(matching.pair_b[place[0]])
    return {"member": sides.family.twins[name], "latent": partner, "cosine": cosine}


def _shown(collected: Collected, contexts: LatentContexts) -> list[Json]:
    """Return the strongest explaining windows: tokens, activations, the peak's place, the sequence."""
    out = []
    for window, acts in zip(
        contexts.explain.window[:SHOWN].tolist(), contexts.explain.acts, strict=False
    ):
        tokens = collected.windows.tokens(window)
        shown = [float(f"{act:.4g}") for act in acts[: len(tokens)].tolist()]
        peak = max(range(len(shown)), key=shown.__getitem__)
        seq = int(collected.windows.seq[window])
        out.append({"tokens": tokens, "acts": shown, "peak": peak, "seq": seq})
    return out


def interpret_run(
    run: Path,
    source: HeldOut,
    cfg: InterpretConfig = InterpretConfig(),  # noqa: B008  (frozen)
    progress: Progress = quiet,
    force: bool = False,
    **judges: Unpack[ScorerModels],
) -> Json:
    """Score the latents of a finished run, write RUN/interpretation and return the content of interpretation.json.

    Judges are `encoder` (none: the builtin one), `language` (the model behind the data) and `llm`; each is needed by
    its scores only. What was made from the same run, data, settings and judges is returned as it is unless `force`.
    Raises UserError when `run` is not a finished run, the data have no text, or a score lacks its judge.
    """
    families = selected(run_subject(run, source).families, cfg)
    job = InterpretJob(
        run, source, families, choose_scorers(cfg, judges, progress), data_digest(source)
    )
    place = run / INTERPRETATION_PART
    with locked(place, top=run):
        if force:
            Parts(place / "parts").clear()
        elif (done := _current(job, place)) is not None:
            return done
        return _interpret(job, place)


def data_digest(source: HeldOut) -> str:
    """Return a source's own digest, or a hash of its held-out rows where it has none."""
    own = getattr(source, "digest", None)
    if own is not None:
        return own()
    sha = hashlib.sha256()
    for chunk in source.heldout(2048):
        for tensor in (*chunk.x.values(), chunk.seq, chunk.pos):
            sha.update(tensor.contiguous().cpu().numpy().tobytes())
    return sha.hexdigest()


def _inputs(job: InterpretJob) -> dict[str, str]:
    """Return the digests of everything the result depends on beside the settings."""
    judges = {f"judge/{score}": digest(job.scorers.identity(score)) for score in job.cfg.scores}
    run = Run(job.run).manifest.digest()
    return {"run": run, "data": job.data, **judges}


def _current(job: InterpretJob, place: Path) -> Json | None:
    """Return what is there, if it is whole, finished, and of these inputs and settings."""
    if not (place / MANIFEST).exists():
        return None
    there = read_manifest(place, INTERPRETATION_PART)
    same = there.config == job.cfg.to_dict() and there.inputs == _inputs(job)
    return read_json(place / INTERPRETATION) if same and not there.info.get("unfinished") else None


def _interpret(job: InterpretJob, place: Path) -> Json:
    sides = survey_hooks(job.source, job.families, job.cfg, job.progress)
    found = subjects(job, place, sides)
    score_all(job, Parts(place / "parts"), sides, found)
    (place / MANIFEST).unlink(missing_ok=True)
    write_ascii(place / INTERPRETATION, record_json(job.scorers, sides, found))
    write_ascii(place / CONTEXTS_FILE, contexts_json(sides, found))
    parts = (subject.parts for named in found.values() for subject in named.values())
    info = {"unfinished": any(map(again, parts))}
    files = [INTERPRETATION, CONTEXTS_FILE]
    write_manifest(
        place, INTERPRETATION_PART, job.cfg.to_dict(), files, inputs=_inputs(job), info=info
    )
    return read_json(place / INTERPRETATION)


def plan_run(
    run: Path,
    source: HeldOut,
    cfg: InterpretConfig,
    progress: Progress = quiet,
    **judges: Unpack[ScorerModels],
) -> dict[str, Planned]:
    """Return what the language model would be asked, by score, summed over hooks, members and controls; asks nothing.

    The control random_model is left out: its latents are known only after it was trained.
    """
    asked: list[Asked] = [s for s in cfg.scores if s != "embedding" and s != "surprisal"]
    known = tuple(control for control in cfg.controls if control != "random_model")
    cfg = cfg.model_copy(update={"scores": tuple(asked), "controls": known})
    families = selected(run_subject(run, source).families, cfg)
    job = InterpretJob(run, source, families, choose_scorers(cfg, judges, progress), "")
    sides = survey_hooks(source, families, cfg, progress)
    found = subjects(job, run / INTERPRETATION_PART, sides)
    simulated = all_fragments(job, sides, found) if "simulation" in asked else {}
    total: dict[str, Planned] = {}
    for hook, named in found.items():
        for name, subject in named.items():
            assert job.scorers.llm is not None
            fragments_of = simulated.get((hook, name))
            for score, part in dry_run(
                job.scorers.llm, asked, subject.collected, fragments_of
            ).items():
                total[score] = total.get(score, Planned()) + part
    return total
