"""Whose latents are scored: the run's members and their controls, each with its contexts.

One pass over the held-out rows gives densities, live latents and the statistics behind the controls. A member's sample
is one live latent from each of n equal-count strata of density; its twin shows the partners of these beside a sample of
its own, so that a comparison over matched latents has both sides.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import torch
from jaxtyping import Int64
from torch import Tensor

from wsae.core.errors import UserError
from wsae.core.progress import Progress, quiet
from wsae.evals.autointerp.collect import Latents, Members, collect
from wsae.evals.autointerp.config import FREE, Control, InterpretConfig, Score
from wsae.evals.autointerp.controls import NAMES, neurons, pca, random_model, shuffled, subset
from wsae.evals.autointerp.embedding import Memo, TextEncoder, load_encoder
from wsae.evals.autointerp.llm.asking import Llm
from wsae.evals.autointerp.surprisal import PrefixReader
from wsae.evals.autointerp.windows import Collected
from wsae.evals.contexts import sample_latents
from wsae.evals.control import random_control
from wsae.evals.data import HeldOut, Language
from wsae.evals.matching import LiveDecoder, Matching, match
from wsae.evals.measure import EvaluatedSaes, Survey
from wsae.run import Run
from wsae.sae import SparseAutoencoder
from wsae.stats.moments import Covariance

ASSIGNMENT_MAX = 8192
"""Live latents up to which members are matched one-to-one optimally, as in `wsae evaluate`."""


class ScorerModels(TypedDict, total=False):
    """The models that may be asked; what is left out is not there."""

    llm: Llm | None
    """A language model that follows instructions, for detection, fuzzing and simulation."""
    language: Language | None
    """The model behind the activations, for surprisal and the control random_model."""
    encoder: TextEncoder | None
    """A sentence encoder, for embedding; none loads the builtin one."""


@dataclass(frozen=True)
class InterpretJob:
    """One interpretation: the run's families on some data, and the models that the scores need, all there."""

    run: Path
    source: HeldOut
    families: dict[str, EvaluatedSaes]
    cfg: InterpretConfig
    data: str
    """Digest of the data."""
    progress: Progress = quiet
    encoder: TextEncoder | None = None
    language: Language | None = None
    reader: PrefixReader | None = None
    """The language model as a reader, which remembers what it has read."""
    llm: Llm | None = None

    def judge(self, score: Score) -> Any:
        """Return the model behind a score."""
        return {"embedding": self.encoder, "surprisal": self.language}.get(score, self.llm)

    def judge_name(self, score: Score) -> str:
        """Return what results call the model behind a score."""
        judge = self.judge(score)
        return str(getattr(judge, "name", type(judge).__name__))


def needed_models(cfg: InterpretConfig, given: ScorerModels) -> dict[str, Any]:
    """Return the fields of `InterpretJob` for its models; raises UserError naming the score that lacks one."""
    out: dict[str, Any] = {name: given.get(name) for name in ("encoder", "language", "llm")}
    if "embedding" in cfg.scores:
        out["encoder"] = Memo(out["encoder"] or load_encoder())
    if "surprisal" in cfg.scores:
        if out["language"] is None:
            raise UserError(
                "score surprisal: needs the model behind the data, and these have none; leave it out"
            )
        out["reader"] = PrefixReader(out["language"])
    asked = [score for score in cfg.scores if score not in FREE]
    if asked and out["llm"] is None:
        raise UserError(
            f"score {asked[0]}: asks a language model that follows instructions; give one, or leave it out"
        )
    return out


@dataclass(frozen=True)
class SurveyedHook:
    """One hook's members before collection."""

    family: EvaluatedSaes
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
    families: dict[str, EvaluatedSaes],
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
    out = {}
    for hook, family in families.items():
        activity, matching, sample = surveys[hook].activity, {}, {}
        for name, live in activity.items():
            n, names = cfg.contexts.n_latents, ("interpret", hook, name)
            sample[name] = sample_latents(live.density, n, cfg.seed, *names).tolist()
        for member, twin in family.twins.items():
            a, b = (LiveDecoder(family.saes[n].W_dec, activity[n].alive) for n in (member, twin))
            matching[member] = match(a, b, ASSIGNMENT_MAX, cfg.seed)
        reference = next(iter(family.twins.values()), next(iter(family.saes)))
        covariance = covariances.get(hook)
        out[hook] = SurveyedHook(family, surveys[hook], covariance, reference, sample, matching)
    return out


