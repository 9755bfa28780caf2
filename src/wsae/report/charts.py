"""The report's charts: what is drawn for one hook of a run. No figure is returned where data are missing."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from wsae.report.rundata import RunData, finite, is_control
from wsae.report.words import number
from wsae.run import Json

# Small inline SVG charts: axes, lines, steps, points. Colours are CSS classes (`s0`, ...) that
# follow the theme.
#
# All text is escaped; no scripts, no styles, no ids, so any number of charts fit on a page with a
# strict policy.

WIDTH, HEIGHT = 440, 280
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 30, 44
_MAX_LOG_TICKS = 8
_TINY = 1e-100
"""Values below have no place on a log axis (their margins would underflow)."""
_GLYPH = 6.6
"""Pixels a character of a note takes, at most: keeps notes from overlapping."""

Real = int | float


@dataclass(frozen=True)
class Axis:
    """One axis: `low` and `high` in data units; values outside are drawn at the edge."""

    label: str
    low: Real
    high: Real
    log: bool = False
    ticks: tuple[tuple[Real, str], ...] | None = None

    def unit(self, value: Real) -> float:
        """Map a value to [0, 1] along the axis."""
        low, high, value = (self._scaled(v) for v in (self.low, self.high, value))
        return float(min(1.0, max(0.0, (value - low) / (high - low))))

    def _scaled(self, value: Real) -> Real:
        return math.log10(max(value, 1e-300)) if self.log else value

    def marks(self) -> Sequence[tuple[Real, str]]:
        """Return (value, text) of the ticks."""
        if self.ticks is not None:
            return self.ticks
        values = log_ticks(self.low, self.high) if self.log else linear_ticks(self.low, self.high)
        return [(value, tick_text(value)) for value in values]


def axis(label: str, values: Iterable[Real], log: bool = False, pad: float = 0.04) -> Axis:
    """Build an axis that covers the finite values (positive ones when `log`), with a margin."""
    kept = [v for v in values if math.isfinite(v) and (v > _TINY or not log)]
    low, high = (min(kept), max(kept)) if kept else (0.0, 1.0)
    if log:
        low, high = (low or 0.1), (high or 1.0)
        span = max(high / low, 1.5) ** pad
        return Axis(label, low / span, high * span, log=True)
    span = (high - low) or abs(high) or 1.0
    return Axis(label, low - pad * span if low else 0.0, high + pad * span)


def linear_ticks(low: Real, high: Real, count: int = 5) -> list[float]:
    """Return about `count` round values inside [low, high]."""
    raw = (high - low) / count
    base = 10.0 ** math.floor(math.log10(raw))
    step = next(m * base for m in (1, 2, 2.5, 5, 10) if m * base >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: Real, high: Real) -> list[float]:
    """Return round values for a log axis: 1-2-5 within two decades, powers of ten beyond."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    powers = range(first, last + 1)
    if last - first <= 2:
        fine = [m * 10.0**p for p in powers for m in (1, 2, 5)]
        inside = [v for v in fine if low <= v <= high]
        return inside if len(inside) >= 2 else linear_ticks(low, high, 4)
    stride = math.ceil(len(powers) / _MAX_LOG_TICKS)
    return [10.0**p for p in powers if low <= 10.0**p <= high and p % stride == 0]


