"""What is drawn in a report and in the browser: charts of a hook, member or latent, and contexts shaded by activation.

Charts are small inline SVG: axes, lines, steps, points. Colours are CSS classes (`s0`, ...) that follow the theme. All
text is escaped; no scripts, no styles, no ids, so any number of charts fit on a page with a strict policy. No figure is
returned where data are missing. Contexts are spans of text, or packed for the report's script to draw; what is
invisible, or would reorder the line, is shown by name.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from markupsafe import Markup, escape

from wsae.evals.latents import RELATIVE_NORM
from wsae.report.rundata import COLOURS, DensityForm, RunData, finite, is_control
from wsae.report.view import metric_name, number, score_name
from wsae.run import Json

LEVELS = 6
CONTINUED = "⋯"
"""Stands for a token that continues the character before it."""
_HIDDEN = re.compile(
    "[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)
_NAMED = {"\n": "↵", "\t": "⇥"}


class Span(NamedTuple):
    """Some text of a context: its shade (0: silent), whether it is the peak or matches the search, its activation."""

    text: str
    level: int = 0
    peak: bool = False
    hit: bool = False
    tip: str = ""

    @property
    def kind(self) -> str:
        """Its classes; none where it needs no element of its own."""
        shade = [f"a{self.level}"] if self.level else []
        marks = [*shade, *["peak"] * self.peak, *["hit"] * self.hit]
        return " ".join(["tok", *marks]) if marks else ""


def visible(text: str) -> str:
    """Return text in which characters that are invisible, or would reorder the line, stand by name."""
    return _HIDDEN.sub(lambda m: _NAMED.get(m[0]) or f"⟨{ord(m[0]):04X}⟩", text)


def shown_token(text: str) -> str:
    """Return a token that stands alone: visible, and not empty."""
    return visible(text).strip() or ("␣" if text else CONTINUED)


def level_of(act: float, most: float | None) -> int:
    """Return the shade of an activation: 0 none, 1 to 6 by its share of the strongest."""
    if act <= 0:
        return 0
    share = act / most if most and most > 0 else 1.0
    return max(1, min(LEVELS, -int(-LEVELS * share // 1)))


def spans(context: Json, most: float | None, words: list[str]) -> list[Span]:
    """Return a context as spans, tokens without a mark joined; `most` is the latent's strongest activation.

    Leading spaces stay outside the shading, so that lines break cleanly.
    """
    tokens = [str(token) for token in context["tokens"]]
    hits = matched(tokens, words)
    out = [Span("")]
    for i, (token, act) in enumerate(zip(tokens, context["acts"], strict=True)):
        text = visible(token) or (CONTINUED if act > 0 else "")
        tip = f"activation {number(float(act))}" if act > 0 else ""
        at_peak = act > 0 and i == context.get("peak")
        span = Span(text.lstrip(" ") or text, level_of(act, most), at_peak, i in hits, tip)
        plain = text.removesuffix(span.text) if span.kind else text
        if out[-1].kind:
            out.append(Span(plain))
        else:
            out[-1] = Span(out[-1].text + plain)
        if span.kind:
            out.append(span)
    out[0] = Span(out[0].text.lstrip(" "))
    return [span for span in out if span.text]


def folded(text: str) -> str:
    """Return a text as search compares it: without case and accents."""
    split = unicodedata.normalize("NFKD", text.casefold())
    return "".join(char for char in split if not unicodedata.combining(char))


def matched(tokens: list[str], words: list[str]) -> set[int]:
    """Return the positions of tokens that some word of the search covers, whatever the case and accents."""
    hits: set[int] = set()
    if not words:
        return hits
    starts, text = [], ""
    for token in tokens:
        starts.append(len(text))
        text += folded(token)
    ends = [*starts[1:], len(text)]
    for word in filter(None, map(folded, words)):
        at = text.find(word)
        while at >= 0:
            for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
                if start < at + len(word) and end > at:
                    hits.add(i)
            at = text.find(word, at + len(word))
    return hits


def pack_contexts(run: RunData) -> Json:
    """Return the contexts in compact form: a token table, and per context token numbers and the activations above 0.

    A latent is [index, density, variance, max, match or null, contexts, scores, explanation or null, typical tokens], a
    match [member, latent, cosine], a context [token numbers, peak position, sequence, [position, activation, ...]];
    scores are [value or null, ...] in the order of `scores`. A context in an image has one token, its class, and the
    image's number as sequence; `images` holds the thumbnails.
    """
    entries = [e for named in run.contexts.values() for latents in named.values() for e in latents]
    counts = Counter(token for e in entries for c in e["contexts"] for token in c["tokens"])
    table = sorted(counts, key=lambda token: (-counts[token], token))
    number_of = {token: i for i, token in enumerate(table)}
    scores = [*dict.fromkeys(score for entry in entries for score in entry.get("scores", {}))]
    hooks = [
        [
            hook,
            [
                [name, [_latent(entry, number_of, scores) for entry in latents]]
                for name, latents in members.items()
            ],
        ]
        for hook, members in run.contexts.items()
    ]
    return {
        "tokens": table,
        "hooks": hooks,
        "scores": [score_name(score) for score in scores],
        "images": run.thumbnails,
    }


def _latent(entry: Json, number_of: dict[str, int], scores: list[str]) -> list[object]:
    match, said, values = entry.get("match"), entry.get("explanation"), entry.get("scores", {})
    contexts = []
    for context in entry["contexts"]:
        active = ((i, _short(act)) for i, act in enumerate(context["acts"]))
        numbers = [number_of[token] for token in context["tokens"]]
        acts = [item for pair in active if pair[1] for item in pair]
        contexts.append([numbers, context.get("peak"), context.get("seq"), acts])
    return [
        int(entry["latent"]),
        *(_short(entry.get(key)) for key in ("density", "variance", "max")),
        None if not match else [match["member"], int(match["latent"]), _short(match.get("cosine"))],
        contexts,
        [_short(values.get(score)) for score in scores] if values else [],
        None if said is None else str(said),
        [str(token) for token in entry.get("tokens", [])],
    ]


def _short(value: object) -> float | int | None:
    """Round to three significant digits (whole numbers lose their point); None when not finite."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    rounded = float(f"{value:.3g}")
    return int(rounded) if rounded == int(rounded) else rounded


