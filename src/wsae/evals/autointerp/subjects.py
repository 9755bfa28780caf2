"""Whose latents are scored: the run's members and their controls, each with its contexts."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wsae.core.files import read_json
from wsae.core.progress import Progress
from wsae.evals.autointerp.collect import Members, collect
from wsae.evals.autointerp.config import Control, InterpretConfig
from wsae.evals.autointerp.controls import ABOUT, NAMES, shuffled
from wsae.evals.autointerp.pairs import Sides
from wsae.evals.autointerp.panel import Panel, subset
from wsae.evals.autointerp.random_model import Recipe, random_model
from wsae.evals.autointerp.windows import Collected
from wsae.evals.data import HeldOut
from wsae.evals.measure import Family
from wsae.sae import SparseAutoencoder
from wsae.train.config import TrainConfig

Json = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One interpretation: the run's families on some data, and who judges."""

    run: Path
    source: HeldOut
    families: dict[str, Family]
    panel: Panel
    data: str
    """Digest of the data."""

    @property
    def cfg(self) -> InterpretConfig:
        """The settings."""
        return self.panel.cfg

    @property
    def progress(self) -> Progress:
        """Whom to tell."""
        return self.panel.progress


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


def subjects(job: Job, place: Path, sides: dict[str, Sides]) -> Subjects:
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


def _collected(job: Job, source: HeldOut, saes: Members, wanted: Any) -> Any:
    return collect(source, saes, job.cfg.contexts, job.cfg.batch_size, wanted, job.progress)


def _all(collected: Collected) -> list[int]:
    """Return the latents that were drawn: those with contexts and those left out."""
    return [*(contexts.latent for contexts in collected.latents), *collected.left_out]


def _shuffled(job: Job, hook: str, reference: Subject) -> Subject:
    """Return the reference's sample, each latent with another one's explaining windows."""
    own = subset(reference.collected, set(reference.sample))
    swapped = shuffled(own, job.cfg.seed, hook)
    sample = [contexts.latent for contexts in own.latents]
    return Subject(reference.sae, reference.source, swapped, sample, "shuffled")


def _random_model(job: Job, place: Path, sides: dict[str, Sides]) -> dict[str, Subject]:
    train = TrainConfig.parse(read_json(job.run / "config.json")["train"], where=str(job.run))
    member = next(iter(sides.values())).reference
    recipe = Recipe(job.source, job.panel.language, train, member, job.cfg.seed, job.cfg.keep_store)
    made = random_model(recipe, place / "random-model", job.progress)
    saes = {hook: {NAMES["random_model"]: made.saes[hook]} for hook in sides}
    found = _collected(job, made.source, saes, None)
    out = {}
    for hook, named in found.items():
        ((name, collected),) = named.items()
        sae = saes[hook][name]
        out[hook] = Subject(sae, made.source, collected, _all(collected), "random_model")
    return out
