"""Panels of a reproduced figure as PNG and SVG. Needs matplotlib."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wsae.core.errors import UserError
from wsae.core.files import writing
from wsae.report.rundata import RunData, finite, is_control, read_run
from wsae.report.words import weighting

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The report's key figure as a picture for documents: members side by side, with intervals. Needs
# matplotlib.

COLOURS = ("#7d828c", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#b58900", "#56b4e9")
"""Grey for the plain twin, then Okabe and Ito's colours, which the colour-blind can tell apart."""
_FLOOR = -5.0
"""log10 of the density below which latents are drawn together."""


def summary_figure(run: Path, path: Path, hook: str | None = None) -> Path:
    """Write one PNG comparing a run's members at a hook (the first by default) and return its path.

    Panels: FVU with 95 % intervals, gamma by rank of input variance, density histograms; training curves of FVU stand
    in for what was not evaluated. Raises UserError when the run or the hook is missing or matplotlib is not installed.
    """
    data = read_run(Path(run))
    hook = data.hooks[0] if hook is None else hook
    if hook not in data.hooks:
        raise UserError(f"{run}: has no hook '{hook}' (it has {', '.join(data.hooks)})")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("matplotlib is not installed; pip install 'wsae[report]'") from error
    panels = [draw for draw, there in _panels(data, hook) if there]
    if not panels:
        raise UserError(f"{run}: has neither metrics nor an evaluation of '{hook}' to draw")
    figure = Figure(figsize=(4.1 * len(panels), 3.7), layout="constrained")
    for draw, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        draw(axes, data, hook)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    with writing(Path(path)) as temporary:
        figure.savefig(temporary, format="png", dpi=160, metadata={"Software": None})
    return Path(path)


def _panels(run: RunData, hook: str):
    evaluated = bool(run.evaluated(hook).get("members"))
    has = {
        name: any(key.startswith(f"{hook}|") and key.endswith(f"|{name}") for key in run.arrays)
        for name in ("gamma", "density")
    }
    yield _fvu, evaluated
    yield _gamma, has["gamma"]
    yield _training, bool(run.metrics.get(hook)) and not has["density"]
    yield _density, has["density"]


def _trained(run: RunData, hook: str) -> list[tuple[str, str, str]]:
    """Return (member, colour, label) of the trained members."""
    names = [name for name in run.members(hook) if not is_control(name)]
    return [
        (name, COLOURS[i % len(COLOURS)], _label(run, hook, name)) for i, name in enumerate(names)
    ]


def _label(run: RunData, hook: str, member: str) -> str:
    return (
        member if run.is_plain(hook, member) else weighting(run.gamma_record(hook, member), member)
    )


def _fvu(axes: "Axes", run: RunData, hook: str) -> None:
    members = run.evaluated(hook)["members"]
    for place, (name, colour, _) in enumerate(_trained(run, hook)):
        metrics = members.get(name, {}).get("metrics", {})
        for key, filled, shift in (("fvu", True, -0.12), ("fvu_weighted", False, 0.12)):
            record = metrics.get(key, {})
            value, low, high = (finite(record.get(part)) for part in ("value", "low", "high"))
            if value is None:
                continue
            spread = None if low is None or high is None else [[value - low], [high - value]]
            face = colour if filled else "white"
            axes.errorbar(
                value, place + shift, xerr=spread, fmt="o", color=colour, mfc=face, ms=6, capsize=4
            )
    axes.set_yticks(range(len(_trained(run, hook))), [name for name, *_ in _trained(run, hook)])
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.margins(y=0.25)
    axes.set_title("Held-out error, 95 % intervals", loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel("FVU (● plain, ○ under its own γ)")


def _gamma(axes: "Axes", run: RunData, hook: str) -> None:
    for name, colour, label in _trained(run, hook):
        gamma, variance = run.array(hook, name, "gamma"), run.array(hook, name, "input_variance")
        if gamma is not None:
            order = np.argsort(-(gamma if variance is None else variance), kind="stable")
            axes.loglog(np.arange(1, len(gamma) + 1), gamma[order], color=colour, lw=2, label=label)
    axes.set_title("Loss weight of each dimension", loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel("rank by input variance")
    axes.set_ylabel("γ")


def _density(axes: "Axes", run: RunData, hook: str) -> None:
    for name, colour, label in _trained(run, hook):
        density = run.array(hook, name, "density")
        if density is not None:
            alive = np.log10(density[density > 0])
            bins = np.arange(_FLOOR, 0.01, 0.2).tolist()
            axes.hist(
                np.clip(alive, _FLOOR, 0),
                bins=bins,
                histtype="step",
                lw=1.8,
                color=colour,
                label=label,
            )
    axes.set_title("How often latents fire", loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel("log₁₀ density (share of rows)")
    axes.set_ylabel("latents")


def _training(axes: "Axes", run: RunData, hook: str) -> None:
    for name, colour, label in _trained(run, hook):
        rows = run.metrics.get(hook, {}).get(name, [])
        pairs = [(row.get("tokens"), finite(row.get("fvu"))) for row in rows]
        kept = [(x, y) for x, y in pairs if x is not None and y is not None]
        axes.plot([x for x, _ in kept], [y for _, y in kept], color=colour, lw=1.8, label=label)
    axes.set_yscale("log")
    axes.set_title("Training", loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel("training rows")
    axes.set_ylabel("plain FVU")


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


# Scatter panels with named points and reference lines, as PNG and SVG. Needs matplotlib.

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
        _draw_scatter(ax, panel, groups)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    shared_legend(figure, columns)
    return [save_figure(figure, path.with_suffix(f".{kind}"), kind) for kind in ("png", "svg")]


def _draw_scatter(ax: "Axes", panel: Panel, groups: list[str]) -> None:
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
