"""One engine for every study: resumable stages over its runs, then rows, tables and pictures.

A stage reads directories and writes one with a manifest; a finished stage is not run again, and a killed one goes on.
A recipe (a subclass of `Study`) states its settings, its runs and its stages; one of the paper's (of `PaperStudy`) also
what becomes of the rows.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from wsae.acts.stream import ActivationSource, Language, Pictures
from wsae.core.artifact import MANIFEST, read_manifest
from wsae.core.config import Config
from wsae.core.files import write_json, write_text
from wsae.core.progress import Progress, quiet
from wsae.evals.config import EvalConfig
from wsae.evals.run import evaluate_run
from wsae.studies.results import Row, Table
from wsae.studies.sweep_config import Preset
from wsae.train.config import TrainConfig
from wsae.train.run import train_run

Say = Callable[[str], None]
Settings = TypeVar("Settings", bound=Config)

ROWS, TABLES = "rows.json", "tables.md"


@dataclass(frozen=True)
class Reproduction:
    """How large a reproduction is, where it lives, and whom it tells how far it is."""

    preset: Preset
    out: Path
    seed: int = 0
    device: str = "cpu"
    progress: Progress = quiet
    say: Say = lambda _: None


@dataclass(frozen=True)
class StudyRun:
    """One training run: its number in the plan, its hooks, its directory and what the user reads of it, if anything."""

    number: int
    hooks: tuple[str, ...]
    path: Path
    label: str = ""


@dataclass(frozen=True)
class Stage:
    """One stage of every run: what it does, with which settings, and which directory of the run it writes."""

    name: str
    work: Callable[[StudyRun], None]
    settings: Callable[[StudyRun], Config]
    kind: str
    """The kind of the directory, which is its name too; "run" is the run's directory itself."""

    def finished(self, run: StudyRun) -> bool:
        """Return whether the stage is there, made with these settings from the run that is there now."""
        if not (run.path / MANIFEST).exists():
            return False
        trained = read_manifest(run.path, "run", verify=False)
        if self.kind == "run":
            return trained.config["train"] == self.settings(run).to_dict()
        place = run.path / self.kind
        if not (place / MANIFEST).exists():
            return False
        made = read_manifest(place, self.kind, verify=False)
        same = made.config == self.settings(run).to_dict()
        return same and made.inputs["run"] == trained.digest() and not made.info.get("unfinished")


@dataclass
class Study(ABC, Generic[Settings]):
    """Runs and their stages, as settings and a place; subclasses are the recipes."""

    cfg: Settings
    out: Path
    """Directory of the runs and of what they read."""
    progress: Progress = quiet
    say: Say = lambda _: None
    device: str = "cpu"

    @abstractmethod
    def prepare(self) -> None:
        """Make what all runs read: models and stored activations."""

    @abstractmethod
    def runs(self) -> list[StudyRun]:
        """Return the runs in the plan's order."""

    @abstractmethod
    def source(self, run: StudyRun) -> ActivationSource:
        """Return the activations of a run's hooks."""

    @abstractmethod
    def training(self, run: StudyRun) -> TrainConfig:
        """Return a run's training."""

    @abstractmethod
    def stages(self) -> Sequence[Stage]:
        """Return the stages in order, the first `trained`."""

    def trained(self) -> Stage:
        """Return the stage that trains a run."""

        def train(run: StudyRun) -> None:
            cfg, source = self.training(run), self.source(run)
            train_run(cfg, source, run.path, self.progress, resume=True, device=self.device)

        return Stage("train", train, self.training, "run")

    def evaluated(self, cfg: EvalConfig, behind: Callable[[], Language | Pictures | None]) -> Stage:
        """Return the stage that evaluates a run; `behind` gives the model or the images behind the activations."""

        def evaluate(run: StudyRun) -> None:
            evaluate_run(run.path, self.source(run), cfg, behind(), self.progress)

        return Stage("evaluate", evaluate, lambda _: cfg, "evaluation")

    def run(self) -> list[StudyRun]:
        """Run every stage that is not finished and return the runs, in the plan's order.

        Raises UserError as the stages do, and KeyboardInterrupt after what is written is whole.
        """
        self.prepare()
        runs = self.runs()
        for stage in self.stages():
            for place, run in enumerate(runs, start=1):
                if not stage.finished(run):
                    if run.label:
                        self.say(f"{stage.name} {place} of {len(runs)}: {run.label}")
                    stage.work(run)
        return runs


class PaperStudy(Study[Settings]):
    """A study of the paper: what its runs' rows say."""

    @abstractmethod
    def introduce(self) -> None:
        """Tell what will be done and what it takes; raises UserError where it cannot work."""

    @abstractmethod
    def rows(self, run: StudyRun) -> list[Row]:
        """Return the rows of a finished run."""

    @abstractmethod
    def results(self, rows: list[Row]) -> dict[str, Any]:
        """Return what the rows say; its `tables` are written as Markdown too."""

    @abstractmethod
    def draw(self, rows: list[Row], out: Path) -> list[Path]:
        """Draw the rows into `out` and return the pictures' paths."""


def reproduce_study(study: PaperStudy[Any], out: Path) -> tuple[dict[str, Any], list[Path]]:
    """Run what is missing of a study and return its results and the files written to `out`.

    Raises UserError as the stages do, and, before anything starts, where the study cannot work here.
    """
    study.introduce()
    runs = study.run()
    rows = [row for run in runs for row in study.rows(run)]
    results = study.results(rows)
    write_json(out / ROWS, rows)
    write_text(out / TABLES, markdown(results["tables"]))
    done = {"runs": [str(run.path) for run in runs], "config": study.cfg.to_dict()}
    return {**results, **done}, [out / ROWS, out / TABLES, *study.draw(rows, out)]


def markdown(titled: dict[str, Table]) -> str:
    """Return tables as Markdown."""
    parts = []
    for title, table in titled.items():
        lines = [table["header"], ["---"] * len(table["header"]), *table["rows"]]
        body = "\n".join(
            f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in lines
        )
        parts.append(f"**{title}**\n\n{body}\n")
    return "\n".join(parts)
