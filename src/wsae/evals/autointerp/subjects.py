"""Whose latents are scored: the run's members and their controls, each with its contexts."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict

import torch
from jaxtyping import Int64
from torch import Tensor

from wsae.core.errors import UserError
from wsae.core.files import digest
from wsae.core.progress import Progress, quiet
from wsae.evals.autointerp.collect import Members, collect
from wsae.evals.autointerp.config import FREE, Control, InterpretConfig, Score
from wsae.evals.autointerp.controls import (
    ABOUT,
    NAMES,
    RandomModelRecipe,
    neurons,
    pca,
    random_model,
    shuffled,
)
from wsae.evals.autointerp.embedding import Memo, TextEncoder, embedding_scores, load_encoder
from wsae.evals.autointerp.llm.client import NO_EXPLANATION
from wsae.evals.autointerp.llm.detect import (
    Explained,
    Explanation,
    Judged,
    detection_scores,
    explain_latents,
    fuzzing_scores,
)
from wsae.evals.autointerp.llm.simulate import Fragments, simulation_scores
from wsae.evals.autointerp.llm.types import AnswerTally, Llm
from wsae.evals.autointerp.surprisal import TEMPLATES, PrefixReader, surprisal_scores
from wsae.evals.autointerp.windows import Collected
from wsae.evals.contexts import sample_latents
from wsae.evals.control import random_control
from wsae.evals.data import HeldOut, Language
from wsae.evals.matching import LiveDecoder, Matching, match
from wsae.evals.measure import Family, Survey
from wsae.run import Run
from wsae.sae import SparseAutoencoder
from wsae.stats.moments import Covariance
from wsae.train.config import TrainConfig

# Before contexts are collected: which latents stand for a member, and which latent of its twin each
# is compared with.
#
# One pass over the held-out rows gives densities, live latents and the statistics behind the
# controls. A member's sample is one live latent from each of n equal-count strata of density; its
# twin shows the partners of these beside a sample of its own, so that a comparison over matched
# latents has both sides.

ASSIGNMENT_MAX = 8192
"""Live latents up to which members are matched one-to-one optimally, as in `wsae evaluate`."""


@dataclass(frozen=True)
class SurveyedHook:
    """One hook's members before collection."""

    family: Family
    survey: Survey
    covariance: Covariance | None
    reference: str
    """The member that the controls are made like: the plain twin, or the first member where none is plain."""
    sample: dict[str, list[int]] = field(default_factory=dict)
    """Each member's own latents: its means are over these."""
    matching: dict[str, Matching] = field(default_factory=dict)

    def partners(self, member: str) -> dict[int, int]:
        """Return latent -> its partner in the twin, for the member's sampled latents that have one."""
        matching = self.matching[member]
        pairs = dict(zip(matching.pair_a.tolist(), matching.pair_b.tolist(), strict=True))
        return {latent: pairs[latent] for latent in self.sample[member] if latent in pairs}

    def latents(self) -> dict[str, Int64[Tensor, " latents"]]:
        """Return what to collect of each member: its sample, then partners of other members' samples."""
        wanted = {name: list(sample) for name, sample in self.sample.items()}
        for member, twin in self.family.twins.items():
            wanted[twin] += self.partners(member).values()
        return {
            name: torch.tensor(list(dict.fromkeys(latents)), dtype=torch.int64)
            for name, latents in wanted.items()
        }

    def controls(self, cfg: InterpretConfig) -> dict[str, SparseAutoencoder]:
        """Return the controls that are SAEs of the same rows, by name."""
        mean, l0 = self.survey.moments.mean, self.survey.activity[self.reference].l0
        like = self.family.saes[self.reference]
        made: dict[Control, SparseAutoencoder] = {}
        if "random_sae" in cfg.controls:
            made["random_sae"] = random_control(like, mean, l0, cfg.seed)
        if "neurons" in cfg.controls:
            made["neurons"] = neurons(mean, self.survey.moments.variance, l0)
        if "pca" in cfg.controls:
            assert self.covariance is not None
            made["pca"] = pca(mean, self.covariance.covariance, l0)
        device = like.W_dec.device
        return {NAMES[control]: sae.to(device) for control, sae in made.items()}


