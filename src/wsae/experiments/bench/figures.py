"""Pictures of a run: tokens per second beside the floor, and how cost scales. Needs matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsae.core.errors import UserError
from wsae.core.files import writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OURS, PEER, FLOOR = "#d55e00", "#3b4252", "#009e73"
LABELS = {"ms": "ms a step", "extra_mib": "peak memory above the imports, MiB"}


def need_matplotlib() -> None:
    """Raise UserError when matplotlib is not installed, so that no run is lost over its pictures."""
    try:
        import matplotlib.figure  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise UserError(
            "--out draws pictures: matplotlib is not installed; pip install 'wsae[report]'"
        ) from error


def speed_figure(blocks: Sequence[dict[str, Any]], path: Path) -> Path:
    """Draw each block's tokens/s as bars, ours in colour, the floor as a line; returns `path`, a PNG."""
    from matplotlib.figure import Figure

    height = sum(max(1, len(_measured(block))) for block in blocks)
    figure = Figure(figsize=(8, 0.28 * height + 0.9 * len(blocks)), layout="constrained")
    ratios = [max(1, len(_measured(block))) + 1 for block in blocks]
    axes = figure.subplots(len(blocks), 1, squeeze=False, height_ratios=ratios).flat
    for ax, block in zip(axes, blocks, strict=True):
        _bars(ax, block)
    return _save(figure, path)


def scaling_figure(fits: Sequence[dict[str, Any]], path: Path) -> Path:
    """Draw time and memory against every axis, log-log, with the fitted power; returns `path`, a PNG."""
    from matplotlib.figure import Figure

    axes_names = list(dict.fromkeys(fit["axis"] for fit in fits))
    quantities = list(dict.fromkeys(fit["quantity"] for fit in fits))
    figure = Figure(figsize=(3.4 * len(axes_names), 3.0 * len(quantities)), layout="constrained")
    grid = figure.subplots(len(quantities), len(axes_names), squeeze=False)
    for fit in fits:
        ax = grid[quantities.index(fit["quantity"]), axes_names.index(fit["axis"])]
        _power(ax, fit)
    return _save(figure, path)


def _measured(block: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in block["rows"] if "ms" in row]


def _bars(ax: "Axes", block: dict[str, Any]) -> None:
    rows = sorted(_measured(block), key=lambda row: row["tokens_per_s"])
    speeds = [row["tokens_per_s"] for row in rows]
    colours = [OURS if row["library"] == "wsae" else PEER for row in rows]
    ax.barh([row["variant"] for row in rows], speeds, color=colours)
    for place, speed in enumerate(speeds):
        ax.text(speed, place, f" {speed:,.0f}", va="center", fontsize=7)
    if block["floor_ms"] and rows:
        floor = 1e3 * rows[0]["batch"] / block["floor_ms"]
        ax.axvline(floor, color=FLOOR, ls="--", lw=1)
        ax.text(floor, len(rows) - 0.4, "floor", color=FLOOR, fontsize=7, ha="right")
    ax.set_title(block["title"], loc="left", fontsize=8)
    ax.set_xlabel("tokens/s", fontsize=8)
    ax.tick_params(labelsize=7)
    ax.spines[["top", "right"]].set_visible(False)


def _power(ax: "Axes", fit: dict[str, Any]) -> None:
    x, y = zip(*fit["points"], strict=True)
    ax.loglog(x, y, "o", color=OURS, ms=4)
    middle = (x[0] * x[-1]) ** 0.5
    height = 1.0
    for value in y:
        height *= value ** (1 / len(y))
    ends = [height * (end / middle) ** fit["exponent"] for end in (x[0], x[-1])]
    ax.loglog([x[0], x[-1]], ends, color=PEER, lw=1)
    ax.set_xticks(x, [f"{value:g}" for value in x], fontsize=7, minor=False)
    ax.set_ylim(min(y) / 1.5, max(y) * 1.5)
    ax.set_yticks(y, [f"{value:,.3g}" for value in y], fontsize=7)
    ax.minorticks_off()
    ax.set_title(f"exponent {fit['exponent']:.2f}", loc="left", fontsize=9)
    ax.set_xlabel(fit["axis"])
    ax.set_ylabel(LABELS[fit["quantity"]], fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)


def _save(figure: Any, path: Path) -> Path:
    with writing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150, metadata={"Software": None})
    return path
