"""The report's charts: what is drawn for one hook of a run. No figure is returned where data are missing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from wsae.report.rundata import Json, RunData, finite, is_control
from wsae.report.svg import Axis, Chart, axis
from wsae.report.words import number

MAX_POINTS = 1200
"""Points per curve or scatter; longer data are thinned evenly."""
SERIES = 7
_BIN = 0.2
_DEAD_GAP = 0.5
_NAMED = 5


@dataclass(frozen=True)
class Figure:
    """One chart with its title, one sentence of reading help, and an optional log-scale twin."""

    title: str
    help: str
    svg: Markup
    log: Markup | None = None


def kind_of(run: RunData, hook: str, member: str) -> str:
    """Return the colour class of a member: `s0` for the plain twin, then in order."""
    return f"s{run.members(hook).index(member) % SERIES}"


def thinned(count: int, limit: int = MAX_POINTS) -> np.ndarray:
    """Return at most `limit` evenly spaced positions of range(count), first and last included."""
    return np.unique(np.linspace(0, count - 1, min(count, limit)).round().astype(int))


# --- gamma -----------------------------------------------------------------------------------------------


def gamma_figures(run: RunData, hook: str) -> list[Figure]:
    """Draw gamma against the rank of input variance, one curve per weighted member."""
    curves = {
        member: pair
        for member in run.members(hook)
        if (pair := _gamma_pair(run, hook, member)) is not None
    }
    if not curves:
        return []
    values = [v for gamma, _ in curves.values() for v in gamma]
    width = max(len(gamma) for gamma, _ in curves.values())
    y = axis("loss weight γ (log)", [*values, 1.0], log=True)
    chart = Chart(
        "Loss weight by dimension",
        Axis(
            "rank of the input dimension, largest variance first (log)", 0.9, float(width), log=True
        ),
        y,
        560,
        300,
    )
    chart.rule((0.9, 1.0), (float(width), 1.0), "γ = 1: plain")
    named: set[int] = set()
    for member, (gamma, order) in curves.items():
        _gamma_curve(chart, (gamma, order), (kind_of(run, hook, member), member), named)
    text = (
        "Errors in a dimension count γ² times in the training loss. Dimensions above the line gained "
        "weight, those below lost it; the heaviest are numbered."
    )
    return [Figure("Which dimensions gained weight", text, chart.svg())]


def _gamma_pair(run: RunData, hook: str, member: str) -> tuple[np.ndarray, np.ndarray] | None:
    gamma, variance = run.array(hook, member, "gamma"), run.array(hook, member, "input_variance")
    if gamma is None or run.is_plain(hook, member) or is_control(member):
        return None
    return gamma, np.argsort(-(gamma if variance is None else variance), kind="stable")


def _gamma_curve(
    chart: Chart, pair: tuple[np.ndarray, np.ndarray], who: tuple[str, str], named: set[int]
) -> None:
    """Draw one member's gamma; a dimension's number is written once for all members."""
    (gamma, order), (kind, member) = pair, who
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    kept = np.unique(np.geomspace(1, len(order), MAX_POINTS).round().astype(int)) - 1
    chart.points(kept + 1.0, gamma[order][kept], kind, member)
    for place, dim in enumerate(np.argsort(-gamma, kind="stable")[:_NAMED]):
        tip = f"{member}: dimension {dim}, γ = {number(float(gamma[dim]))}"
        text = f"dim {dim}" if place < 3 and int(dim) not in named else ""
        named.add(int(dim))
        chart.spot(float(rank[dim]) + 1.0, float(gamma[dim]), kind, tip, text)


# --- training --------------------------------------------------------------------------------------------

CURVES = (
    (
        "fvu",
        "Plain FVU",
        "fraction of variance unexplained",
        "All dimensions alike. Lower is better.",
    ),
    (
        "fvu_weighted",
        "Weighted FVU",
        "FVU with weights γ²",
        "What the member itself is trained on.",
    ),
    ("l0", "L0", "active latents per {unit}", "Fixed for Top-k; free for the others."),
    ("dead_frac", "Dead latents", "fraction of latents", "Latents that have not fired lately."),
)


def training_figures(run: RunData, hook: str) -> list[Figure]:
    """Draw each metric of training against tokens, all members together, linear and log."""
    rows = run.metrics.get(hook, {})
    return [
        Figure(
            title,
            text,
            _curves(run, hook, rows, (key, unit.format(unit=run.unit), False)),
            _curves(run, hook, rows, (key, unit.format(unit=run.unit), True)),
        )
        for key, title, unit, text in CURVES
        if any(finite(row.get(key)) is not None for member in rows.values() for row in member)
    ]


def _curves(
    run: RunData, hook: str, rows: dict[str, list[Json]], what: tuple[str, str, bool]
) -> Markup:
    key, unit, log = what
    series = {member: _series(rows[member], key) for member in run.members(hook) if member in rows}
    values = [v for _, ys in series.values() for v in ys]
    y = axis(unit + (" (log)" if log else ""), values if log else [0.0, *values], log=log)
    x = axis(f"training {run.unit}s", [0.0, *(v for xs, _ in series.values() for v in xs)], pad=0.0)
    chart = Chart(unit, x, y)
    for member, (xs, ys) in series.items():
        drawn = np.where(ys > 0, ys, np.nan) if log else ys
        chart.line(xs, drawn, kind_of(run, hook, member), member)
    return chart.svg()


def _series(rows: list[Json], key: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(finite(row.get("tokens", row.get("step"))), finite(row.get(key))) for row in rows]
    kept = [(x, y) for x, y in pairs if x is not None and y is not None]
    xs, ys = (np.array([pair[i] for pair in kept], dtype=float) for i in (0, 1))
    index = thinned(len(kept), 400) if kept else slice(0)
    return xs[index], ys[index]


# --- latents ---------------------------------------------------------------------------------------------


def density_figures(run: RunData, hook: str) -> list[Figure]:
    """Draw log10 density histograms, each member over the plain twin; dead latents in a bar of their own."""
    help_text = (
        "How often each latent fires on held-out data. Left bar: never (dead). Towards 1: fires on "
        f"nearly every {run.unit} (dense). Grey: the plain twin."
    )
    return _beside(run, hook, ("density", help_text), density_chart)


def density_chart(
    run: RunData, hook: str, pair: tuple[str | None, str], pool: dict[str, np.ndarray]
) -> Markup:
    """Draw the histograms of log10 density of a member and its twin, on the axes of the whole pool."""
    floor = np.floor(
        min((np.log10(d[d > 0]).min() for d in pool.values() if (d > 0).any()), default=-4.0)
    )
    edges = np.arange(floor, _BIN / 2, _BIN)
    bars = {name: _binned(density, edges) for name, density in pool.items()}
    top = max(max(dead, counts.max()) for dead, counts in bars.values())
    stride = 1 if floor > -7 else 2
    powers = tuple((float(p), _power(p)) for p in range(int(floor), 1, stride))
    dead_at = floor - _DEAD_GAP
    x = Axis(
        f"density: share of {run.unit}s on which a latent fires",
        dead_at - _BIN,
        0.05,
        ticks=((dead_at, "0"), *powers),
    )
    chart = Chart(
        f"Density of {pair[1]}", x, Axis("latents per bin", 0.0, max(1.0, 1.06 * float(top)))
    )
    for name in filter(None, dict.fromkeys(pair)):
        dead, counts = bars[name]
        kind = kind_of(run, hook, name)
        chart.steps(
            [dead_at - _BIN, dead_at + _BIN], [float(dead)], kind, f"{name}: {dead} dead latents"
        )
        chart.steps(edges.tolist(), counts.astype(float).tolist(), kind, name)
    return chart.svg()


def _binned(density: np.ndarray, edges: np.ndarray) -> tuple[int, np.ndarray]:
    alive = density[density > 0]
    inside = np.clip(np.log10(alive), edges[0], edges[-1] - 1e-9)
    return int((density <= 0).sum()), np.histogram(inside, edges)[0]


def _power(exponent: int) -> str:
    return (
        "1"
        if exponent == 0
        else "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    )


def explained_figures(run: RunData, hook: str) -> list[Figure]:
    """Draw explained variance per input dimension, each weighted member against the plain twin."""
    help_text = (
        "One point per input dimension. Above the diagonal the weighted SAE explains more of it, below "
        "less. Larger points: its heaviest dimensions. "
        "Points on the lower edge lie below it."
    )
    return [f for f in _beside(run, hook, ("ev_per_dim", help_text), _explained_chart) if f.svg]


def _explained_chart(
    run: RunData, hook: str, pair: tuple[str | None, str], pool: dict[str, np.ndarray]
) -> Markup:
    twin, member = pair
    if twin is None or twin == member:
        return Markup("")
    kind, gamma = kind_of(run, hook, member), run.array(hook, member, "gamma")
    x, y = pool[twin], pool[member]
    values = np.concatenate([v[np.isfinite(v)] for v in (x, y)])
    low = max(-1.0, float(np.quantile(values, 0.002)) - 0.05) if len(values) else 0.0
    chart = Chart(
        f"Explained variance per dimension: {member}",
        Axis(f"explained variance, {twin}", low, 1.0),
        Axis(f"explained variance, {member}", low, 1.0),
        height=340,
    )
    chart.rule((low, low), (1.0, 1.0))
    kept = thinned(len(x))
    chart.points(x[kept], y[kept], kind, member)
    heaviest = [] if gamma is None else np.argsort(-gamma, kind="stable")[:_NAMED]
    for dim in (d for d in heaviest if np.isfinite([x[d], y[d]]).all()):
        tip = f"dimension {dim}: {twin} {number(float(x[dim]))}, {member} {number(float(y[dim]))}"
        chart.spot(float(x[dim]), float(y[dim]), kind, tip, str(dim))
    return chart.svg()


Draw = Callable[[RunData, str, tuple[str | None, str], dict[str, np.ndarray]], Markup]


def _beside(run: RunData, hook: str, what: tuple[str, str], draw: Draw) -> list[Figure]:
    """One figure per weighted member beside the twin (or per member when there is no twin)."""
    name, text = what
    arrays = {
        member: run.array(hook, member, name)
        for member in run.members(hook)
        if not is_control(member)
    }
    pool = {member: array for member, array in arrays.items() if array is not None}
    shown: Sequence[str] = [member for member in pool if not run.is_plain(hook, member)] or list(
        pool
    )
    out = []
    for member in shown:
        twin = run.twin_of(hook, member)
        twin = twin if twin in pool else None
        title = f"{member} beside {twin}" if twin else member
        out.append(Figure(title, text, draw(run, hook, (twin, member), pool)))
    return out