# Charts.

WIDTH, HEIGHT = 440, 280
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 30, 44
_MAX_LOG_TICKS = 8
_TINY = 1e-100
"""Values below have no place on a log axis (their margins would underflow)."""
_GLYPH = 6.6
"""Pixels a character of a note takes, at most: keeps notes from overlapping."""

Real = int | float


@dataclass(frozen=True)
class AxisScale:
    """One axis of a chart: `low` and `high` in data units; values outside are drawn at the edge."""

    label: str
    low: Real
    high: Real
    log: bool = False
    ticks: tuple[tuple[Real, str], ...] | None = None

    def unit(self, value: Real) -> float:
        """Map a value to [0, 1] along the axis."""
        low, high, value = (
            math.log10(max(v, 1e-300)) if self.log else v for v in (self.low, self.high, value)
        )
        return float(min(1.0, max(0.0, (value - low) / (high - low))))

    def marks(self) -> Sequence[tuple[Real, str]]:
        """Return (value, text) of the ticks."""
        if self.ticks is not None:
            return self.ticks
        values = log_ticks(self.low, self.high) if self.log else linear_ticks(self.low, self.high)
        return [(value, tick_text(value)) for value in values]


def scale(label: str, values: Iterable[Real], log: bool = False, pad: float = 0.04) -> AxisScale:
    """Return an axis that covers the finite values (positive ones when `log`), with a margin."""
    kept = [v for v in values if math.isfinite(v) and (v > _TINY or not log)]
    low, high = (min(kept), max(kept)) if kept else (0.0, 1.0)
    if log:
        low, high = (low or 0.1), (high or 1.0)
        span = max(high / low, 1.5) ** pad
        return AxisScale(label, low / span, high * span, log=True)
    span = (high - low) or abs(high) or 1.0
    return AxisScale(label, low - pad * span if low else 0.0, high + pad * span)


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
        self, title: str, x: AxisScale, y: AxisScale, width: int = WIDTH, height: int = HEIGHT
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
        """Draw one larger point with a tooltip and, if given, a text beside it where no other stands."""
        px, py = self.place(x, y)
        self._marks.append(
            f'<circle class="spot {escape(kind)}" cx="{px:.1f}" cy="{py:.1f}" r="4">'
            f"<title>{escape(tip)}</title></circle>"
        )
        if not text:
            return
        right, width = px > self.width * 0.7, len(text) * _GLYPH
        anchor, shift = ("end", -5) if right else ("start", 5)
        begin = px + shift - (width if right else 0)
        notes = self._notes
        if any(abs(py - y) < 13 and begin < x + w and x < begin + width for x, y, w in notes):
            return
        notes.append((begin, py, width))
        self._over.append(_text(px + shift, py - 6, text, f"note {anchor}"))

    def rule(self, x1: Real, y1: Real, x2: Real, y2: Real, text: str = "") -> None:
        """Draw a thin reference line between two points of the data, named at its end."""
        (x1, y1), (x2, y2) = self.place(x1, y1), self.place(x2, y2)
        self._marks.append(
            f'<line class="rule" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'
        )
        if text:
            self._over.append(_text(x2 - 4, y2 - 6, text, "note end"))

    def svg(self) -> Markup:
        """Return the finished chart."""
        base, end = self.height - BOTTOM, self.width - RIGHT
        frame = [f'<line class="axis" x1="{LEFT}" y1="{base}" x2="{end}" y2="{base}"/>']
        for value, text in self.x.marks():
            x = self.place(value, self.y.low)[0]
            frame.append(
                f'<line class="axis" x1="{x:.1f}" y1="{base}" x2="{x:.1f}" y2="{base + 4}"/>'
            )
            frame.append(_text(x, base + 18, text, "tick middle"))
        for value, text in self.y.marks():
            y = self.place(self.x.low, value)[1]
            frame.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{end}" y2="{y:.1f}"/>')
            frame.append(_text(LEFT - 7, y + 4, text, "tick end"))
        labels = [
            _text((LEFT + end) / 2, self.height - 6, self.x.label, "label middle"),
            _text(4, 14, self.y.label, "label start"),
        ]
        body = "".join([*frame, *self._marks, *self._over, *labels])
        return Markup(
            f'<svg class="chart" viewBox="0 0 {self.width} {self.height}" role="img" '
            f'aria-label="{escape(self.title)}">{body}</svg>'
        )

    def _path(self, parts: Sequence[str], kind: str, tip: str) -> None:
        if parts:
            title = f"<title>{escape(tip)}</title>" if tip else ""
            self._marks.append(f'<path class="{escape(kind)}" d="{"".join(parts)}">{title}</path>')


