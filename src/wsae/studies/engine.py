"""One engine for every study: resumable stages over its runs, then rows, and what rows say.

A stage reads directories and writes one with a manifest; a finished stage is not run again, and a killed one goes on.
A recipe (a subclass of `Study`) states its settings, its runs and its stages; one of the paper's (of `PaperStudy`) also
what becomes of the rows: means over seeds with Student intervals, paired differences, panels with verdicts.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np
from scipy import stats

from wsae.acts.stream import ActivationSource, Language, Pictures
from wsae.core.artifact import MANIFEST, read_manifest
from wsae.core.config import Config
from wsae.core.files import write_json, write_text
from wsae.core.progress import Progress, quiet
from wsae.evals.config import EvalConfig
from wsae.evals.run import evaluate_run
from wsae.studies.sweep_config import Preset
from wsae.train.config import TrainConfig
from wsae.train.run import train_run

# What rows say.

Row = dict[str, Any]
"""One SAE or control with its labels and scores, ready for JSON."""
Table = dict[str, Any]
"""A header and rows of text."""
NONE = "-"
"""Stands for what was not measured."""


class Mean(NamedTuple):
    """Mean over seeds with its 95 % interval (Student's t); no interval for one seed."""

    value: float
    low: float | None
    high: float | None
    n: int

    @property
    def sure(self) -> bool:
        """Return whether the interval leaves out 0."""
        return self.low is not None and self.high is not None and self.low * self.high > 0


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Mean:
    """Return the mean of independent values with its interval: mean -+ t_(n-1) s / sqrt(n)."""
    x = np.asarray(values, dtype=np.float64)
    centre = float(x.mean())
    if len(x) < 2:
        return Mean(centre, None, None, len(x))
    half = float(stats.t.ppf((1 + confidence) / 2, len(x) - 1) * x.std(ddof=1) / len(x) ** 0.5)
    return Mean(centre, centre - half, centre + half, len(x))


def select(rows: Iterable[Row], **labels: Any) -> list[Row]:
    """Return the rows with these labels."""
    return [row for row in rows if all(row.get(key) == value for key, value in labels.items())]


def series(rows: Sequence[Row], method: str, score: str, over: str = "sparsity") -> dict[Any, Mean]:
    """Return level -> mean of a score over the seeds of one method, levels in the rows' order."""
    grouped: dict[Any, list[float]] = {}
    for row in select(rows, method=method):
        grouped.setdefault(row[over], []).append(row[score])
    return {level: mean_interval(values) for level, values in grouped.items()}


def differences(
    rows: Sequence[Row],
    method: str,
    against: str,
    score: str,
    over: str = "sparsity",
    confidence: float = 0.95,
) -> dict[Any, Mean]:
    """Return level -> mean over seeds of (method - against), paired by world and seed."""
    keys = ("world", over, "seed")
    base = {tuple(row.get(k) for k in keys): row[score] for row in select(rows, method=against)}
    grouped: dict[Any, list[float]] = {}
    for row in select(rows, method=method):
        pair = base[tuple(row.get(k) for k in keys)]
        grouped.setdefault(row[over], []).append(row[score] - pair)
    return {level: mean_interval(values, confidence) for level, values in grouped.items()}


PART = ("difference", "low", "high", "n")


def compared(
    lines: Iterable[Row], member: str, ways: Sequence[str], keys: Sequence[str] = PART
) -> dict[str, dict[str, Row]]:
    """Return score -> way -> the member minus another, of a run's comparisons."""
    out: dict[str, dict[str, Row]] = {}
    for line in lines:
        if line["a"] == member and line.get("over") in ways:
            out.setdefault(line["metric"], {})[line["over"]] = {key: line[key] for key in keys}
    return out


def pooled(found: Sequence[Row | None]) -> Mean | None:
    """Return the mean difference over seeds with Student's interval; one seed keeps its own interval.

    None where some seed has no difference.
    """
    parts = [part for part in found if part and part["difference"] is not None]
    if not parts or len(parts) < len(found):
        return None
    if len(parts) == 1:
        return Mean(parts[0]["difference"], parts[0]["low"], parts[0]["high"], 1)
    return mean_interval([part["difference"] for part in parts])


def rank_correlation(levels: Sequence[float], values: Sequence[float]) -> float:
    """Return Spearman's rho between levels and values: -1 when strictly falling, 0 when constant."""
    ranks = [stats.rankdata(np.asarray(x)) for x in (levels, values)]
    if min(float(np.ptp(r)) for r in ranks) == 0:
        return 0.0
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def steps_down(values: Sequence[float]) -> int:
    """Return how many of the len - 1 steps go down."""
    return int((np.diff(np.asarray(values)) < 0).sum())


def span(mean: Mean, scale: float, form: str) -> str:
    """Return " [low, high]", or nothing without an interval."""
    if mean.low is None or mean.high is None:
        return ""
    return f" [{scale * mean.low:{form}}, {scale * mean.high:{form}}]"


def cell(mean: Mean | None, scale: float = 1.0, form: str = ".1f") -> str:
    """Return "value [low, high]" for a table."""
    return NONE if mean is None else f"{scale * mean.value:{form}}{span(mean, scale, form)}"


Verdict = Literal["reproduced", "partly", "not reproduced", "opposite"]


class Series(Config):
    """One line of a panel: a mean and its interval at every level."""

    method: str
    levels: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float | None, ...]
    high: tuple[float | None, ...]
    n: int
    """Seeds behind each mean."""


