"""Small inline SVG charts: axes, lines, steps, points. Colours are CSS classes (`s0`, ...) that follow the theme.

All text is escaped; no scripts, no styles, no ids, so any number of charts fit on a page with a strict policy.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

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