@torch.inference_mode()
def survey_hooks(
    source: HeldOut,
    families: dict[str, Family],
    cfg: InterpretConfig,
    progress: Progress = quiet,
) -> dict[str, SurveyedHook]:
    """Survey the held-out rows once and choose each member's latents, hook by hook.

    Raises UserError when there are no rows, a width differs, or the data hold NaN.
    """
    surveys = {
        hook: Survey(hook, family.saes, source.hooks[hook]) for hook, family in families.items()
    }
    covariances = {h: Covariance(source.hooks[h]) for h in families if "pca" in cfg.controls}
    n_rows = 0
    with progress("survey", None, "rows") as tick:
        for chunk in source.heldout(cfg.batch_size):
            for hook, survey in surveys.items():
                survey.update(chunk.x[hook])
                if hook in covariances:
                    covariances[hook].update(chunk.x[hook])
            n_rows += len(chunk.seq)
            tick(len(chunk.seq))
    if not n_rows:
        raise UserError("there are no held-out rows to interpret on; hold out more data")
    return {h: _sides(f, surveys[h], covariances.get(h), cfg) for h, f in families.items()}


def _sides(
    family: Family, survey: Survey, covariance: Covariance | None, cfg: InterpretConfig
) -> SurveyedHook:
    sample = {
        name: sample_latents(
            activity.density, cfg.contexts.n_latents, cfg.seed, "interpret", survey.hook, name
        ).tolist()
        for name, activity in survey.activity.items()
    }
    matching = {}
    for member, twin in family.twins.items():
        a, b = (LiveDecoder(family.saes[n].W_dec, survey.activity[n].alive) for n in (member, twin))
        matching[member] = match(a, b, ASSIGNMENT_MAX, cfg.seed)
    reference = next(iter(family.twins.values()), next(iter(family.saes)))
    return SurveyedHook(family, survey, covariance, reference, sample, matching)


def selected(families: dict[str, Family], cfg: InterpretConfig) -> dict[str, Family]:
    """Return the hooks and members asked for, each weighted member with its twin; raises UserError for others."""
    for hook in cfg.hooks:
        if hook not in families:
            raise UserError(f"hook {hook!r}: the run has {', '.join(families)}")
    chosen = {hook: f for hook, f in families.items() if not cfg.hooks or hook in cfg.hooks}
    return {hook: _restricted(family, cfg.members) for hook, family in chosen.items()}


def _restricted(family: Family, members: tuple[str, ...]) -> Family:
    for name in members:
        if name not in family.saes:
            raise UserError(f"member {name!r}: the run has {', '.join(family.saes)}")
    if not members:
        return family
    kept = set(members) | {twin for name, twin in family.twins.items() if name in members}
    twins = {name: twin for name, twin in family.twins.items() if name in kept}
    return Family({name: sae for name, sae in family.saes.items() if name in kept}, twins)


# Who judges, and each scorer's answer for one member as a part that can be kept: plain JSON, by
# latent.

Json = dict[str, Any]
METRIC: dict[Score, str] = {
    "embedding": "auc",
    "surprisal": "auc",
    "detection": "balanced_accuracy",
    "fuzzing": "balanced_accuracy",
    "simulation": "mixed",
}
"""The number that stands for a score; what else is known of a latent is beside it."""
_FINAL = (NO_EXPLANATION, "unparsed")
"""Beginnings of the reasons that asking again would not fix: the answer on disk is what it is."""


class ScorerModels(TypedDict, total=False):
    """The models that may be asked; what is left out is not there."""

    llm: Llm | None
    """A language model that follows instructions, for detection, fuzzing and simulation."""
    language: Language | None
    """The model behind the activations, for surprisal and the control random_model."""
    encoder: TextEncoder | None
    """A sentence encoder, for embedding; none loads the builtin one."""