def _text(x: Real, y: Real, text: str, kind: str) -> str:
    return f'<text class="{escape(kind)}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


MAX_POINTS = 1200
"""Points per curve or scatter; longer data are thinned evenly."""
_BIN = 0.2
_DEAD_GAP = 0.5
_NAMED_DIMS = 5


@dataclass(frozen=True)
class Figure:
    """One chart with its title, one sentence of reading help, and an optional log-scale twin."""

    title: str
    help: str
    svg: Markup
    log: Markup | None = None
    keys: Sequence[tuple[str, str]] = ()
    """Colour class and name of each group of points."""


def thinned(count: int, limit: int = MAX_POINTS) -> np.ndarray:
    """Return at most `limit` evenly spaced positions of range(count), first and last included."""
    return np.unique(np.linspace(0, count - 1, min(count, limit)).round().astype(int))


def gamma_figures(run: RunData, hook: str) -> list[Figure]:
    """Draw gamma against the rank of input variance, one curve per weighted member; a dimension is named once."""
    gammas = {
        member: gamma
        for member in run.members(hook)
        if (gamma := run.array(hook, member, "gamma")) is not None
        and not run.is_plain(hook, member)
        and not is_control(member)
    }
    if not gammas:
        return []
    width = float(max(map(len, gammas.values())))
    label = "rank of the input dimension, largest variance first (log)"
    chart = Chart(
        "Loss weight by dimension",
        AxisScale(label, 0.9, width, log=True),
        scale("loss weight γ (log)", [*np.concatenate([*gammas.values()]), 1.0], log=True),
        560,
        300,
    )
    chart.rule(0.9, 1.0, width, 1.0, "γ = 1: plain")
    named: set[int] = set()
    for member, gamma in gammas.items():
        kind, variance = run.kind(hook, member), run.array(hook, member, "input_variance")
        order = np.argsort(-(gamma if variance is None else variance), kind="stable")
        rank = np.argsort(order) + 1.0
        kept = np.unique(np.geomspace(1, len(order), MAX_POINTS).round().astype(int)) - 1
        chart.points(kept + 1.0, gamma[order][kept], kind, member)
        for place, dim in enumerate(np.argsort(-gamma, kind="stable")[:_NAMED_DIMS]):
            tip = f"{member}: dimension {dim}, γ = {number(float(gamma[dim]))}"
            text = f"dim {dim}" if place < 3 and int(dim) not in named else ""
            named.add(int(dim))
            chart.spot(float(rank[dim]), float(gamma[dim]), kind, tip, text)
    text = (
        "Errors in a dimension count γ² times in the training loss. Dimensions above the line gained "
        "weight, those below lost it; the heaviest are numbered."
    )
    return [Figure("Which dimensions gained weight", text, chart.svg())]