class Panel(Config):
    """One panel with its verdict."""

    panel: str
    score: str
    """Key of the recovery glossary, or a difference of one."""
    paper: str
    """The paper's statement; its figures carry no numbers."""
    ours: str
    """What was measured, in one line."""
    verdict: Verdict
    series: tuple[Series, ...]


def as_series(method: str, found: dict[Any, Mean]) -> Series:
    """Return a mean per level as one line of a panel."""
    return Series(
        method=method,
        levels=tuple(float(level) for level in found),
        mean=tuple(m.value for m in found.values()),
        low=tuple(m.low for m in found.values()),
        high=tuple(m.high for m in found.values()),
        n=max((m.n for m in found.values()), default=0),
    )


def judged(differences: Sequence[Mean], lower_is_claimed: bool, negligible: float) -> Verdict:
    """Judge a claimed difference at several levels: it counts where its interval excludes 0 and it is not negligible.

    reproduced: it counts at every level, on the claimed side. partly: at some, and nowhere on the other side.
    opposite: it counts only on the other side. not reproduced: otherwise.
    """
    sign = -1.0 if lower_is_claimed else 1.0

    def counts(difference: Mean, sign: float) -> bool:
        near = difference.low if sign > 0 else difference.high
        near = difference.value if near is None else near
        return sign * near > 0 and abs(difference.value) > negligible

    claimed = [counts(d, sign) for d in differences]
    contrary = any(counts(d, -sign) for d in differences)
    if all(claimed):
        return "reproduced"
    if any(claimed):
        return "not reproduced" if contrary else "partly"
    return "opposite" if contrary else "not reproduced"


def comparable(ratio: float) -> Verdict:
    """Judge a claim that two errors are comparable by their relative difference."""
    return "reproduced" if ratio < 0.1 else "partly" if ratio < 0.5 else "not reproduced"


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
    inputs: Callable[[StudyRun], dict[str, str]] = lambda _: {}
    """What it is made from beside the run, as its manifest has it."""

    def finished(self, run: StudyRun) -> bool:
        """Return whether the stage is there, made so from the run and the data that are there now."""
        place = run.path if self.kind == "run" else run.path / self.kind
        if not (run.path / MANIFEST).exists() or not (place / MANIFEST).exists():
            return False
        made = read_manifest(place, self.kind, verify=False)
        config, inputs = made.config, self.inputs(run)
        if self.kind == "run":
            config = config["train"]
        else:
            inputs = {"run": read_manifest(run.path, "run", verify=False).digest(), **inputs}
        same = config == self.settings(run).to_dict() and inputs.items() <= made.inputs.items()
        return same and not made.info.get("unfinished")


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

        def data(run: StudyRun) -> dict[str, str]:
            return {"data": self.source(run).digest()}

        return Stage("train", train, self.training, "run", data)

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
    done = {"runs": [str(run.path) for run in runs], "config": study.cfg.to_dict()}
    if not study.stages():  # what all runs read was asked for alone
        return done, []
    rows = [row for run in runs for row in study.rows(run)]
    results = study.results(rows)
    write_json(out / ROWS, rows)
    write_text(out / TABLES, markdown(results["tables"]))
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