def selected(families: dict[str, EvaluatedSaes], cfg: InterpretConfig) -> dict[str, EvaluatedSaes]:
    """Return the hooks and members asked for, each weighted member with its twin; raises UserError for others."""
    for hook in cfg.hooks:
        if hook not in families:
            raise UserError(f"hook {hook!r}: the run has {', '.join(families)}")
    out = {}
    for hook, family in families.items():
        if cfg.hooks and hook not in cfg.hooks:
            continue
        for name in cfg.members:
            if name not in family.saes:
                raise UserError(f"member {name!r}: the run has {', '.join(family.saes)}")
        chosen = set(cfg.members or family.saes)
        chosen |= {twin for name, twin in family.twins.items() if name in chosen}
        out[hook] = EvaluatedSaes(
            {name: sae for name, sae in family.saes.items() if name in chosen},
            {name: twin for name, twin in family.twins.items() if name in chosen},
        )
    return out


@dataclass
class InterpretedMember:
    """One member or control, its contexts, and what the scorers make of them."""

    sae: SparseAutoencoder
    source: HeldOut
    collected: Collected
    sample: list[int]
    """Latents its means are over; the others are partners of another member's."""
    control: Control | None = None
    alive: int | None = None
    """Latents that fire on the held-out rows; None where nobody counted."""
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Score -> {"judge", "metric", "density": {latent: ...}, "details": {latent: {...}}, "tally" or None}."""
    explanations: dict[str, str] = field(default_factory=dict)

    def sampled(self, score: str) -> list[int]:
        """Return the latents that a score's mean is over: the sample, or the part of it that was scored."""
        return self.parts[score].get("sample", self.sample)

    def values(self, score: str) -> dict[int, float]:
        """Return the score of every latent that has one."""
        part = self.parts[score]
        found = {int(j): row.get(part["metric"]) for j, row in part["details"].items()}
        return {latent: value for latent, value in found.items() if value is not None}

    def own(self, score: str) -> dict[int, float]:
        """Return the same for the sample alone."""
        values = self.values(score)
        return {latent: values[latent] for latent in self.sampled(score) if latent in values}


Interpreted = dict[str, dict[str, InterpretedMember]]
"""Hook -> the name of the member or control -> it."""


def collect_members(
    job: InterpretJob, place: Path, surveyed: dict[str, SurveyedHook]
) -> Interpreted:
    """Collect the contexts of all members and controls: one pass, and one of the model with random weights."""
    cfg = job.cfg
    saes: Members = {h: {**one.family.saes, **one.controls(cfg)} for h, one in surveyed.items()}
    wanted = {hook: one.latents() for hook, one in surveyed.items()}
    control_of: dict[str, Control] = {name: control for control, name in NAMES.items()}

    def collected(source: HeldOut, saes: Members, wanted: Latents | None) -> Interpreted:
        found = collect(source, saes, cfg.contexts, cfg.batch_size, wanted, job.progress)
        out: Interpreted = {}
        for hook, named in found.items():
            out[hook] = {}
            for name, one in named.items():  # the sample of a control: all latents drawn
                sample = [*(contexts.latent for contexts in one.latents), *one.left_out]
                control = control_of.get(name)
                out[hook][name] = InterpretedMember(saes[hook][name], source, one, sample, control)
        return out

    out = collected(job.source, saes, wanted)
    for hook, one in surveyed.items():
        for name, sample in one.sample.items():
            out[hook][name].sample = sample
            out[hook][name].alive = len(one.survey.activity[name].alive)
        if "shuffled" in cfg.controls:
            like = out[hook][one.reference]
            own = subset(like.collected, set(like.sample))
            out[hook][NAMES["shuffled"]] = InterpretedMember(
                like.sae,
                like.source,
                shuffled(own, cfg.seed, hook),
                [contexts.latent for contexts in own.latents],
                "shuffled",
            )
    if "random_model" in cfg.controls:
        train = Run(job.run).config
        member = next(iter(surveyed.values())).reference
        made, live = random_model(
            job.source,
            job.language,
            train,
            member,
            place / "random-model",
            cfg.seed,
            cfg.keep_store,
            job.progress,
        )
        alone = {hook: {NAMES["random_model"]: made[hook]} for hook in surveyed}
        for hook, named in collected(live, alone, None).items():
            out[hook] |= named
    return out
