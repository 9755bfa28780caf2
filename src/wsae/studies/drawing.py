"""Figures of the paper: panels of lines, and scatters with named points.

Paths are without suffix: PNG and SVG are written. Raises UserError where matplotlib is not installed.
"""

import functools
import importlib.util
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsae.core.errors import UserError
from wsae.core.files import writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE = 46
"""Characters a line of a panel's title holds."""
SPREAD = 0.6
"""Share of the room between two named places over which methods are spread."""
STYLES = (
    ("#3b4252", "-", "o"),
    ("#d55e00", "-", "s"),
    ("#009e73", "--", "^"),
    ("#0072b2", ":", "D"),
    ("#cc79a7", "-.", "v"),
    ("#e69f00", "-", "P"),
    ("#56b4e9", "--", "X"),
    ("#7f7f7f", ":", "*"),
    ("#8c564b", "-.", "<"),
    ("#000000", "--", ">"),
    ("#17becf", "-", "h"),
    ("#b5bd00", "--", "d"),
)


def panels_figure(
    panels: Sequence[dict[str, Any]], path: Path, xlabel: str = "sparsity S", columns: int = 4
) -> list[Path]:
    """Draw panels (title, ylabel, series) side by side, one line a method with its 95 % band; returns both paths.

    A panel may have `log`, the `bottom` its axis reaches down to (0), and `ticks`, names of the places 0, 1, ...
    """
    names = list(dict.fromkeys(line["method"] for panel in panels for line in panel["series"]))
    columns = min(columns, len(panels))
    figure = _grid(
        [functools.partial(_draw, panel=panel, names=names, xlabel=xlabel) for panel in panels],
        columns,
        new_figure(3.6 * columns, 3.3 * -(-len(panels) // columns) + 0.5),
    )
    return save_figure(figure, path)


def _grid(draws: Sequence[Callable[["Axes"], None]], columns: int, figure: "Figure") -> "Figure":
    """Draw panels side by side, each line and marker named once, below all panels."""
    axes = list(figure.subplots(-(-len(draws) // columns), columns, squeeze=False).flat)
    for ax, draw in zip(axes, draws, strict=False):
        draw(ax)
    for ax in axes[len(draws) :]:
        ax.set_visible(False)
    seen: dict[str, Any] = {}
    for ax in figure.axes:
        handles, labels = ax.get_legend_handles_labels()
        seen |= dict(zip(labels, handles, strict=True))
    columns = min(4, 2 * columns)
    figure.legend(
        seen.values(), seen.keys(), loc="outside lower center", ncols=columns, frameon=False
    )
    return figure


def need_matplotlib() -> None:
    """Raise UserError when matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("matplotlib is not installed; pip install 'wsae[report]'")


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure of this size in inches; raises UserError when matplotlib is not installed."""
    need_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _draw(ax: "Axes", panel: dict[str, Any], names: list[str], xlabel: str) -> None:
    for line in panel["series"]:
        colour, dash, marker = STYLES[names.index(line["method"]) % len(STYLES)]
        x, y = line["levels"], line["mean"]
        known = all(edge is not None for edge in (*line["low"], *line["high"]))
        if panel.get("ticks"):
            # points with their intervals: between named places there is nothing, so no line
            methods = [other["method"] for other in panel["series"]]
            place = SPREAD * ((methods.index(line["method"]) + 0.5) / len(methods) - 0.5)
            beside = [level + place for level in x]
            spans = None
            if known:
                below = [mean - low for mean, low in zip(y, line["low"], strict=True)]
                spans = [below, [high - mean for mean, high in zip(y, line["high"], strict=True)]]
            look = {"color": colour, "fmt": marker, "ms": 4.5, "lw": 1.2, "label": line["method"]}
            ax.errorbar(beside, y, yerr=spans, **look)
            continue
        ax.plot(x, y, color=colour, ls=dash, marker=marker, ms=3.5, lw=1.5, label=line["method"])
        if known:
            floor = [mean / 10 for mean in y] if panel.get("log") else line["low"]
            low = [max(pair) for pair in zip(line["low"], floor, strict=True)]
            ax.fill_between(x, low, line["high"], color=colour, alpha=0.18, lw=0)
    title = "\n".join(textwrap.fill(part, TITLE) for part in panel["title"].split("\n"))
    ax.set_title(title, loc="left", fontsize=9.5)
    ax.set_xlabel(xlabel)
    if panel.get("ticks"):
        ax.set_xticks(range(len(panel["ticks"])), panel["ticks"], fontsize=8)
    ax.set_ylabel(panel["ylabel"], fontsize=9)
    if panel.get("log"):
        ax.set_yscale("log")
    else:
        ax.set_ylim(bottom=min(panel.get("bottom", 0.0), ax.get_ylim()[0]))
    ax.spines[["top", "right"]].set_visible(False)


def save_figure(figure: "Figure", path: Path, dpi: int = 150) -> list[Path]:
    """Write a figure as PNG and SVG, the same bytes each time; returns both paths."""
    import matplotlib

    written = []
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
        written.append(path.with_suffix(f".{kind}"))
        salt = matplotlib.rc_context({"svg.hashsalt": "wsae"})  # names of parts would be random
        with writing(written[-1]) as temporary, salt:
            figure.savefig(temporary, format=kind, dpi=dpi, metadata=metadata)
    return written


_GLYPH, _LINE = 0.0135, 0.034
"""Width of a letter and height of a line of a point's name, in shares of a panel."""
_MARK = 0.01
"""Half the width of a point, likewise."""
_SHIFTS = (0.0, -1.1, 1.1, -2.2, 2.2)
"""Where a name may stand beside its point, in lines above it."""


def forest_figure(panels: Sequence[dict[str, Any]], path: Path) -> list[Path]:
    """Draw panels (title, lines) side by side, a row for each line's name: its points, its mean and interval.

    A line has `name`, `points`, `mean` (value, low, high) and `sure`, which gives it the stronger colour.
    """
    names = [line["name"] for line in panels[0]["lines"]]
    figure = new_figure(4.6 * len(panels), 0.3 * len(names) + 1.1)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, panel in zip(axes, panels, strict=True):
        ax.axvline(0, color="0.6", linewidth=0.8)
        for place, line in enumerate(panel["lines"]):
            mean, colour = line["mean"], "#b3261e" if line["sure"] else "#1f4e79"
            ax.scatter(line["points"], [place] * len(line["points"]), s=9, color="0.7", zorder=2)
            if mean.low is not None:
                ax.plot([mean.low, mean.high], [place, place], color=colour, linewidth=2, zorder=3)
            ax.scatter([mean.value], [place], s=26, color=colour, zorder=4)
        ax.set_title(panel["title"], loc="left", fontsize=10)
        ax.set_yticks(range(len(names)), names, fontsize=8)
    return save_figure(figure, path)


def scatter_figure(panels: Sequence[dict[str, Any]], path: Path, columns: int = 3) -> list[Path]:
    """Draw panels side by side: lines first, then a named point with its interval for each member; returns both paths.

    A panel has title, xlabel and ylabel; lines: [{label, x, y}]; points: [{label, group, x, y, low, high}]. Points of
    one group share colour and marker. With `log` the x axis is one of powers of two.
    """
    groups = list(dict.fromkeys(p["group"] for panel in panels for p in panel["points"]))
    columns = min(columns, len(panels))
    figure = _grid(
        [functools.partial(_draw_scatter, panel=panel, groups=groups) for panel in panels],
        columns,
        new_figure(4.6 * columns, 3.9 * -(-len(panels) // columns) + 0.4),
    )
    return save_figure(figure, path)


def _draw_scatter(ax: "Axes", panel: dict[str, Any], groups: list[str]) -> None:
    for line, (dash, grey) in zip(panel["lines"], (("-", "0.35"), ("--", "0.6")), strict=False):
        ax.plot(line["x"], line["y"], dash, color=grey, lw=1.3, label=line["label"], zorder=1)
    for point in panel["points"]:
        colour, _, marker = STYLES[groups.index(point["group"]) % len(STYLES)]
        x, y = point["x"], point["y"]
        if point["low"] is not None:
            ax.plot([x, x], [point["low"], point["high"]], color=colour, lw=1, alpha=0.6, zorder=2)
        ax.plot([x], [y], marker, color=colour, ms=4.5, ls="none", label=point["group"], zorder=3)
    if panel.get("log"):
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:g}")
    _name(ax, panel["points"])
    ax.set_title(panel["title"], loc="left", fontsize=9.5)
    ax.set_xlabel(panel["xlabel"])
    ax.set_ylabel(panel["ylabel"], fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)


def _name(ax: "Axes", points: Sequence[dict[str, Any]]) -> None:
    """Write every point's name beside it, on the nearest line free of names and points; where none is, nowhere."""
    ax.autoscale_view()  # which would come when the figure is drawn
    inside = ax.transData + ax.transAxes.inverted()
    placed = sorted((*inside.transform((p["x"], p["y"])), p["label"]) for p in points)
    taken = [(x - _MARK, x + _MARK, y) for x, y, _ in placed]  # left, right, middle

    def is_free(left: float, width: float, line: float) -> bool:
        return all(
            start > left + width or left > end or abs(line - middle) >= _LINE
            for start, end, middle in taken
        )

    for x, y, label in placed:
        width = _GLYPH * len(label)
        sides = (x + 1.5 * _MARK, x - 2 * _MARK - width)
        places = [(left, y + shift * _LINE) for shift in _SHIFTS for left in sides]
        for left, line in places:
            if left >= 0 and is_free(left, width, line):
                taken.append((left, left + width, line))
                ax.text(left, line, label, transform=ax.transAxes, fontsize=6.5, va="center")
                break
