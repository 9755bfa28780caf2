"""Interpret a training run on held-out text: RUN/interpretation, whole or without a manifest.

Contexts are collected anew in one pass; scores that need no endpoint are kept part by part (`scoring`), an endpoint's
answers one by one (`llm.asking`), so a killed run scores nothing twice and ends with the same bytes.

Reported means are over a member's own sample of latents. Its twin is compared over matched latents (the same pairs
resampled for both), over all latents of both samples, and over latents of equal density, since denser latents score
differently.
"""

import hashlib
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from wsae.acts.stream import HeldOut
from wsae.acts.tokens import owner_of
from wsae.core.artifact import (
    CONTEXTS_FILE,
    INTERPRETATION,
    INTERPRETATION_PART,
    MANIFEST,
    read_manifest,
    write_manifest,
)
from wsae.core.files import Json, digest, locked, read_json
from wsae.core.progress import Progress, quiet
from wsae.evals.config import Asked, EvalConfig, InterpretConfig, Score
from wsae.evals.control import ABOUT
from wsae.evals.glossary import SCORES, glossary
from wsae.evals.interpret.judges import Planned, dry_run
from wsae.evals.interpret.scoring import (
    Interpreted,
    InterpretedMember,
    InterpretJob,
    ScorerModels,
    SurveyedHook,
    all_fragments,
    asks_again,
    collect_members,
    needed_models,
    score_all,
    scorer_identity,
    selected,
    survey_hooks,
    write_ascii,
)
from wsae.evals.interpret.summary import (
    LatentScore,
    Sample,
    density_adjusted,
    matched_density,
    pooled_accuracy,
)
from wsae.evals.interpret.windows import Collected, LatentContexts, documents_of
from wsae.evals.intervals import Difference, estimate, mean, paired_difference, unpaired_difference
from wsae.evals.run import run_subject
from wsae.run import Run

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
TYPICAL = 5
"""Tokens that say what a latent fires on where no model explains it."""
SHOWN = 6
"""Contexts of a latent that are written, the strongest explaining ones."""
_COUNTS = ("tp", "fn", "tn", "fp", "hard_tn", "hard_fp", "failed", "n_top", "n_random")
"""Numbers of contexts, which have a sum rather than a mean."""


def entry(member: InterpretedMember, cfg: InterpretConfig) -> Json:
    """Return what is reported of one member or control."""
    own = set(member.sample)
    shown = {contexts.latent: contexts for contexts in member.collected.latents}
    scored = (int(latent) for part in member.parts.values() for latent in part["details"])
    rows = [latent_row(member, j, shown.get(j)) for j in dict.fromkeys([*shown, *scored])]
    latents = [row for row in rows if row["latent"] in own]
    density: dict[str, float | None] = dict.fromkeys(f"{q:g}" for q in QUANTILES)
    if latents:
        values = np.quantile(np.array([row["density"] for row in latents]), QUANTILES)
        density = dict(zip(density, map(float, values), strict=True))
    left_out = member.collected.left_out
    reasons = Counter(left_out[latent] for latent in member.sample if latent in left_out)
    d_sae = member.sae.cfg.d_sae
    counts: Json = {"d_sae": d_sae, "sampled": len(member.sample), "scored": len(own & {*shown})}
    if member.alive is not None:
        counts["silent"] = d_sae - member.alive
    return {
        **({"about": ABOUT[member.control]} if member.control else {}),
        "summary": {score: _summary(member, score, cfg) for score in member.parts},
        "density": density,
        "counts": counts | {"skipped": dict(reasons)},
        "latents": latents,
        "partners": [row for row in rows if row["latent"] not in own],
    }


