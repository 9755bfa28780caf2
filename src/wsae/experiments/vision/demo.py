"""The vision demo, end to end: handwritten digits in, a WSAE-against-SAE comparison with contact sheets out.

Each stage reads the directory before and writes its own; a stage already done is skipped, so an interrupted demo
goes on where it stopped.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from wsae.acts.images.config import ImageHarvestConfig, ImagesConfig
from wsae.acts.images.harvest import Gallery, harvest_images
from wsae.acts.images.sets import open_images
from wsae.acts.source import StoreSource
from wsae.core.progress import Progress, quiet
from wsae.evals.classes.config import ClassesConfig
from wsae.evals.classes.run import labels_of, score_run
from wsae.evals.config import EvalConfig
from wsae.evals.run import evaluate_run
from wsae.experiments.vision.config import FigureSAEs, Weighting
from wsae.report.html import write_report
from wsae.run import CLASSES_PART, EVALUATION_PART, Run
from wsae.train.config import TrainConfig
from wsae.train.run import train_run
from wsae.vision.config import PretrainConfig, preset
from wsae.vision.run import pretrain

IMAGES = ImagesConfig(path="digits")
SAE = FigureSAEs(d_sae=256, k=8, lr=3e-3, passes=60, batch_size=128)
WEIGHTINGS = (Weighting(), Weighting(proxy="consistency"), Weighting(proxy="variance"))
EVALUATION_CONFIG = EvalConfig(splice_tokens=0, n_latents=60, n_contexts=8)
CLASSES_CONFIG = ClassesConfig(n_top=10, min_support=10, groups=10)

PLAN = """\
This demo compares reweighted SAEs (WSAE) with their plain twin on images, scikit-learn's 1,797 handwritten digits:
  1. pretrain  a small ResNet-18 by non-negative contrastive learning, without the digits' classes
  2. harvest   its embeddings, a fifth of the images held out
  3. train     the plain SAE and WSAEs weighted by semantic consistency and by variance, on the same batches
  4. evaluate  all of them on the held-out images, their latents against the classes too
  5. report    one HTML file with the images each latent fires on
On two cores about two minutes; no network.
Ctrl-C is safe: the same command goes on from where it stopped."""


def pretraining(seed: int) -> PretrainConfig:
    """Return the demo's pretraining: the preset tiny, wider and longer."""
    return preset("tiny", images=IMAGES, widths=(32, 32, 64, 128), epochs=40, seed=seed)


def run_vision_demo(
    out: Path,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = quiet,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Run every stage into `out` and return the evaluation with the report's place; UserError as the stages do."""
    say(PLAN)
    images, cfg = open_images(IMAGES), pretraining(seed)
    pretrained = pretrain(cfg, images, out / "pretrain", progress, resume=True, device=device)
    harvest = ImageHarvestConfig(
        model=str(pretrained.path),
        images=IMAGES,
        heldout_fraction=cfg.heldout_fraction,
        seed=seed,
        device=device,
    )
    source = StoreSource(harvest_images(harvest, out / "store", progress).path, verify=False)
    training = {
        "members": tuple(SAE.member(weighting, None) for weighting in WEIGHTINGS),
        "tokens": source.n_rows * SAE.passes,
        "batch_size": SAE.batch_size,
        "seed": seed,
    }
    train = TrainConfig.parse(training, where="vision demo")
    run = train_run(train, source, out / "run", progress, resume=True, device=device).path
    evaluation = EVALUATION_CONFIG.model_copy(update={"seed": seed})
    there = Run(run)
    if there.made_with(EVALUATION_PART, evaluation.to_dict()):
        found = there.evaluation_record
    else:
        found = evaluate_run(run, source, evaluation, Gallery(images), progress)
    labels, classes = labels_of(source), CLASSES_CONFIG.model_copy(update={"seed": seed})
    assert labels is not None, "the digits have classes"
    if there.made_with(CLASSES_PART, classes.to_dict()):
        scored = there.class_record
    else:
        scored = score_run(run, source, labels, classes, progress)
    report = write_report(run, out / "report.html")
    places = {"report": str(report), "run": str(run), "store": str(source.store.path)}
    return {**places, "probes": pretrained.info["probes"], **found, "classes": scored}
