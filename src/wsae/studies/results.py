"""What rows say: means over seeds with Student intervals, paired differences, panels with verdicts. No torch here."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy import stats

from wsae.core.config import Config

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
