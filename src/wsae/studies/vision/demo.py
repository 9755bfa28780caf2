"""The vision demo, end to end: handwritten digits in, a WSAE-against-SAE comparison with contact sheets out."""

from pathlib import Path
from typing import Any

from wsae.acts.config import ImagesConfig
from wsae.core.artifact import read_manifest
from wsae.core.progress import Progress, quiet
from wsae.evals.config import ClassesConfig, EvalConfig
from wsae.run import Run
from wsae.studies.demo import SAFE, Say, reported
from wsae.studies.engine import StudyRun
from wsae.studies.vision.config import (
    Backbone,
    BackboneRun,
    FigurePlan,
    FigureSAEs,
    VisionConfig,
    Weighting,
)
from wsae.studies.vision.study import FigureStudy
from wsae.vision.config import PretrainConfig, preset

NCL = "ncl"
IMAGES = ImagesConfig(path="digits")
SAE = FigureSAEs(d_sae=256, k=8, lr=3e-3, passes=60, batch_size=128)
WEIGHTINGS = (Weighting(), Weighting(proxy="consistency"), Weighting(proxy="variance"))
PLAN = """\
This demo compares reweighted SAEs (WSAE) with their plain twin on images, scikit-learn's 1,797 handwritten digits:
  1. pretrain  a small ResNet-18 by non-negative contrastive learning, without the digits' classes
  2. harvest   its embeddings, a fifth of the images held out
  3. train     the plain SAE and WSAEs weighted by semantic consistency and by variance, on the same batches
  4. evaluate  all of them on the held-out images, their latents against the classes too
  5. report    one HTML file with the images each latent fires on
On two cores about two minutes; no network.
"""


def pretraining(seed: int) -> PretrainConfig:
    """Return the demo's pretraining: the preset tiny, wider and longer."""
    return preset("tiny", images=IMAGES, widths=(32, 32, 64, 128), epochs=40, seed=seed)


def demo_config(seed: int, device: str) -> VisionConfig:
    """Return Figure 4 made small: one backbone, hook and seed."""
    run = BackboneRun(backbone=NCL, hook="pooler", seed=seed, weightings=WEIGHTINGS)
    return VisionConfig(
        images=IMAGES,
        backbones=(Backbone(name=NCL, pretrain=pretraining(seed)),),
        plan=FigurePlan(name="figure4", sae=SAE, runs=(run,)),
        classes=ClassesConfig(n_top=10, min_support=10, groups=10, seed=seed),
        evaluation=EvalConfig(splice_tokens=0, n_latents=60, n_contexts=8, seed=seed),
        device=device,
    )


class ImageDemo(FigureStudy):
    """A figure's study of one run, each stage in a directory of the demo's own."""

    def model(self, backbone: str) -> Path:  # noqa: ARG002
        """Return the directory of the pretraining."""
        return self.out / "pretrain"

    def store(self, backbone: str) -> Path:  # noqa: ARG002
        """Return the directory of the embeddings."""
        return self.out / "store"

    def runs(self) -> list[StudyRun]:
        """Return the one run."""
        return [StudyRun(0, ("pooler",), self.out / "run")]


def run_vision_demo(
    out: Path,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = quiet,
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """Run every stage into `out` and return the evaluation with the report's place; UserError as the stages do."""
    say(PLAN + SAFE)
    study = ImageDemo(demo_config(seed, device), out, progress, lambda _: None, device)
    places, run = reported(study, out), Run(out / "run")
    probes = read_manifest(study.model(NCL), "pretrain", verify=False).info["probes"]
    return {**places, "probes": probes, **run.evaluation_record, "classes": run.class_record}