def front_figures(run: RunData, hook: str) -> list[Figure]:
    """Draw each metric of a grid's members against L0, and a line through those that no other beats."""
    return [
        _front(metric_name(metric), points) for metric, points in run.fronts.get(hook, {}).items()
    ]


def _front(name: str, points: list[Json]) -> Figure:
    groups = list(dict.fromkeys(str(point["group"]) for point in points))
    x = scale("L0: active latents per row (log)", [p["l0"] for p in points], log=True)
    chart = Chart(name, x, scale(name, [p["value"] for p in points]), 560, 340)
    best = [point for point in points if point["front"]]
    chart.line([p["l0"] for p in best], [p["value"] for p in best], "front", "front")
    for point in points:
        kind = f"s{groups.index(point['group']) % COLOURS}"
        tip = f"{point['member']}: L0 {number(point['l0'])}, {name} {number(point['value'])}"
        chart.spot(point["l0"], point["value"], kind, tip, str(point["label"]))
    keys = [(f"s{place % COLOURS}", group) for place, group in enumerate(groups)]
    named = ", ".join(str(point["member"]) for point in best)
    text = f"On the line, no other SAE is as sparse and fits better: {named}."
    return Figure(name, text, chart.svg(), keys=keys)


CURVES = {
    "fvu": (
        "Plain FVU",
        "fraction of variance unexplained",
        "All dimensions alike. Lower is better.",
    ),
    "fvu_weighted": (
        "Weighted FVU",
        "FVU with weights γ²",
        "What the member itself is trained on.",
    ),
    "l0": ("L0", "active latents per {unit}", "Fixed for Top-k; free for the others."),
    "dead_frac": ("Dead latents", "fraction of latents", "Latents that have not fired lately."),
}
"""Metric -> title, unit, and a sentence."""


def training_figures(run: RunData, hook: str) -> list[Figure]:
    """Draw each metric of training against tokens, all members together, linear and log."""
    rows = run.metrics.get(hook, {})
    out = []
    for key, (title, unit, text) in CURVES.items():
        if any(finite(row.get(key)) is not None for member in rows.values() for row in member):
            series = {m: _series(rows[m], key) for m in run.members(hook) if m in rows}
            label = unit.format(unit=run.unit)
            linear, logged = (_curves(run, hook, label, series, log) for log in (False, True))
            out.append(Figure(title, text, linear, logged))
    return out


Points = dict[str, tuple[np.ndarray, np.ndarray]]
"""Member -> (x, y)."""


def _curves(run: RunData, hook: str, unit: str, series: Points, log: bool) -> Markup:
    values = [v for _, ys in series.values() for v in ys]
    y = scale(unit + (" (log)" if log else ""), values if log else [0.0, *values], log=log)
    xs = (v for xs, _ in series.values() for v in xs)
    chart = Chart(unit, scale(f"training {run.unit}s", [0.0, *xs], pad=0.0), y)
    for member, (xs, ys) in series.items():
        drawn = np.where(ys > 0, ys, np.nan) if log else ys
        chart.line(xs, drawn, run.kind(hook, member), member)
    return chart.svg()


def _series(rows: list[Json], key: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(finite(row.get("tokens", row.get("step"))), finite(row.get(key))) for row in rows]
    kept = np.array([(x, y) for x, y in pairs if x is not None and y is not None], dtype=float)
    kept = kept.reshape(-1, 2)[thinned(len(kept), 400) if len(kept) else slice(0)]
    return kept[:, 0], kept[:, 1]


def _grey(run: RunData) -> str:
    return " Grey: the plain twin." if run.weighted else ""


def density_figures(run: RunData, hook: str) -> list[Figure]:
    """Draw how often the latents of each member fire, over its plain twin."""
    text = (
        "How often each latent fires on held-out data. Left bar: never (dead). Towards 1: fires on "
        f"nearly every {run.unit} (dense).{_grey(run)}"
    )
    return _densities(run, hook, _pool(run, hook, "density"), text)


def scored_densities(run: RunData, hook: str) -> list[Figure]:
    """Draw the densities of the latents that were scored, each weighted member over its twin."""
    found = run.interpretation.get("hooks", {}).get(hook, {}).get("members", {})
    pool = {
        name: np.array([finite(latent.get("density")) or 0.0 for latent in entry["latents"]])
        for name, entry in found.items()
        if entry.get("latents")
    }
    return _densities(run, hook, pool)


