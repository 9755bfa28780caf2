"""The main job, end to end: a language model in, a WSAE-against-SAE comparison out.

Each stage reads the directory before and writes its own; a stage already done is skipped, so an interrupted demo
goes on where it stopped.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from wsae.acts.harvest import harvest
from wsae.acts.language import load_language
from wsae.acts.source import StoreSource
from wsae.core.progress import Progress, quiet
from wsae.evals.run import evaluate_run
from wsae.experiments.config import DemoConfig
from wsae.report.html import write_report
from wsae.run import EVALUATION_PART, Run
from wsae.train.run import train_run

Say = Callable[[str], None]


def plan(cfg: DemoConfig) -> str:
    """Return what the demo will do, and how long it takes, in words."""
    own_model, own_text = cfg.model != "builtin", cfg.text.path != "builtin"
    model = cfg.model if own_model else "SmolLM2-135M"
    text = cfg.text.path if own_text else "the public-domain text in this package"
    weighted = " and ".join(f"alpha {a:g}" for a in cfg.alpha)
    lines = [
        f"This demo compares reweighted SAEs (WSAE) with their plain twin on {model}, {cfg.hook}:",
        f"  1. harvest   {cfg.tokens:,} activations from {text}, {cfg.heldout_tokens:,} more held out",
        f"  2. train     the plain SAE and WSAE with {weighted}, on the same batches, {cfg.passes} passes",
        "  3. evaluate  all of them on the held-out text, with intervals",
        "  4. report    one HTML file that opens from disk",
    ]
    if cfg == DemoConfig(seed=cfg.seed, device=cfg.device):
        lines.append("On two cores about 7 minutes, 3 GB of memory and 1 GB of disk; no network.")
    else:
        lines.append("Each step shows its time left; `wsae doctor` estimates it all beforehand.")
    return "\n".join([*lines, "Ctrl-C is safe: the same command goes on from where it stopped."])


def run_demo(
    cfg: DemoConfig, out: Path, progress: Progress = quiet, say: Say = lambda _: None
) -> dict[str, Any]:
    """Run every stage into `out` and return the evaluation with the report's place.

    Raises UserError as the stages do.
    """
    say(plan(cfg))
    store = harvest(cfg.harvest(), out / "store", progress)
    source = StoreSource(store.path, verify=False)  # the harvest has just checked or written it
    training = cfg.training(source.n_rows)
    run = train_run(training, source, out / "run", progress, resume=True, device=cfg.device).path
    evaluation = _evaluate(cfg, run, source, progress)
    report = write_report(run, out / "report.html")
    return {"report": str(report), "run": str(run), "store": str(store.path), **evaluation}


def _evaluate(
    cfg: DemoConfig, run: Path, source: StoreSource, progress: Progress
) -> dict[str, Any]:
    """Return the run's evaluation, made now unless the same one is there."""
    settings = cfg.evaluation()
    there = Run(run)
    if there.made_with(EVALUATION_PART, settings.to_dict()):
        return there.evaluation_record
    language = load_language(cfg.model, cfg.dtype, cfg.device) if cfg.splice_tokens else None
    return evaluate_run(run, source, settings, language, progress)
