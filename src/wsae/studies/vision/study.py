"""`wsae reproduce figure4|figure5`: from settings to panels, tables and pictures."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64

from wsae.acts.images.harvest import Gallery, harvest_images
from wsae.acts.images.sets import ImageSet, open_images
from wsae.acts.source import StoreSource
from wsae.core.artifact import read_manifest
from wsae.core.errors import UserError
from wsae.core.files import read_sealed, seal, write_json
from wsae.core.memory import duration, size
from wsae.evals.classes.run import score_run
from wsae.stats.classes import Hits, Strongest
from wsae.studies.engine import PaperStudy, Stage, StudyRun
from wsae.studies.results import Panel, Row
from wsae.studies.vision.config import Backbone, VisionConfig
from wsae.studies.vision.figures import draw, figure4, figure5, run_rows, tables
from wsae.train.config import TrainConfig
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


# What a figure is about to do, and roughly what it takes.

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
# Held-out images are for the last two stages alone: they do not enter pretraining, gamma, or the training of the SAEs.


@dataclass
class FigureStudy(PaperStudy[VisionConfig]):
    """The recipe of Figures 4 and 5, which share `out`."""

    torchrun_hint: bool = False

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

    def introduce(self) -> None:
        """Tell what will be done and roughly what it takes."""
        for line in announce(self.cfg, len(self.images), self.torchrun_hint):
            self.say(line)

    def prepare(self) -> None:
        """Pretrain every backbone that is not there, and harvest its embeddings."""
        cfg, images = self.cfg, self.images
        for backbone in cfg.used():
            place = self.model(backbone.name)
            if backbone.run is None:
                self.say(f"pretrain: {backbone.name}, {len(images)} images")
                settings = backbone.pretrain
                pretrain(settings, images, place, self.progress, resume=True, device=cfg.device)
            wanted = cfg.harvest(backbone.name, place)
            harvest_images(wanted, self.store(backbone.name), self.progress)

    def model(self, backbone: str) -> Path:
        """Return the directory of a backbone's pretraining run."""
        return self.cfg.backbone(backbone).run or self.out / "pretrain" / backbone

    def store(self, backbone: str) -> Path:
        """Return the directory of a backbone's embeddings."""
        return self.out / "store" / backbone

    def runs(self) -> list[StudyRun]:
        """Return the runs in the plan's order."""
        return [
            StudyRun(
                i,
                (run.hook,),
                self.out / "runs" / run.backbone / run.hook / f"seed-{run.seed}",
                f"{run.backbone}, {run.hook}, seed {run.seed}",
            )
            for i, run in enumerate(self.cfg.plan.runs)
        ]

    def source(self, run: StudyRun) -> StoreSource:
        """Return the activations of a run."""
        backbone = self.cfg.plan.runs[run.number].backbone
        return StoreSource(self.store(backbone), run.hooks, verify=False)

    def training(self, run: StudyRun) -> TrainConfig:
        """Return a run's training; the proxy `top` is computed once for each backbone and hook, from training rows."""
        planned, source = self.cfg.plan.runs[run.number], self.source(run)
        top = None
        if any(weighting.proxy == "top" for weighting in planned.weightings):
            place = run.path.parent / "top.json"
            top = top_consistency(source, self.labels, self.cfg.classes.n_top, place)
        return self.cfg.training(run.number, source.n_rows, top)

    def stages(self) -> list[Stage]:
        """Return training, evaluation and the scores by class."""

        def score(run: StudyRun) -> None:
            score_run(run.path, self.source(run), self.labels, self.cfg.classes, self.progress)

        return [
            self.trained(),
            self.evaluated(self.cfg.evaluation, lambda: Gallery(self.images)),
            Stage("score", score, lambda _: self.cfg.classes, "classes"),
        ]

    def rows(self, run: StudyRun) -> list[Row]:
        """Return the rows of one run."""
        return run_rows(self.cfg.plan.runs[run.number], run.path)

    def panels(self, rows: list[Row]) -> list[Panel]:
        """Return the figure's panels."""
        return figure4(rows) if self.cfg.plan.name == "figure4" else figure5(rows)

    def results(self, rows: list[Row]) -> dict[str, Any]:
        """Return panels, tables, and what probes of the embeddings know of the classes, beside raw pixels'."""
        models = {backbone.name: self.model(backbone.name) for backbone in self.cfg.used()}
        return {
            "panels": [panel.to_dict() for panel in self.panels(rows)],
            "tables": tables(rows),
            "backbones": {
                name: read_manifest(place, "pretrain", verify=False).info.get("probes")
                for name, place in models.items()
            },
        }

    def draw(self, rows: list[Row], out: Path) -> list[Path]:
        """Draw the panels."""
        return draw(self.cfg.plan.name, self.panels(rows), out)