def _densities(
    run: RunData, hook: str, pool: Mapping[str, np.ndarray], text: str = ""
) -> list[Figure]:
    """Draw histograms of log10 density, each member over its twin, on common axes; the dead in a bar of their own."""
    if not pool:
        return []
    lowest = min((np.log10(d[d > 0]).min() for d in pool.values() if (d > 0).any()), default=-4.0)
    floor = min(float(np.floor(lowest)), -1.0)  # also where every latent fires on every row
    edges, bars = np.arange(floor, _BIN / 2, _BIN), {}
    for name, density in pool.items():
        inside = np.clip(np.log10(density[density > 0]), edges[0], edges[-1] - 1e-9)
        bars[name] = int((density <= 0).sum()), np.histogram(inside, edges)[0]
    top = max(1.0, 1.06 * float(max(max(dead, counts.max()) for dead, counts in bars.values())))
    label = f"density: share of {run.unit}s on which a latent fires"
    out = []
    for title, twin, member in _beside(run, hook, pool):
        x = _density_scale(label, floor, 1 if floor > -7 else 2)
        chart = Chart(f"Density of {member}", x, AxisScale("latents per bin", 0.0, top))
        for name in filter(None, dict.fromkeys((twin, member))):
            dead, counts = bars[name]
            kind, tip = run.kind(hook, name), f"{name}: {dead} dead latents"
            _density_bars(chart, floor, dead, kind, tip)
            chart.steps(edges.tolist(), counts.astype(float).tolist(), kind, name)
        out.append(Figure(title, text, chart.svg()))
    return out


def _density_scale(label: str, low: float, stride: int = 1) -> AxisScale:
    """Return an axis of log10 densities from `low`, with a place for the dead latents left of it."""
    small = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    powers = range(math.ceil(low), 1, stride)
    ticks = ((float(p), "10" + str(p).translate(small) if p else "1") for p in powers)
    dead_at = low - _DEAD_GAP
    return AxisScale(label, dead_at - _BIN, 0.05, ticks=((dead_at, "0"), *ticks))


def _density_bars(chart: Chart, low: float, dead: int, kind: str, tip: str) -> None:
    dead_at = low - _DEAD_GAP
    chart.steps([dead_at - _BIN, dead_at + _BIN], [float(dead)], kind, tip)


def source_figures(run: RunData, hook: str) -> list[Figure]:
    """Draw whose the live latents of each crosscoder are: histograms of their relative norms, over the plain twin's."""
    found = run.evaluated(hook).get("members", {})
    counted = (m["sources"] for m in found.values() if m.get("sources"))
    names = list(next(counted, {}).get("alone", ()))
    text = (
        "Norm of a live latent's decoder row in one source, divided by the sum of its norms in all; "
        f"all sources at the same scale. Line: the same in each.{_grey(run)}"
    )
    density, out = _pool(run, hook, "density"), []
    for source in names[1:] if len(names) == 2 else names:
        pool = _pool(run, hook, f"{RELATIVE_NORM}[{source}]")
        pool = {name: r[density[name] > 0] for name, r in pool.items() if name in density}
        bars = {name: np.histogram(r, _SHARES)[0].astype(float) for name, r in pool.items()}
        top = max([1.0, *(1.06 * float(counts.max()) for counts in bars.values())])
        label = f"relative norm: 0 is {names[0]} alone, 1 is {source} alone"
        label = label if len(names) == 2 else f"relative norm of {source}"
        for title, twin, member in _beside(run, hook, pool):
            x, y = AxisScale(label, 0.0, 1.0), AxisScale("latents per bin", 0.0, top)
            chart = Chart(f"Relative norms of {member} in {source}", x, y)
            chart.rule(1 / len(names), 0.0, 1 / len(names), top)
            for name in filter(None, dict.fromkeys((twin, member))):
                chart.steps(_SHARES, bars[name].tolist(), run.kind(hook, name), name)
            title = title if len(names) == 2 else f"{source}: {title}"
            out.append(Figure(title, text, chart.svg()))
    return out


_SHARES = [i / 40 for i in range(41)]
"""Bins of relative norms."""