def tick_text(value: Real) -> str:
    """Format a tick: 0.25, 40k, 1e−5."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:g}M"
    if size >= 1e4:
        return f"{value / 1e3:g}k"
    if 0 < size < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-").replace("-", "−")
    return f"{value:.6g}".replace("-", "−")


class Chart:
    """One chart: add marks, then `svg()`."""

    def __init__(
        self, title: str, x: Axis, y: Axis, width: int = WIDTH, height: int = HEIGHT
    ) -> None:
        self.title, self.x, self.y, self.width, self.height = title, x, y, width, height
        self._marks: list[str] = []
        self._over: list[str] = []
        self._notes: list[tuple[Real, Real, Real]] = []

    def place(self, x: Real, y: Real) -> tuple[float, float]:
        """Map data to pixels."""
        across, up = self.width - LEFT - RIGHT, self.height - TOP - BOTTOM
        return LEFT + across * self.x.unit(x), self.height - BOTTOM - up * self.y.unit(y)

    def line(self, xs: Iterable[Real], ys: Iterable[Real], kind: str, tip: str = "") -> None:
        """Draw a polyline; a value that is not finite breaks it."""
        parts, pen = [], "M"
        for x, y in zip(xs, ys, strict=True):
            if not (math.isfinite(x) and math.isfinite(y)):
                pen = "M"
                continue
            px, py = self.place(x, y)
            parts.append(f"{pen}{px:.1f} {py:.1f}")
            pen = "L"
        self._path(parts, f"line {kind}", tip)

    def steps(
        self, edges: Sequence[Real], heights: Sequence[Real], kind: str, tip: str = ""
    ) -> None:
        """Draw a histogram outline (with an area under it) over `len(heights) + 1` edges."""
        left, base = self.place(edges[0], self.y.low)
        parts = [f"M{left:.1f} {base:.1f}"]
        for i, value in enumerate(heights):
            y = self.place(edges[i], value)[1]
            parts.append(f"V{y:.1f}H{self.place(edges[i + 1], value)[0]:.1f}")
        parts.append(f"V{base:.1f}")
        self._path(parts, f"steps {kind}", tip)

    def points(self, xs: Iterable[Real], ys: Iterable[Real], kind: str, tip: str = "") -> None:
        """Draw many small points as one path."""
        pairs = [
            self.place(x, y)
            for x, y in zip(xs, ys, strict=True)
            if math.isfinite(x) and math.isfinite(y)
        ]
        self._path([f"M{x:.1f} {y:.1f}h0" for x, y in pairs], f"points {kind}", tip)

    def spot(self, x: Real, y: Real, kind: str, tip: str, text: str = "") -> None:
        """Draw one larger point with a tooltip and, if given, a text beside it."""
        px, py = self.place(x, y)
        self._marks.append(
            f'<circle class="spot {escape(kind)}" cx="{px:.1f}" cy="{py:.1f}" r="4">'
            f"<title>{escape(tip)}</title></circle>"
        )
        if text:
            right = px > self.width * 0.7
            anchor, shift = ("end", -5) if right else ("start", 5)
            begin = px + shift - (len(text) * _GLYPH if right else 0)
            if self._free(begin, py, len(text) * _GLYPH):
                self._over.append(_text(px + shift, py - 6, text, f"note {anchor}"))

    def _free(self, x: Real, y: Real, width: Real) -> bool:
        """Claim the place of a note; False when another note is there already."""
        taken = any(abs(y - b) < 13 and x < a + w and a < x + width for a, b, w in self._notes)
        if not taken:
            self._notes.append((x, y, width))
        return not taken

    def rule(self, start: tuple[Real, Real], end: tuple[Real, Real], text: str = "") -> None:
        """Draw a thin reference line between two points of the data, named at its end."""
        (x1, y1), (x2, y2) = self.place(*start), self.place(*end)
        self._marks.append(
            f'<line class="rule" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'
        )
        if text:
            self._over.append(_text(x2 - 4, y2 - 6, text, "note end"))

    def svg(self) -> Markup:
        """Return the finished chart."""
        frame = [*self._x_axis(), *self._y_axis()]
        body = "".join([*frame, *self._marks, *self._over, *self._labels()])
        return Markup(
            f'<svg class="chart" viewBox="0 0 {self.width} {self.height}" role="img" '
            f'aria-label="{escape(self.title)}">{body}</svg>'
        )

    def _path(self, parts: Sequence[str], kind: str, tip: str) -> None:
        if parts:
            title = f"<title>{escape(tip)}</title>" if tip else ""
            self._marks.append(f'<path class="{escape(kind)}" d="{"".join(parts)}">{title}</path>')

    def _x_axis(self) -> list[str]:
        base = self.height - BOTTOM
        out = [
            f'<line class="axis" x1="{LEFT}" y1="{base}" x2="{self.width - RIGHT}" y2="{base}"/>'
        ]
        for value, text in self.x.marks():
            x = self.place(value, self.y.low)[0]
            out.append(
                f'<line class="axis" x1="{x:.1f}" y1="{base}" x2="{x:.1f}" y2="{base + 4}"/>'
            )
            out.append(_text(x, base + 18, text, "tick middle"))
        return out

    def _y_axis(self) -> list[str]:
        out = []
        for value, text in self.y.marks():
            y = self.place(self.x.low, value)[1]
            end = self.width - RIGHT
            out.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{end}" y2="{y:.1f}"/>')
            out.append(_text(LEFT - 7, y + 4, text, "tick end"))
        return out

    def _labels(self) -> list[str]:
        middle = (LEFT + self.width - RIGHT) / 2
        return [
            _text(middle, self.height - 6, self.x.label, "label middle"),
            _text(4, 14, self.y.label, "label start"),
        ]


def _text(x: Real, y: Real, text: str, kind: str) -> str:
    return f'<text class="{escape(kind)}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


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
    lowest = min((np.log10(d[d > 0]).min() for d in pool.values() if (d > 0).any()), default=-4.0)
    floor = min(np.floor(lowest), -1.0)  # also where every latent fires on every row
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
