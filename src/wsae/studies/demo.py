"""The main job, end to end: a language model (or images) in, a comparison of WSAEs with their plain twin out.

Each stage reads the directory before and writes its own; a stage already done is skipped, so an interrupted demo
goes on where it stopped.
"""

from pathlib import Path
from typing import Any

from wsae.acts.config import ImagesConfig
from wsae.acts.harvest import harvest
from wsae.acts.language import language_for
from wsae.acts.source import StoreSource
from wsae.core.artifact import read_manifest
from wsae.core.progress import Progress, quiet
from wsae.evals.config import ClassesConfig, EvalConfig
from wsae.report.html import write_report
from wsae.run import Run
from wsae.studies.demo_config import DemoConfig
from wsae.studies.engine import Say, Stage, Study, StudyRun
from wsae.studies.reproduce_config import (
    Backbone,
    BackboneRun,
    FigurePlan,
    FigureSAEs,
    VisionConfig,
    Weighting,
)
from wsae.train.config import TrainConfig
from wsae.vision.config import PretrainConfig, preset

SAFE = "Ctrl-C is safe: the same command goes on from where it stopped."


def run_demo(
    cfg: DemoConfig, out: Path, progress: Progress = quiet, say: Say = lambda _: None
) -> dict[str, Any]:
    """Run the demo on text into `out` and return the evaluation with the report's place; UserError as the stages do."""
    say(plan(cfg))
    study = TextDemo(cfg, out, progress, say, cfg.device)
    return reported(study, out) | Run(out / "run").evaluation_record


def reported(study: Study[Any], out: Path) -> dict[str, Any]:
    """Run the one run's stages and return where its report lies, and what it was made from."""
    (run,) = study.run()
    report = write_report(run.path, out / "report.html")
    return {"report": str(report), "run": str(run.path), "store": str(out / "store")}


class TextDemo(Study[DemoConfig]):
    """A language model's activations on one hook: harvest, train, evaluate."""

    def prepare(self) -> None:
        """Harvest, which checks a store that is there."""
        harvest(self.cfg.harvest(), self.out / "store", self.progress)

    def runs(self) -> list[StudyRun]:
        """Return the one run."""
        return [StudyRun(0, (self.cfg.hook,), self.out / "run")]

    def source(self, run: StudyRun) -> StoreSource:  # noqa: ARG002
        """Return the store."""
        return StoreSource(self.out / "store", verify=False)

    def training(self, run: StudyRun) -> TrainConfig:
        """Return the training over all stored rows."""
        return self.cfg.training(self.source(run).n_rows)

    def stages(self) -> list[Stage]:
        """Return training and evaluation, for which the model is loaded where it is needed."""
        cfg = self.cfg

        def language():
            return language_for(cfg.harvest()) if cfg.splice_tokens else None

        return [self.trained(), self.evaluated(cfg.evaluation(), language)]


def plan(cfg: DemoConfig) -> str:
    """Return what the demo on text will do, and how long it takes, in words."""
    own_model, own_text = cfg.model != "builtin", cfg.text.path != "builtin"
    model = cfg.model if own_model else "SmolLM2-135M"
    text = cfg.text.path if own_text else "the public-domain text in this package"
    weighted = " and ".join(f"alpha {a:g}" for a in cfg.alpha)
    time = "Each step shows its time left; `wsae doctor` estimates it all beforehand."
    if cfg == DemoConfig(seed=cfg.seed, device=cfg.device):
        time = "On two cores about 7 minutes, 3 GB of memory and 1 GB of disk; no network."
    return f"""\
This demo compares reweighted SAEs (WSAE) with their plain twin on {model}, {cfg.hook}:
  1. harvest   {cfg.tokens:,} activations from {text}, {cfg.heldout_tokens:,} more held out
  2. train     the plain SAE and WSAE with {weighted}, on the same batches, {cfg.passes} passes
  3. evaluate  all of them on the held-out text, with intervals
  4. report    one HTML file that opens from disk
{time}
{SAFE}"""


# The same on images: handwritten digits in, contact sheets out.

NCL = "ncl"
DIGITS = ImagesConfig(path="digits")
DIGIT_SAES = FigureSAEs(d_sae=256, k=8, lr=3e-3, passes=60, batch_size=128)
WEIGHTINGS = (Weighting(), Weighting(proxy="consistency"), Weighting(proxy="variance"))
IMAGE_PLAN = """\
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
    return preset("tiny", images=DIGITS, widths=(32, 32, 64, 128), epochs=40, seed=seed)


def image_config(seed: int, device: str) -> VisionConfig:
    """Return Figure 4 made small: one backbone, hook and seed."""
    run = BackboneRun(backbone=NCL, hook="pooler", seed=seed, weightings=WEIGHTINGS)
    return VisionConfig(
        images=DIGITS,
        backbones=(Backbone(name=NCL, pretrain=pretraining(seed)),),
        plan=FigurePlan(name="figure4", sae=DIGIT_SAES, runs=(run,)),
        classes=ClassesConfig(n_top=10, min_support=10, groups=10, seed=seed),
        evaluation=EvalConfig(splice_tokens=0, n_latents=60, n_contexts=8, seed=seed),
        device=device,
    )


def run_vision_demo(
    out: Path,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = quiet,
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """Run every stage into `out` and return the evaluation with the report's place; UserError as the stages do."""
    from wsae.studies.vision import ImageDemo  # brings kornia

    say(IMAGE_PLAN + SAFE)
    study = ImageDemo(image_config(seed, device), out, progress, lambda _: None, device)
    places, run = reported(study, out), Run(out / "run")
    probes = read_manifest(study.model(NCL), "pretrain", verify=False).info["probes"]
    return {**places, "probes": probes, **run.evaluation_record, "classes": run.class_record}
