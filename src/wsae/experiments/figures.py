"""Figures 2 and 3 of the paper: one sweep over toy models, panels with verdicts (Section 5.1, Appendix B.3).

The paper prints curves, no numbers, so what is compared is its statements.
"""

from collections.abc import Sequence
from typing import Any, Literal

from wsae.core.config import Config
from wsae.experiments.sweep.config import PLAIN, SCALED, UNIT, WSAE
from wsae.experiments.sweep.run import CLOSED_FORM, RANDOM, Row
from wsae.experiments.sweep.table import (
    Mean,
    differences,
    mean_interval,
    rank_correlation,
    series,
    steps_down,
)

# A figure's panel: what the paper claims, what was measured, and whether they agree. No torch here.

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


LOW = 0.5
"""Sparsity levels up to this are the paper's "relatively low"."""
NEGLIGIBLE = 0.01
"""A relative difference under 1 % is not called an effect, however sure it is."""

ACTIVATED = {
    "activated_sum": "summed response above 1 (Appendix B.3)",
    "activated_mean": "mean response above 0.05",
    "activated_relative": "mean response above a tenth of the strongest",
    "activated_participation": "participation ratio (no threshold)",
}


def figure2(rows: Sequence[Row]) -> list[Panel]:
    """Return Figure 2, average activated features against S, in four readings of "activated".

    The paper states no threshold. The random SAE beside it shows what a score does without any training.
    """
    shown = [name for name in (PLAIN, WSAE, RANDOM, CLOSED_FORM) if any_of(rows, name)]
    return [_figure2_panel(rows, score, words, shown) for score, words in ACTIVATED.items()]


def _figure2_panel(rows: Sequence[Row], score: str, words: str, shown: list[str]) -> Panel:
    lines = [as_series(name, series(rows, name, score)) for name in shown]
    plain, random = lines[0], next(line for line in lines if line.method == RANDOM)
    rho = rank_correlation(plain.levels, plain.mean)
    control = rank_correlation(random.levels, random.mean)
    down, steps = steps_down(plain.mean), len(plain.mean) - 1
    falls = down == steps
    lowest = min(range(steps + 1), key=lambda i: plain.mean[i])
    ours = (
        f"{plain.mean[0]:.3g} at S = {plain.levels[0]:g}, lowest {plain.mean[lowest]:.3g} at {plain.levels[lowest]:g}, "
        f"{plain.mean[-1]:.3g} at {plain.levels[-1]:g}; "
        f"falls in {down} of {steps} steps (Spearman {rho:+.2f}); untrained SAE {control:+.2f}"
    )
    verdict = "reproduced" if falls else "partly" if rho < -0.8 else "not reproduced"
    verdict = "opposite" if rho > 0.8 else verdict
    return Panel(
        panel=f"2: {words}",
        score=score,
        paper="a clear decrease with S",
        ours=ours,
        verdict=verdict,
        series=tuple(lines),
    )


_PANELS = (
    ("3a", "gt_{}", "WSAE lower when S is low", True),
    ("3b", "gt_{}_active", "on non-zero features: WSAE lower when S is low, by more", True),
    ("3c", "sae_loss", "SAE and WSAE comparable", None),
    ("3d", "latent_variance_mean", "WSAE higher when S is low", False),
)


def figure3(rows: Sequence[Row], loss: str = "raw") -> list[Panel]:
    """Return Figure 3's panels; `loss` reads L_GT as "raw" (Eq. 10 as written), "matched" or "scaled"."""
    return [
        figure3_panel(rows, name, score.format(loss), paper, lower)
        for name, score, paper, lower in _PANELS
    ]


def figure3_panel(
    rows: Sequence[Row], name: str, score: str, paper: str, lower: bool | None, method: str = WSAE
) -> Panel:
    """Return one panel: SAE, WSAE and controls, judged on WSAE minus SAE, paired by seed, at S <= 0.5."""
    shown = [m for m in (PLAIN, WSAE, UNIT, SCALED) if any_of(rows, m)]
    low = relative(rows, method, PLAIN, score)
    levels = [level for level in low if level <= LOW] or list(low)[:1]
    found = [low[level] for level in levels]
    mean = mean_interval([d.value for d in found]).value
    largest = max(found, key=lambda d: abs(d.value))
    ours = (
        f"WSAE differs by {mean:+.2%} on average over S <= {levels[-1]:g}, "
        f"at most {largest.value:+.2%}{interval(largest)}"
    )
    if lower is None:
        ratio = abs(mean_interval([d.value for d in low.values()]).value)
        verdict = "reproduced" if ratio < 0.1 else "partly" if ratio < 0.5 else "not reproduced"
    else:
        verdict = judged(found, lower, NEGLIGIBLE)
    lines = tuple(as_series(m, series(rows, m, score)) for m in shown)
    return Panel(panel=name, score=score, paper=paper, ours=ours, verdict=verdict, series=lines)


def relative(rows: Sequence[Row], method: str, against: str, score: str) -> dict[float, Mean]:
    """Return level -> (method - against) / mean of against, paired by seed."""
    base = series(rows, against, score)
    found = differences(rows, method, against, score)
    return {level: _divided(mean, abs(base[level].value)) for level, mean in found.items()}


def interval(mean: Mean) -> str:
    """Return " [low, high]" in per cent, or nothing for one seed."""
    if mean.low is None or mean.high is None:
        return ""
    return f" [{mean.low:+.2%}, {mean.high:+.2%}]"


def any_of(rows: Sequence[Row], method: str) -> bool:
    """Return whether there are rows of a method."""
    return any(row["method"] == method for row in rows)


def _divided(mean: Mean, by: float) -> Mean:
    by = by if by > 0 else 1.0
    low, high = (None if edge is None else edge / by for edge in (mean.low, mean.high))
    return Mean(mean.value / by, low, high, mean.n)
