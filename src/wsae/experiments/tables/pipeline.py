"""From a model to scored SAEs: harvest once, then train, evaluate and interpret run after run.

Each stage reads directories and writes one; a finished stage is not run again, and a killed one goes on. By way of a
store every run has one hook: at most its rows are in the page cache and its members in memory, whatever the number of
hooks. Training from a live model needs no disk, but every hook's members in memory at once.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from wsae.acts.harvest import harvest
from wsae.acts.language import LanguageModel, load_language
from wsae.acts.live import LiveSource
from wsae.acts.source import StoreSource
from wsae.core.artifact import MANIFEST, read_manifest
from wsae.core.progress import Progress, quiet
from wsae.evals.run import evaluate_run
from wsae.experiments.tables.config import STAGES, Choices, Stage, StudyConfig
from wsae.experiments.tables.tiny import BagEncoder, tiny_model
from wsae.train.run import train_run

Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """One run: its number in the plan, its hooks and its directory."""

    number: int
    hooks: tuple[str, ...]
    path: Path


@dataclass
class Workshop:
    """What the stages share: places, the model (loaded once, when first needed) and whom to tell."""

    cfg: StudyConfig
    out: Path
    store: Path
    progress: Progress = quiet
    say: Say = lambda _: None
    _checked: set[Path] = field(default_factory=set)

    @cached_property
    def language(self) -> LanguageModel:
        """The model under study."""
        wanted = self.cfg.harvest
        return load_language(wanted.model, wanted.dtype, wanted.device)

    def jobs(self) -> list[Job]:
        """Return the runs in the plan's order; live training has one for each seed, with every hook."""
        runs = self.cfg.plan.runs
        if self.cfg.live is None:
            return [
                Job(i, (run.hook,), self.out / "runs" / run.hook / f"seed-{run.seed}")
                for i, run in enumerate(runs)
            ]
        seeds = {run.seed: i for i, run in reversed(list(enumerate(runs)))}
        hooks = self.cfg.plan.hooks
        return [
            Job(i, hooks, self.out / "runs" / "all" / f"seed-{s}") for s, i in sorted(seeds.items())
        ]

    def source(self, job: Job) -> "StoreSource | LiveSource":
        """Return the activations of a run's hooks."""
        if self.cfg.live is None:
            return StoreSource(self.store, job.hooks, verify=False)  # the harvest has checked them
        wanted = self.cfg.harvest.model_copy(update={"hooks": job.hooks})
        return LiveSource(wanted, self.cfg.live, self.language)


def run_study(
    cfg: StudyConfig,
    out: Path,
    choices: Choices,
    progress: Progress = quiet,
    say: Say = lambda _: None,
) -> list[Job]:
    """Run the stages up to `choices.until` and return the runs, in the plan's order.

    Raises UserError as the stages do, and KeyboardInterrupt after what is written is whole.
    """
    shop = Workshop(cfg, out, choices.store or out.parent / "store", progress, say)
    if cfg.made_here:
        tiny_model(Path(cfg.harvest.model), cfg.harvest.seed)
    if cfg.live is None and choices.store is None:
        harvest(cfg.harvest, shop.store, progress)
    jobs = shop.jobs()
    for stage in STAGES[1 : STAGES.index(choices.until) + 1]:
        for place, job in enumerate(jobs, start=1):
            if not finished(shop, job, stage):
                names = ", ".join(job.hooks)
                seed = cfg.plan.runs[job.number].seed
                say(f"{stage} {place} of {len(jobs)}: {names}, seed {seed}")
                WORK[stage](shop, job)
    return jobs


def finished(shop: Workshop, job: Job, stage: Stage) -> bool:
    """Say whether a stage of a run is there, made with this study's settings from what is there now."""
    if stage == "train":
        return (job.path / MANIFEST).exists() and not _changed(shop, job)
    kind, settings = {
        "evaluate": ("evaluation", shop.cfg.evaluation),
        "interpret": ("interpretation", shop.cfg.interpretation(job.number)),
    }[stage]
    place = job.path / kind
    if not (place / MANIFEST).exists():
        return False
    manifest = read_manifest(place, kind, verify=False)
    return manifest.config == settings.to_dict() and not manifest.info.get("unfinished")


def _changed(shop: Workshop, job: Job) -> bool:
    """Say whether the run that is there is another one; `train_run` then refuses it by the first difference."""
    manifest = read_manifest(job.path, "run", verify=False)
    return manifest.config["train"] != _training(shop, job, shop.source(job)).to_dict()


def _training(shop: Workshop, job: Job, source: "StoreSource | LiveSource") -> Any:
    return shop.cfg.training(job.number, source.n_rows)


def _train(shop: Workshop, job: Job) -> None:
    source = shop.source(job)
    cfg = _training(shop, job, source)
    train_run(cfg, source, job.path, shop.progress, resume=True, device=shop.cfg.harvest.device)


def _evaluate(shop: Workshop, job: Job) -> None:
    evaluate_run(job.path, shop.source(job), shop.cfg.evaluation, None, shop.progress)


def _interpret(shop: Workshop, job: Job) -> None:
    from wsae.evals.autointerp.llm.open import open_llm
    from wsae.evals.autointerp.run import interpret_run

    cfg, judge = shop.cfg.interpretation(job.number), shop.cfg.judge
    own = {"surprisal"} & set(cfg.scores) or {"random_model"} & set(cfg.controls)
    interpret_run(
        job.path,
        shop.source(job),
        cfg,
        shop.progress,
        language=shop.language if own else None,
        encoder=BagEncoder() if shop.cfg.made_here else None,
        llm=None if judge is None else open_llm(judge),
    )


WORK: dict[Stage, Callable[[Workshop, Job], None]] = {
    "train": _train,
    "evaluate": _evaluate,
    "interpret": _interpret,
}
