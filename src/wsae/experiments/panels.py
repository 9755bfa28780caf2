"""A figure's panel: what the paper claims, what was measured, and whether they agree. No torch here."""

from collections.abc import Sequence
from typing import Any, Literal

from wsae.core.config import Config
from wsae.experiments.sweep.table import Mean

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
        n=max(m.n for m in found.values()),
    )


def judged(differences: Sequence[Mean], lower_is_claimed: bool, negligible: float) -> Verdict:
    """Judge a claimed difference at several levels: it counts where its interval excludes 0 and it is not negligible.

    reproduced: it counts at every level, on the claimed side. partly: at some, and nowhere on the other side.
    opposite: it counts only on the other side. not reproduced: otherwise.
    """
    sign = -1.0 if lower_is_claimed else 1.0
    claimed = [_counts(d, sign, negligible) for d in differences]
    contrary = [_counts(d, -sign, negligible) for d in differences]
    if all(claimed):
        return "reproduced"
    if any(contrary) and not any(claimed):
        return "opposite"
    return "partly" if any(claimed) and not any(contrary) else "not reproduced"


def _counts(difference: Mean, sign: float, negligible: float) -> bool:
    near = difference.low if sign > 0 else difference.high
    near = difference.value if near is None else near
    return sign * near > 0 and abs(difference.value) > negligible
