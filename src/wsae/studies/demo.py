"""The main job, end to end: a language model in, a comparison of WSAEs with their plain twin out.

Each stage reads the directory before and writes its own; a stage already done is skipped, so an interrupted demo
goes on where it stopped.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from wsae.acts.harvest import harvest
from wsae.acts.language import language_for
from wsae.acts.source import StoreSource
from wsae.core.progress import Progress, quiet
from wsae.report.html import write_report
from wsae.run import Run
from wsae.studies.config import DemoConfig
from wsae.studies.engine import Stage, Study, StudyRun
from wsae.train.config import TrainConfig

Say = Callable[[str], None]
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
