"""From images to scored SAEs: pretrain, harvest, then train, evaluate and score run after run.

Each stage reads directories and writes one; a finished stage is not run again, and a killed one goes on. Held-out
images are for the last two stages alone: they do not enter pretraining, gamma, or the training of the SAEs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int64

from wsae.acts.images.gallery import Gallery
from wsae.acts.images.harvest import harvest_images
from wsae.acts.images.sets import ImageSet, open_images
from wsae.acts.source import StoreSource
from wsae.core.artifact import MANIFEST, read_manifest
from wsae.core.errors import UserError
from wsae.core.progress import Progress, quiet
from wsae.evals.classes.run import score_run
from wsae.evals.run import evaluate_run
from wsae.experiments.vision.beta import top_consistency
from wsae.experiments.vision.config import VisionConfig
from wsae.train.config import TrainConfig
from wsae.train.run import train_run
from wsae.vision.run import pretrain

Say = Callable[[str], None]
Stage = Literal["train", "evaluate", "score"]
STAGES: tuple[Stage, ...] = ("train", "evaluate", "score")


@dataclass(frozen=True)
class Job:
    """One run: its number in the plan and its directory."""

    number: int
    path: Path


@dataclass
class Workshop:
    """What the stages share: settings, places, the images, and whom to tell."""

    cfg: VisionConfig
    out: Path
    progress: Progress = quiet
    say: Say = lambda _: None

    @cached_property
    def images(self) -> ImageSet:
        """The images; raises UserError where they have no classes."""
        found = open_images(self.cfg.images)
        if found.labels is None:
            raise UserError(
                f"images {self.cfg.images.path}: have no classes, which consistency is about; give labelled ones"
            )
        return found

    @property
    def labels(self) -> Int64[np.ndarray, " images"]:
        """The class of every image by number."""
        labels = self.images.labels
        assert labels is not None
        return labels

    def model(self, backbone: str) -> Path:
        """Return the directory of a backbone's pretraining run."""
        return self.cfg.backbone(backbone).run or self.out / "pretrain" / backbone

    def source(self, job: Job) -> StoreSource:
        """Return the activations of a run."""
        planned = self.cfg.plan.runs[job.number]
        return StoreSource(self.out / "store" / planned.backbone, (planned.hook,), verify=False)

    def jobs(self) -> list[Job]:
        """Return the runs in the plan's order."""
        return [
            Job(i, self.out / "runs" / run.backbone / run.hook / f"seed-{run.seed}")
            for i, run in enumerate(self.cfg.plan.runs)
        ]

    def training(self, job: Job) -> TrainConfig:
        """Return a run's training; the proxy `top` is computed once for each backbone and hook, from training rows."""
        planned, source = self.cfg.plan.runs[job.number], self.source(job)
        top = None
        if any(weighting.proxy == "top" for weighting in planned.weightings):
            place = job.path.parent / "top.json"
            top = top_consistency(source, self.labels, self.cfg.classes.n_top, place)
        return self.cfg.training(job.number, source.n_rows, top)


def run_vision(shop: Workshop) -> list[Job]:
    """Run every stage that is not finished and return the runs, in the plan's order.

    Raises UserError as the stages do, and KeyboardInterrupt after what is written is whole.
    """
    cfg, images = shop.cfg, shop.images
    for backbone in cfg.used():
        if backbone.run is None:
            shop.say(f"pretrain: {backbone.name}, {len(images)} images")
            place = shop.model(backbone.name)
            pretrain(
                backbone.pretrain, images, place, shop.progress, resume=True, device=cfg.device
            )
        harvested = cfg.harvest(backbone.name, shop.model(backbone.name))
        harvest_images(harvested, shop.out / "store" / backbone.name, shop.progress)
    jobs = shop.jobs()
    for stage in STAGES:
        for place, job in enumerate(jobs, start=1):
            if not finished(shop, job, stage):
                run = cfg.plan.runs[job.number]
                where = f"{run.backbone}, {run.hook}, seed {run.seed}"
                shop.say(f"{stage} {place} of {len(jobs)}: {where}")
                WORK[stage](shop, job)
    return jobs


def finished(shop: Workshop, job: Job, stage: Stage) -> bool:
    """Say whether a stage of a run is there, made with these settings from what is there now."""
    if stage == "train":
        if not (job.path / MANIFEST).exists():
            return False
        manifest = read_manifest(job.path, "run", verify=False)
        return manifest.config["train"] == shop.training(job).to_dict()
    kind, settings = {
        "evaluate": ("evaluation", shop.cfg.evaluation),
        "score": ("classes", shop.cfg.classes),
    }[stage]
    place = job.path / kind
    if not (place / MANIFEST).exists():
        return False
    manifest = read_manifest(place, kind, verify=False)
    run = read_manifest(job.path, "run", verify=False).digest()
    return manifest.config == settings.to_dict() and manifest.inputs["run"] == run


def _train(shop: Workshop, job: Job) -> None:
    cfg, source = shop.training(job), shop.source(job)
    train_run(cfg, source, job.path, shop.progress, resume=True, device=shop.cfg.device)


def _evaluate(shop: Workshop, job: Job) -> None:
    gallery = Gallery(shop.images)
    evaluate_run(job.path, shop.source(job), shop.cfg.evaluation, gallery, shop.progress)


def _score(shop: Workshop, job: Job) -> None:
    score_run(job.path, shop.source(job), shop.labels, shop.cfg.classes, shop.progress)


WORK: dict[Stage, Callable[[Workshop, Job], None]] = {
    "train": _train,
    "evaluate": _evaluate,
    "score": _score,
}
