"""Scatter panels with named points and reference lines, as PNG and SVG. Needs matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsae.report.panel_figures import STYLES, new_figure, save_figure, shared_legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_GLYPH, _LINE = 0.0135, 0.034
"""Width of a letter and height of a line of a point's name, in shares of a panel."""
_SHIFTS = (0.0, -1.1, 1.1, -2.2, 2.2, -3.3, 3.3, -4.4, 4.4)
"""Where a name may stand beside its point, in lines above it."""

Panel = dict[str, Any]
"""title, xlabel, ylabel; lines: [{label, x, y}]; points: [{label, group, x, y, low, high}]."""


def scatter_figure(panels: Sequence[Panel], path: Path, columns: int = 3) -> list[Path]:
    """Draw panels side by side: lines first, then a named point with its interval for each member; returns both paths.

    Points of one group share colour and marker. `path` is without suffix. Raises UserError without matplotlib.
    """
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure((4.6 * columns, 3.9 * rows + 0.4))
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    groups = list(dict.fromkeys(p["group"] for panel in panels for p in panel["points"]))
    for ax, panel in zip(axes, panels, strict=False):
        _draw(ax, panel, groups)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    shared_legend(figure, columns)
    return [save_figure(figure, path.with_suffix(f".{kind}"), kind) for kind in ("png", "svg")]


def _draw(ax: "Axes", panel: Panel, groups: list[str]) -> None:
    for line, (dash, grey) in zip(panel["lines"], (("-", "0.35"), ("--", "0.6")), strict=False):
        ax.plot(line["x"], line["y"], dash, color=grey, lw=1.3, label=line["label"], zorder=1)
    for point in panel["points"]:
        colour, _, marker = STYLES[groups.index(point["group"]) % len(STYLES)]
        x, y = point["x"], point["y"]
        if point["low"] is not None:
            ax.plot([x, x], [point["low"], point["high"]], color=colour, lw=1, alpha=0.6, zorder=2)
        ax.plot([x], [y], marker, color=colour, ms=4.5, ls="none", label=point["group"], zorder=3)
    _name(ax, panel["points"])
    ax.set_title(panel["title"], loc="left", fontsize=9.5)
    ax.set_xlabel(panel["xlabel"])
    ax.set_ylabel(panel["ylabel"], fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)


def _name(ax: "Axes", points: Sequence[dict[str, Any]]) -> None:
    """Write every point's name to its right, on the nearest line that is free; where none is, on its own."""
    left, right, bottom, top = (float(edge) for edge in (*ax.get_xlim(), *ax.get_ylim()))
    taken: list[tuple[float, float, float]] = []
    for point in sorted(points, key=lambda point: (point["x"], point["y"])):
        x = (float(point["x"]) - left) / (right - left)
        y = (float(point["y"]) - bottom) / (top - bottom)
        x, width = x + 0.015, _GLYPH * len(point["label"])
        lines = [y + shift * _LINE for shift in _SHIFTS]
        free = [line for line in lines if not any(_over((x, line, width), old) for old in taken)]
        line = (free or lines)[0]
        taken.append((x, line, width))
        ax.text(x, line, point["label"], transform=ax.transAxes, fontsize=6.5, va="center")


def _over(a: tuple[float, float, float], b: tuple[float, float, float]) -> bool:
    """Say whether two names (left, middle, width) overlap."""
    apart = a[0] > b[0] + b[2] or b[0] > a[0] + a[2]
    return bool(not apart and abs(a[1] - b[1]) < _LINE)