def latent_row(member: InterpretedMember, latent: int, contexts: LatentContexts | None) -> Json:
    """Return what is reported of one latent: its scores, and beside them all that the scorers say.

    Simulation has a rule of its own for skipping, so a latent may have a score and no contexts.
    """
    key = str(latent)
    scored = {s: p for s, p in member.parts.items() if key in p["details"]}
    details = {score: part["details"][key] for score, part in scored.items()}
    found = (part["density"][key] for part in scored.values())
    return {
        "latent": latent,
        "density": next(found, None) if contexts is None else contexts.density,
        "peak": None if contexts is None else contexts.peak,
        "explanation": member.explanations.get(key),
        "tokens": [] if contexts is None else typical_tokens(member.collected, contexts),
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


def _summary(member: InterpretedMember, score: str, cfg: InterpretConfig) -> Json:
    """Return the mean of a score with its interval, every other number of the scorer likewise, and the counts.

    Where contexts were counted also the balanced accuracy of all of them together, and the sums of their counts.
    """

    def averaged(key: str) -> Json:
        known = np.array([row[key] for row in rows if row.get(key) is not None], dtype=np.float64)
        if not len(known):
            return {"value": None, "low": None, "high": None, "n": 0}
        return {**estimate(mean(known), bootstrap(cfg))._asdict(), "n": len(known)}

    part = member.parts[score]
    metric, details = part["metric"], part["details"]
    found = {j: details[str(j)] for j in member.sampled(score) if str(j) in details}
    rows = list(found.values())
    means = [key for key in (rows[0] if rows else {}) if key not in _COUNTS and key != metric]
    out: Json = {
        "metric": metric,
        **averaged(metric),
        "also": {key: averaged(key) for key in means},
    }
    if rows and all("tp" in row for row in rows):
        scores = [LatentScore(latent=j, density=0.0, **row) for j, row in found.items()]
        sums = {key: sum(row[key] for row in rows) for key in _COUNTS if "n_" not in key}
        pooled = pooled_accuracy(scores, bootstrap(cfg))._asdict()
        out["pooled"] = {"balanced_accuracy": pooled, **sums}
    for kind, prefix in (("tally", ""), ("explaining", "explanations_")):
        if tally := part.get(kind):
            names = ("requested", "parsed", "failed", "not_asked", "cached", "reasons")
            out |= {f"{prefix}{name}": tally[name] for name in names}
    return out | ({"skipped": part["skipped"]} if "skipped" in part else {})


def bootstrap(cfg: InterpretConfig) -> EvalConfig:
    """Return the settings of the intervals."""
    return EvalConfig(draws=cfg.draws, confidence=cfg.confidence, seed=cfg.seed)


def comparisons(
    surveyed: SurveyedHook, named: dict[str, InterpretedMember], cfg: InterpretConfig
) -> list[Json]:
    """Return the lines of one hook: a, b, metric (the score), over, difference, low, high, effect_size, n, unit.

    Differences a - b of mean scores, of a member and its plain twin: over "matched" latents (pairs of the one-to-one
    matching, both scored, resampled together), over "all" (the two samples, each resampled on its own), over "density"
    (both samples in strata of density) and "adjusted" (by a regression on it), so that a shift in density cannot pass
    for a change in interpretability; and of a member and a control over "control" (as over "all"). Those over matched
    latents also have `sampled` (the member's latents of which n are compared), `cosine` (the mean decoder cosine of the
    n pairs) and `chance` (that of random directions).
    """
    out, draws = [], bootstrap(cfg)

    def line(a: str, b: str, score: str, over: str, found: Difference) -> Json:
        paired = {"unit": "latent", "paired": over == "matched"}
        return {"a": a, "b": b, "metric": score, "over": over, **found._asdict(), **paired}

    def unpaired(a: InterpretedMember, b: InterpretedMember, score: str) -> Difference:
        return unpaired_difference(_sample(a, score).score, _sample(b, score).score, draws)

    for member, twin in surveyed.family.twins.items():
        a, b = named[member], named[twin]
        for score in (s for s in a.parts if s in b.parts):
            samples = _sample(a, score), _sample(b, score)
            matched, about = _matched(surveyed, member, a.own(score), b.values(score), draws)
            out += [
                line(member, twin, score, "matched", matched) | about,
                line(member, twin, score, "all", unpaired(a, b, score)),
                line(member, twin, score, "density", matched_density(*samples, draws)),
                line(member, twin, score, "adjusted", density_adjusted(*samples, draws)),
            ]
    return out + [
        line(a, b, score, "control", unpaired(member, control, score))
        for a, member in named.items()
        if member.control is None
        for b, control in named.items()
        if control.control is not None
        for score in member.parts
        if score in control.parts
    ]


def _matched(
    surveyed: SurveyedHook,
    member: str,
    left: dict[int, float],
    right: dict[int, float],
    draws: EvalConfig,
) -> tuple[Difference, Json]:
    """Return the difference over matched latents, how many of the sampled are compared, and how alike the pairs are."""
    cosines, partners = surveyed.pairs(member), surveyed.partners(member).items()
    pairs = [(j, k) for j, k in partners if j in left and k in right]
    values = np.array([(left[j], right[k]) for j, k in pairs], dtype=np.float64).reshape(-1, 2)
    about = {
        "sampled": len(surveyed.sample[member]),
        "cosine": float(np.mean([cosines[j][1] for j, _ in pairs])) if pairs else None,
        "chance": surveyed.matching[member].summary()["random_cosine_mean"],
    }
    return paired_difference(mean(values[:, 0]), mean(values[:, 1]), draws), about


def _sample(member: InterpretedMember, score: str) -> Sample:
    """Return the densities and scores of a member's own sample."""
    own, density = member.own(score), member.parts[score]["density"]
    columns = ([density[str(latent)] for latent in own], list(own.values()))
    return Sample(*(np.array(column, dtype=np.float64) for column in columns))


def record_json(job: InterpretJob, surveyed: dict[str, SurveyedHook], found: Interpreted) -> Json:
    """Return the content of interpretation.json: every number."""
    hooks = {}
    for hook, named in found.items():
        one = surveyed[hook]
        entries = {name: entry(member, job.cfg) for name, member in named.items()}
        hooks[hook] = {
            "heldout_tokens": one.survey.moments.n,
            "windows": next(iter(named.values())).collected.counts,
            "reference": one.reference,
            "members": {name: e for name, e in entries.items() if named[name].control is None},
            "controls": {name: e for name, e in entries.items() if named[name].control},
            "matching": {
                member: {"with": one.family.twins[member], **matching.summary()}
                for member, matching in one.matching.items()
            },
            "comparisons": comparisons(one, named, job.cfg),
        }
    return {
        "schema": 1,
        "config": job.cfg.to_dict(),
        "judges": {score: job.judge_name(score) for score in job.cfg.scores},
        "hooks": hooks,
        "glossary": glossary({key: one for key, one in SCORES.items() if key in job.cfg.scores}),
    }


def contexts_json(
    surveyed: dict[str, SurveyedHook], found: Interpreted
) -> dict[str, dict[str, list[Json]]]:
    """Return the content of contexts.json: as the evaluation's, with explanation, typical tokens and scores."""
    return {
        hook: {
            name: [_latent(surveyed[hook], name, member, one) for one in member.collected.latents]
            for name, member in named.items()
            if member.control is None
        }
        for hook, named in found.items()
    }


def _latent(
    surveyed: SurveyedHook, name: str, member: InterpretedMember, contexts: LatentContexts
) -> Json:
    """Return one latent, the twin's latent that it is paired with, and its strongest explaining windows."""
    latent, match = contexts.latent, None
    pairs = surveyed.pairs(name) if name in surveyed.matching else {}
    if latent in pairs:
        partner, cosine = pairs[latent]
        twin = surveyed.family.twins[name]
        match = {"member": twin, "latent": partner, "cosine": round(cosine, 6)}
    windows, shown = member.collected.windows, []
    strongest = contexts.explain.window[:SHOWN].tolist()
    for window, acts in zip(strongest, contexts.explain.acts, strict=False):
        tokens = windows.tokens(window)
        values = [float(f"{act:.4g}") for act in acts[: len(tokens)].tolist()]
        peak, seq = max(range(len(values)), key=values.__getitem__), int(windows.seq[window])
        shown.append({"tokens": tokens, "acts": values, "peak": peak, "seq": seq})
    row = latent_row(member, latent, contexts)
    return {
        "latent": latent,
        "density": contexts.density,
        "variance": float(surveyed.survey.activity[name].variance[latent]),
        "max": contexts.peak,
        "match": match,
        "contexts": shown,
        **{key: row[key] for key in ("explanation", "tokens", "scores")},
    }


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
    documents_of(source)  # data without text want no judge
    families = selected(run_subject(run, source), cfg)
    models = needed_models(cfg, judges)
    job = InterpretJob(run, source, families, cfg, data_digest(source), progress, **models)
    place, parts = run / INTERPRETATION_PART, run / INTERPRETATION_PART / "parts"
    with locked(place, top=run):
        inputs = {
            "run": Run(run).manifest.digest(),
            "data": job.data,
            **judges_of(cfg.scores, job.judge),
        }
        if force:
            shutil.rmtree(parts, ignore_errors=True)
        elif (place / MANIFEST).exists():
            there = read_manifest(place, INTERPRETATION_PART)
            same = there.config == cfg.to_dict() and there.inputs == inputs
            if same and not there.info.get("unfinished"):
                return read_json(place / INTERPRETATION)
        surveyed = survey_hooks(source, families, cfg, progress)
        found = collect_members(job, place, surveyed)
        score_all(job, parts, surveyed, found)
        (place / MANIFEST).unlink(missing_ok=True)
        write_ascii(place / INTERPRETATION, record_json(job, surveyed, found))
        write_ascii(place / CONTEXTS_FILE, contexts_json(surveyed, found))
        scored = (member.parts for named in found.values() for member in named.values())
        info = {"unfinished": any(map(asks_again, scored))}
        files = [INTERPRETATION, CONTEXTS_FILE]
        write_manifest(place, INTERPRETATION_PART, cfg.to_dict(), files, inputs=inputs, info=info)
        return read_json(place / INTERPRETATION)


def judges_of(scores: Sequence[Score], judge: Callable[[Score], Any]) -> dict[str, str]:
    """Return what a manifest says of who judged by each score, and how."""
    return {f"judge/{score}": digest(scorer_identity(score, judge(score))) for score in scores}


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
    families = selected(run_subject(run, source), cfg)
    job = InterpretJob(run, source, families, cfg, "", progress, **needed_models(cfg, judges))
    surveyed = survey_hooks(source, families, cfg, progress)
    found = collect_members(job, run / INTERPRETATION_PART, surveyed)
    simulated = all_fragments(job, surveyed, found) if "simulation" in asked else {}
    total: dict[str, Planned] = {}
    for hook, named in found.items():
        for name, member in named.items():
            assert job.llm is not None
            planned = dry_run(job.llm, asked, member.collected, simulated.get((hook, name)))
            for score, part in planned.items():
                total[score] = total.get(score, Planned()) + part
    return total
