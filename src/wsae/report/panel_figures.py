"""Panels of a reproduced figure as PNG and SVG. Needs matplotlib."""

import textwrap
from collections.abc import Sequence
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

    `path` is without suffix; PNG and SVG are written. Raises UserError when matplotlib is not installed.
    """
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure((3.6 * columns, 3.3 * rows + 0.5))
    axes = figure.subplots(rows, columns, squeeze=False).flat
    names = list(dict.fromkeys(line["method"] for panel in panels for line in panel["series"]))
    for ax, panel in zip(axes, panels, strict=False):
        _draw(ax, panel, names, xlabel)
    for ax in list(axes)[len(panels) :]:
        ax.set_visible(False)
    shared_legend(figure, columns)
    return [save_figure(figure, path.with_suffix(f".{kind}"), kind) for kind in ("png", "svg")]


def shared_legend(figure: "Figure", columns: int) -> None:
    """Name each line and marker once, below all panels."""
    seen: dict[str, Any] = {}
    for ax in figure.axes:
        handles, labels = ax.get_legend_handles_labels()
        seen |= dict(zip(labels, handles, strict=True))
    columns = min(4, 2 * columns)
    figure.legend(
        seen.values(), seen.keys(), loc="outside lower center", ncols=columns, frameon=False
    )


def new_figure(size: tuple[float, float]) -> "Figure":
    """Return an empty figure of this size in inches; raises UserError when matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("matplotlib is not installed; pip install 'wsae[report]'") from error
    return Figure(figsize=size, layout="constrained")


def _draw(ax: "Axes", panel: dict[str, Any], names: list[str], xlabel: str) -> None:
    for line in panel["series"]:
        colour, dash, marker = STYLES[names.index(line["method"]) % len(STYLES)]
        if panel.get("ticks"):
            _draw_at_places(ax, line, colour, marker, _shift(line, panel))
            continue
        x, y = line["levels"], line["mean"]
        ax.plot(x, y, color=colour, ls=dash, marker=marker, ms=3.5, lw=1.5, label=line["method"])
        if all(edge is not None for edge in (*line["low"], *line["high"])):
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


def _shift(line: dict[str, Any], panel: dict[str, Any]) -> float:
    """Return how far beside a place a method's points stand, so that they do not hide each other."""
    methods = [other["method"] for other in panel["series"]]
    return SPREAD * ((methods.index(line["method"]) + 0.5) / len(methods) - 0.5)


def _draw_at_places(
    ax: "Axes", line: dict[str, Any], colour: str, marker: str, shift: float
) -> None:
    """Draw points with their intervals: between named places there is nothing, so no line."""
    x, y = [level + shift for level in line["levels"]], line["mean"]
    spans = None
    if all(edge is not None for edge in (*line["low"], *line["high"])):
        below = [mean - low for mean, low in zip(y, line["low"], strict=True)]
        spans = [below, [high - mean for mean, high in zip(y, line["high"], strict=True)]]
    ax.errorbar(x, y, yerr=spans, color=colour, fmt=marker, ms=4.5, lw=1.2, label=line["method"])


def save_figure(figure: "Figure", path: Path, kind: str) -> Path:
    """Write a figure as png or svg, the same bytes each time."""
    metadata = {"Software": None} if kind == "png" else {"Date": None}
    with writing(path) as temporary:
        figure.savefig(temporary, format=kind, dpi=150, metadata=metadata)
    return path