@dataclass(frozen=True)
class Scorers:
    """The models that the scores need, all there."""

    cfg: InterpretConfig
    encoder: TextEncoder | None
    language: Language | None
    llm: Llm | None
    reader: PrefixReader | None = None
    """The language model as a reader, which remembers what it has read."""
    progress: Progress = quiet

    def names(self) -> dict[str, str]:
        """Return score -> who judges it."""
        return {score: _name(self._judge(score)) for score in self.cfg.scores}

    def identity(self, score: Score) -> Json:
        """Return what a score depends on beside the contexts: who judges, and how."""
        judge = self._judge(score)
        found: Json = {
            "score": score,
            "judge": _name(judge),
            "digest": getattr(judge, "digest", ""),
        }
        if score == "surprisal":
            found["prompts"] = digest(TEMPLATES)
        if score not in FREE:
            assert self.llm is not None
            cfg = self.llm.cfg
            own = ("probabilities", "hard", "per_prompt", "simulator", "temperature", "seed")
            found |= {name: getattr(cfg, name) for name in own}
        return found

    def free(self, score: Score, collected: Collected, latents: set[int] | None) -> Json:
        """Score some of a member's latents (none: all) without an LLM."""
        if score == "embedding":
            assert self.encoder is not None
            scores = embedding_scores(collected, self.encoder, progress=self.progress)
        else:
            assert self.reader is not None
            scores = surprisal_scores(
                collected, self.reader, None, latents, self.cfg.seed, self.progress
            )
        return _part(score, _name(self._judge(score)), scores, None)

    def asked(self, collected: Collected, task: str) -> tuple[dict[str, Json], dict[str, str]]:
        """Explain a member's latents and judge them by detection and fuzzing; return parts and explanations."""
        assert self.llm is not None
        wanted: list[Score] = [s for s in self.cfg.scores if s in ("detection", "fuzzing")]
        explained = explain_latents(collected, self.llm, self.progress, f"{task}: explain")
        parts = {}
        for score in wanted:
            found = self._judged(score, collected, explained, f"{task}: {score}")
            parts[score] = _part(score, found.model, found.scores, found.tally)
            parts[score]["explaining"] = explained.tally.to_dict()
        return parts, _texts(explained.explanations)

    def simulated(self, found: Fragments, task: str) -> tuple[Json, dict[str, str]]:
        """Explain a member's latents from fragments and simulate others; return the part and explanations."""
        assert self.llm is not None
        result = simulation_scores(found, self.llm, None, self.progress, task)
        part = _part("simulation", result.model, result.scores, result.tally)
        part |= {"explaining": result.explained.tally.to_dict(), "skipped": result.skipped}
        return part, _texts(result.explained.explanations)

    def _judged(self, score: str, collected: Collected, explained: Explained, task: str) -> Judged:
        assert self.llm is not None
        if score == "detection":
            return detection_scores(
                collected, explained.explanations, self.llm, self.progress, task
            )
        return fuzzing_scores(
            collected, explained.explanations, self.llm, "silent", self.progress, task
        )

    def _judge(self, score: str) -> object:
        named = {"embedding": self.encoder, "surprisal": self.language}
        return named.get(score, self.llm)


def choose_scorers(cfg: InterpretConfig, judges: ScorerModels, progress: Progress) -> Scorers:
    """Return the judges; raises UserError naming the score that lacks one."""
    encoder, language, llm = judges.get("encoder"), judges.get("language"), judges.get("llm")
    if "embedding" in cfg.scores:
        encoder = Memo(load_encoder() if encoder is None else encoder)
    if "surprisal" in cfg.scores and language is None:
        raise UserError(
            "score surprisal: needs the model behind the data, and these have none; leave it out"
        )
    asked = [score for score in cfg.scores if score not in FREE]
    if asked and llm is None:
        raise UserError(
            f"score {asked[0]}: asks a language model that follows instructions; give one, or leave it out"
        )
    reader = PrefixReader(language) if "surprisal" in cfg.scores and language is not None else None
    return Scorers(cfg, encoder, language, llm, reader, progress)


def subset(collected: Collected, latents: set[int]) -> Collected:
    """Return the contexts of some latents."""
    return replace(collected, latents=[c for c in collected.latents if c.latent in latents])


def again(parts: Mapping[str, Json]) -> bool:
    """Return whether some request had no answer that another attempt, or a larger budget, could bring."""
    tallies = (part.get(kind) for part in parts.values() for kind in ("tally", "explaining"))
    reasons = (reason for tally in tallies if tally for reason in tally["reasons"])
    return any(not reason.startswith(_FINAL) for reason in reasons)


def _part(score: Score, judge: str, scores: list[Any], tally: AnswerTally | None) -> Json:
    return {
        "judge": judge,
        "metric": METRIC[score],
        "density": {str(row.latent): row.density for row in scores},
        "details": {str(row.latent): _row(row) for row in scores},
        "tally": None if tally is None else tally.to_dict(),
    }


def _row(row: Any) -> Json:
    return {key: value for key, value in row._asdict().items() if key not in ("latent", "density")}


def _texts(explanations: dict[int, Explanation]) -> dict[str, str]:
    return {str(latent): found.text for latent, found in explanations.items()}


def _name(judge: object) -> str:
    return str(getattr(judge, "name", type(judge).__name__))


@dataclass(frozen=True)
class InterpretJob:
    """One interpretation: the run's families on some data, and who judges."""

    run: Path
    source: HeldOut
    families: dict[str, Family]
    scorers: Scorers
    data: str
    """Digest of the data."""

    @property
    def cfg(self) -> InterpretConfig:
        """The settings."""
        return self.scorers.cfg

    @property
    def progress(self) -> Progress:
        """Whom to tell."""
        return self.scorers.progress


