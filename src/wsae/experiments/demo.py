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
from wsae.core.artifact import MANIFEST, read_json, read_manifest
from wsae.core.errors import UserError
from wsae.core.progress import Progress, quiet
from wsae.evals.run import evaluate_run
from wsae.experiments.config import DemoConfig
from wsae.report.html import write_report
from wsae.train.run import train_run

Say = Callable[[str], None]


def plan(cfg: DemoConfig) -> str:
    """Return what the demo will do, and how long it takes, in words."""
    names = ", ".join(f"alpha {a:g}" for a in cfg.alpha)
    members = 1 + len(cfg.alpha)
    model = "SmolLM2-135M" if cfg.model == "builtin" else cfg.model
    text = "the public-domain text in this package" if cfg.text.path == "builtin" else cfg.text.path
    return "\n".join(
        [
            "This demo",
            f"  1. runs {model} on {text} and keeps {cfg.tokens:,} activations of {cfg.hook}",
            f"  2. trains {members} SAEs on them, on the same batches: the plain one and WSAE with {names}",
            f"  3. measures all on {cfg.heldout_tokens:,} held-out activations, with intervals",
            "  4. writes report.html, one file to open in a browser",
            "It needs no network. With the default settings: about 7 minutes on two cores, 3 GB of memory,",
            "1 GB of disk. Ctrl-C is safe at any time; the same command goes on from there.",
        ]
    )


def run_demo(
    cfg: DemoConfig, out: Path, progress: Progress = quiet, say: Say = lambda _: None
) -> dict[str, Any]:
    """Run every stage into `out` and return the evaluation with the report's place.

    Raises UserError as the stages do, and when the model is the built-in one and several hooks match.
    """
    say(plan(cfg))
    store = harvest(cfg.harvest(), out / "store", progress)
    if len(store.hooks) != 1:
        raise UserError(f"hook {cfg.hook} matches {len(store.hooks)} modules; the demo takes one")
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
    done = run / "evaluation"
    if (done / MANIFEST).exists():
        manifest = read_manifest(done, "evaluation")
        if manifest.config == settings.to_dict():
            return read_json(done / "evaluation.json")
    language = load_language(cfg.model, cfg.dtype, cfg.device) if cfg.splice_tokens else None
    return evaluate_run(run, source, settings, language, progress)