def explained_figures(run: RunData, hook: str) -> list[Figure]:
    """Draw explained variance per input dimension, each weighted member against the plain twin."""
    text = (
        "One point per input dimension. Above the diagonal the weighted SAE explains more of it, below less. Larger "
        "points: its heaviest dimensions. Points on the lower edge lie below it."
    )
    pool = _pool(run, hook, "ev_per_dim")
    return [
        Figure(title, text, _explained(run, hook, twin, member, pool))
        for title, twin, member in _beside(run, hook, pool)
        if twin is not None and twin != member
    ]


def _explained(
    run: RunData, hook: str, twin: str, member: str, pool: Mapping[str, np.ndarray]
) -> Markup:
    kind, gamma = run.kind(hook, member), run.array(hook, member, "gamma")
    x, y = pool[twin], pool[member]
    values = np.concatenate([v[np.isfinite(v)] for v in (x, y)])
    low = max(-1.0, float(np.quantile(values, 0.002)) - 0.05) if len(values) else 0.0
    chart = Chart(
        f"Explained variance per dimension: {member}",
        AxisScale(f"explained variance, {twin}", low, 1.0),
        AxisScale(f"explained variance, {member}", low, 1.0),
        height=340,
    )
    chart.rule(low, low, 1.0, 1.0)
    kept = thinned(len(x))
    chart.points(x[kept], y[kept], kind, member)
    heaviest = [] if gamma is None else np.argsort(-gamma, kind="stable")[:_NAMED_DIMS]
    for dim in (d for d in heaviest if np.isfinite([x[d], y[d]]).all()):
        tip = f"dimension {dim}: {twin} {number(float(x[dim]))}, {member} {number(float(y[dim]))}"
        chart.spot(float(x[dim]), float(y[dim]), kind, tip, str(dim))
    return chart.svg()


def _pool(run: RunData, hook: str, name: str) -> dict[str, np.ndarray]:
    """Return an array of each trained member that has it."""
    arrays = {m: run.array(hook, m, name) for m in run.members(hook) if not is_control(m)}
    return {member: array for member, array in arrays.items() if array is not None}


def _beside(
    run: RunData, hook: str, pool: Mapping[str, object]
) -> Iterator[tuple[str, str | None, str]]:
    """Yield (title, twin, member) of each weighted member of a pool, or of each member where none is weighted."""
    for member in [name for name in pool if not run.is_plain(hook, name)] or pool:
        twin = run.twin_of(hook, member)
        twin = twin if twin in pool else None
        yield f"{member} beside {twin}" if twin else member, twin, member


# One member and one latent, for the browser.

SMALL = (440, 200)
_BARS = 12


def member_densities(
    name: str, kind: str, density: DensityForm, unit: str = "token", own: float | None = None
) -> Markup:
    """Draw a member's densities, with one latent's own among them; the left bar counts the dead."""
    edges, counts, dead = density.edges, density.counts, density.dead
    first = next((i for i, count in enumerate(counts) if count), len(counts) - 4)
    low = min(edges[first], -3.0)
    first = next(i for i, edge in enumerate(edges) if edge >= low - 1e-9)
    top = max([dead, *counts[first:], 1])
    x = _density_scale(f"share of {unit}s on which a latent fires", low)
    chart = Chart(f"Density of {name}", x, AxisScale("latents", 0.0, 1.08 * top), *SMALL)
    _density_bars(chart, low, dead, kind, f"{dead} dead latents")
    chart.steps(edges[first:], [float(count) for count in counts[first:]], kind, name)
    if own is not None:
        place = math.log10(own) if own > 0 else low - _DEAD_GAP
        chart.rule(place, 0.0, place, float(top))
        chart.spot(place, 0.0, kind, f"this latent: {number(own)}")
    return chart.svg()


def acts_chart(
    edges: Sequence[float], counts: Sequence[int], acts: Sequence[float], kind: str
) -> Markup | None:
    """Draw how strongly a latent fires: counts between powers of ten, else the activations in its contexts."""
    found = [act for act in acts if act > 0]
    if counts:
        ticks = tuple((edge, number(10**edge)) for edge in edges[::4])
        x, what = AxisScale("activation", edges[0], edges[-1], ticks=ticks), "rows"
    elif len(found) < 2:
        return None
    else:
        width = max(found) / _BARS
        edges = [width * i for i in range(_BARS + 1)]
        places = [min(_BARS - 1, int(act / width)) for act in found]
        counts = [places.count(i) for i in range(_BARS)]
        x, what = scale("activation", edges, pad=0.0), "tokens of the contexts shown"
    chart = Chart("Activations", x, AxisScale(what, 0.0, 1.08 * max(counts)), *SMALL)
    chart.steps(edges, [float(count) for count in counts], kind)
    return chart.svg()
