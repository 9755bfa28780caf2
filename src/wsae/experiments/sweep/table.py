"""Means over seeds with Student intervals, and paired differences between methods."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from wsae.experiments.sweep.run import Row


class Mean(NamedTuple):
    """Mean over seeds with its 95 % interval (Student's t); no interval for one seed."""

    value: float
    low: float | None
    high: float | None
    n: int


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
    rows: Sequence[Row], method: str, against: str, score: str, over: str = "sparsity"
) -> dict[Any, Mean]:
    """Return level -> mean over seeds of (method - against), paired by world and seed."""
    keys = ("world", over, "seed")
    base = {tuple(row.get(k) for k in keys): row[score] for row in select(rows, method=against)}
    grouped: dict[Any, list[float]] = {}
    for row in select(rows, method=method):
        pair = base[tuple(row.get(k) for k in keys)]
        grouped.setdefault(row[over], []).append(row[score] - pair)
    return {level: mean_interval(values) for level, values in grouped.items()}


def rank_correlation(levels: Sequence[float], values: Sequence[float]) -> float:
    """Return Spearman's rho between levels and values: -1 when strictly falling, 0 when constant."""
    ranks = [stats.rankdata(np.asarray(x)) for x in (levels, values)]
    if min(float(np.ptp(r)) for r in ranks) == 0:
        return 0.0
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def steps_down(values: Sequence[float]) -> int:
    """Return how many of the len - 1 steps go down."""
    return int((np.diff(np.asarray(values)) < 0).sum())