@dataclass
class Subject:
    """One member or control, its contexts, and what the scorers make of them."""

    sae: SparseAutoencoder
    source: HeldOut
    collected: Collected
    sample: list[int]
    """Latents its means are over; the others are partners of another member's."""
    control: Control | None = None
    alive: int | None = None
    """Latents that fire on the held-out rows; None where nobody counted."""
    parts: dict[str, Json] = field(default_factory=dict)
    """Score -> {"judge", "metric", "density": {latent: ...}, "details": {latent: {...}}, "tally" or None}."""
    explanations: dict[str, str] = field(default_factory=dict)

    def values(self, score: str) -> dict[int, float]:
        """Return the score of every latent that has one."""
        part = self.parts[score]
        found = {int(j): row.get(part["metric"]) for j, row in part["details"].items()}
        return {latent: value for latent, value in found.items() if value is not None}

    def own(self, score: str) -> dict[int, float]:
        """Return the same for the sample alone."""
        values = self.values(score)
        return {latent: values[latent] for latent in self.sampled(score) if latent in values}

    def sampled(self, score: str) -> list[int]:
        """Return the latents that a score's mean is over: the sample, or the part of it that was scored."""
        return self.parts[score].get("sample", self.sample)


Named = dict[str, Subject]
"""One hook's subjects by the name of the member or control."""
Subjects = dict[str, Named]
"""Hook -> subjects."""


def subjects(job: InterpretJob, place: Path, sides: dict[str, SurveyedHook]) -> Subjects:
    """Collect the contexts of all members and controls: one pass, and one of the model with random weights."""
    saes: Members = {h: {**s.family.saes, **s.controls(job.cfg)} for h, s in sides.items()}
    wanted = {hook: side.latents() for hook, side in sides.items()}
    found = _collected(job, job.source, saes, wanted)
    control_of: dict[str, Control] = {name: control for control, name in NAMES.items()}
    out: Subjects = {hook: {} for hook in sides}
    for hook, side in sides.items():
        for name, collected in found[hook].items():
            control = control_of.get(name)
            subject = Subject(saes[hook][name], job.source, collected, _all(collected), control)
            if control is None:
                subject.sample = side.sample[name]
                subject.alive = len(side.survey.activity[name].alive)
            out[hook][name] = subject
        if "shuffled" in job.cfg.controls:
            out[hook][NAMES["shuffled"]] = _shuffled(job, hook, out[hook][side.reference])
    if "random_model" in job.cfg.controls:
        for hook, subject in _random_model(job, place, sides).items():
            out[hook][NAMES["random_model"]] = subject
    return out


def about(subject: Subject) -> str:
    """Return what a control is, in words."""
    return ABOUT[subject.control] if subject.control else ""


def _collected(job: InterpretJob, source: HeldOut, saes: Members, wanted: Any) -> Any:
    return collect(source, saes, job.cfg.contexts, job.cfg.batch_size, wanted, job.progress)


def _all(collected: Collected) -> list[int]:
    """Return the latents that were drawn: those with contexts and those left out."""
    return [*(contexts.latent for contexts in collected.latents), *collected.left_out]


def _shuffled(job: InterpretJob, hook: str, reference: Subject) -> Subject:
    """Return the reference's sample, each latent with another one's explaining windows."""
    own = subset(reference.collected, set(reference.sample))
    swapped = shuffled(own, job.cfg.seed, hook)
    sample = [contexts.latent for contexts in own.latents]
    return Subject(reference.sae, reference.source, swapped, sample, "shuffled")


def _random_model(
    job: InterpretJob, place: Path, sides: dict[str, SurveyedHook]
) -> dict[str, Subject]:
    train = Run(job.run).config
    if not isinstance(train, TrainConfig):
        raise UserError(
            f"{job.run}: too little is known of how this SAE was trained for the control random_model; leave it out"
        )
    member = next(iter(sides.values())).reference
    recipe = RandomModelRecipe(
        job.source, job.scorers.language, train, member, job.cfg.seed, job.cfg.keep_store
    )
    made = random_model(recipe, place / "random-model", job.progress)
    saes = {hook: {NAMES["random_model"]: made.saes[hook]} for hook in sides}
    found = _collected(job, made.source, saes, None)
    out = {}
    for hook, named in found.items():
        ((name, collected),) = named.items()
        sae = saes[hook][name]
        out[hook] = Subject(sae, made.source, collected, _all(collected), "random_model")
    return out
