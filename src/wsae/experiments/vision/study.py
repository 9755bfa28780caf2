"""`wsae reproduce figure4|figure5`: from settings to panels, tables and pictures."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64

from wsae.acts.images.harvest import Gallery, harvest_images
from wsae.acts.images.sets import ImageSet, open_images
from wsae.acts.source import StoreSource
from wsae.core.artifact import MANIFEST, read_manifest
from wsae.core.errors import UserError
from wsae.core.files import read_sealed, seal, write_json, write_text
from wsae.core.memory import duration, size
from wsae.core.progress import Progress, quiet
from wsae.evals.classes.run import score_run
from wsae.evals.run import evaluate_run
from wsae.experiments.presets import Preset
from wsae.experiments.tables.analysis import markdown
from wsae.experiments.vision.config import Backbone, VisionChoices, VisionConfig, vision_config
from wsae.experiments.vision.figures import draw, figure4, figure5, run_rows, tables
from wsae.experiments.vision.plan import FigureName
from wsae.stats.classes import Hits, Strongest
from wsae.train.config import TrainConfig
from wsae.train.run import train_run
from wsae.vision.run import pretrain

# The proxy "top": consistency of each input dimension among its strongest training images, as the
# paper words it.

_ROWS = 4096


def top_consistency(
    source: StoreSource, labels: Int64[np.ndarray, " images"], n_top: int, cache: Path
) -> tuple[float, ...]:
    """Return, for each dimension of the only hook, the share of the most frequent class of its n strongest rows.

    Training rows alone; 0 for a dimension positive on fewer than n. Kept in the file `cache` beside the data's digest.
    """
    key = {"data": source.digest(), "n_top": n_top}
    if cache.exists():
        kept = read_sealed(cache)
        if kept.get("key") == key:
            return tuple(kept["beta"])
    ((hook, d_in),) = source.hooks.items()
    image = np.asarray(source.store.places("train")[0])
    strongest = Strongest(d_in, n_top)
    for first in range(0, source.n_rows, _ROWS):
        index = np.arange(first, min(first + _ROWS, source.n_rows))
        x = source.store.rows("train", index)[hook]
        candidates = x.topk(min(n_top, len(x)), dim=0).values[-1]
        hits = Hits.of_dense(torch.where((x >= candidates) & (x > 0), x, 0.0))
        number = image[index][hits.row.numpy()]
        strongest.update(hits.unit.numpy(), hits.value.numpy(), number, labels[number])
    beta = np.nan_to_num(strongest.share()).tolist()
    write_json(cache, seal({"key": key, "beta": beta}))
    return tuple(beta)


# What a figure is about to do, and roughly what it takes. No torch here.

FORWARD = {"imagenet": 3.6e9 / 224**2, "small": 1.1e9 / 32**2, "smallest": 0.28e9 / 32**2}
"""Operations of ResNet-18's forward pass per pixel of an image, by stem (a multiplication and an addition: two)."""
SPEED = {"cpu": 5e10, "cuda": 2e13}
"""Operations a second that training reaches on a core and on a graphics card like the paper's: a guess."""


def announce(cfg: VisionConfig, images: int, torchrun_hint: bool = False) -> list[str]:
    """Return what will be done, line by line, with rough times for a single device."""
    sae, plan = cfg.plan.sae, cfg.plan
    rate = SPEED["cpu" if cfg.device == "cpu" else "cuda"]
    lines = [
        f"{plan.name}: {images:,} images, backbones: {', '.join(b.name for b in cfg.used())}; {plan.n_members} SAEs of "
        f"{sae.d_sae} latents, k {sae.k}, families: {len(plan.runs)}; finished stages are not run again"
    ]
    for backbone in cfg.used():
        if backbone.run is None:
            seconds = pretraining_operations(backbone, images) / rate
            lines.append(
                f"pretraining {backbone.name}: {backbone.pretrain.epochs} epochs, about {duration(seconds)} if nothing "
                "waits for images"
            )
    rows = round(images * (1 - cfg.used()[0].pretrain.heldout_fraction))
    widths = {"pooler": cfg.used()[0].pretrain.widths[-1]}
    total = sum(
        len(run.weightings) * widths.get(run.hook, cfg.used()[0].pretrain.projector_out)
        for run in plan.runs
    )
    seconds = 4 * total * sae.d_sae * rows * sae.passes / rate
    groups = cfg.classes.groups * sae.d_sae * 4
    lines.append(
        f"training the SAEs: {sae.passes} passes over {rows:,} rows, about {duration(seconds)}; scoring holds "
        f"{size(groups)} for each class"
    )
    if torchrun_hint:
        lines.append(
            "on several cards: pretrain first (torchrun --nproc-per-node 2 -m wsae.cli pretrain ...), then give "
            "--pretrained RUN"
        )
    return lines


def pretraining_operations(backbone: Backbone, images: int) -> float:
    """Return the operations of a pretraining run: two views, forward and backward (twice the forward)."""
    cfg = backbone.pretrain
    narrow = (cfg.widths[-1] / 512) ** 2
    each = FORWARD[cfg.stem] * cfg.size**2 * narrow * 2 * 3
    used = min(cfg.limit or images, images) * (1 - cfg.heldout_fraction)
    return each * used * cfg.epochs


# From images to scored SAEs: pretrain, harvest, then train, evaluate and score run after run.
#
# Each stage reads directories and writes one; a finished stage is not run again, and a killed one
# goes on. Held-out images are for the last two stages alone: they do not enter pretraining, gamma,
# or the training of the SAEs.

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
                STAGE_WORK[stage](shop, job)
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


STAGE_WORK: dict[Stage, Callable[[Workshop, Job], None]] = {
    "train": _train,
    "evaluate": _evaluate,
    "score": _score,
}

WORK = "vision"
"""Directory, under the output directory, that both figures share."""


class Place(NamedTuple):
    """Where a figure lives, what the user chose, and whom it tells how far it is."""

    out: Path
    choices: VisionChoices
    progress: Progress
    say: Callable[[str], None]


def reproduce_vision(
    name: FigureName, preset: Preset, place: Place, seed: int = 0, device: str = "cpu"
) -> tuple[dict[str, Any], list[Path]]:
    """Run what is missing of a figure and return its panels and tables, and the files written.

    Raises UserError as the stages do, and before anything starts where there are no images or these have no classes.
    """
    cfg = vision_config(name, preset, place.choices, seed, device)
    shop = Workshop(cfg, place.out / WORK, place.progress, place.say)
    for line in announce(cfg, len(shop.images), torchrun_hint=preset == "paper"):
        place.say(line)
    jobs = run_vision(shop)
    rows = [row for job in jobs for row in run_rows(cfg.plan.runs[job.number], job.path)]
    panels = figure4(rows) if name == "figure4" else figure5(rows)
    shown = tables(rows)
    out = place.out / name
    write_json(out / "rows.json", rows)
    write_text(out / "tables.md", markdown(shown))
    pictures = draw(name, panels, out)
    result = {
        "panels": [panel.to_dict() for panel in panels],
        "tables": shown,
        "backbones": {backbone.name: _probes(shop, backbone.name) for backbone in cfg.used()},
        "runs": [str(job.path) for job in jobs],
        "config": cfg.to_dict(),
    }
    return result, [out / "rows.json", out / "tables.md", *pictures]


def _probes(shop: Workshop, backbone: str) -> Any:
    """Return what a backbone's embeddings know of the classes: accuracies of probes, beside raw pixels'."""
    return read_manifest(shop.model(backbone), "pretrain", verify=False).info.get("probes")
