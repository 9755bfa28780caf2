"""Figures of a study: the score by layer, and the score against FVU."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wsae.experiments.sweep.table import select
from wsae.experiments.tables.analysis import FEWER, SLOWER
from wsae.experiments.tables.paper import HALF, ONE, PLAIN
from wsae.experiments.tables.plan import SAEPlan
from wsae.experiments.tables.rows import Row, on_curve, scores_of
from wsae.report.panel_figures import panels_figure
from wsae.report.scatter_figures import scatter_figure

SHOWN = (PLAIN, HALF, ONE, "variance-a0-drop", "variance-a1-drop")
GROUPS = {
    "none": "plain",
    "drop": "outlier dimensions left out",
    "winsor": "variance, winsorised",
    "rank": "variance, ranks",
}


def draw(rows: Sequence[Row], hooks: Sequence[str], sae: SAEPlan, out: Path) -> list[Path]:
    """Draw both figures for the scores there are; returns their paths."""
    paths = []
    scores = scores_of(rows)
    panels = [panel for score in scores for panel in _by_layer(rows, hooks, score)]
    if panels:
        paths += panels_figure(panels, out / "score-by-layer", "hook", 3)
    for score in scores:
        scatter = [_against_fvu(rows, hook, score, sae) for hook in hooks]
        kept = [panel for panel in scatter if panel["points"]]
        if kept:
            paths += scatter_figure(kept, out / f"score-against-fvu-{score}")
    return paths


def _by_layer(rows: Sequence[Row], hooks: Sequence[str], score: str) -> list[dict[str, Any]]:
    """Return a panel of the weights, one of the controls, and one of group Top-k, each beside the plain SAE."""
    controls = dict.fromkeys(row["member"] for row in rows if row["rule"] == "control")
    grouped = [f"{name}-group" for name in (PLAIN, HALF, ONE)]
    choices = {"weights": SHOWN, "controls": (PLAIN, *controls), "group Top-k": (PLAIN, *grouped)}
    ticks = [hook.removeprefix("layers.") for hook in hooks]
    panels = []
    for title, names in choices.items():
        series = [line for name in names if (line := _line(rows, hooks, name, score)) is not None]
        if {line["method"] for line in series} - {PLAIN}:
            about = {"title": f"{score}: {title}", "ylabel": "score", "bottom": 0.5}
            panels.append(about | {"series": series, "ticks": ticks})
    return panels


def _line(
    rows: Sequence[Row], hooks: Sequence[str], name: str, score: str
) -> dict[str, Any] | None:
    found = []
    for place, hook in enumerate(hooks):
        here = [r for r in select(rows, member=name, hook=hook) if r["scores"].get(score)]
        if here:
            first = min(here, key=lambda row: row["seed"])["scores"][score]
            found.append((place, first["value"], first["low"], first["high"]))
    kept = [point for point in found if point[1] is not None]
    if not kept:
        return None
    levels, mean, low, high = (list(column) for column in zip(*kept, strict=True))
    return {"method": name, "levels": levels, "mean": mean, "low": low, "high": high}


def _against_fvu(rows: Sequence[Row], hook: str, score: str, sae: SAEPlan) -> dict[str, Any]:
    here = [row for row in select(rows, hook=hook) if _placed(row, score)]
    seed = min((row["seed"] for row in here), default=0)
    here = select(here, seed=seed)
    plain = [r for r in here if r["rule"] == "none" and r["activation"] == "topk"]
    curves = {
        FEWER: [r for r in plain if r["lr"] == sae.lr],
        SLOWER: [r for r in plain if r["k"] == sae.k],
    }
    lines = []
    for label, curve in curves.items():
        ordered = sorted((_xy(row, score) for row in curve), key=lambda xy: xy[0])
        if len(ordered) > 1:
            x, y = (list(column) for column in zip(*ordered, strict=True))
            lines.append({"label": f"plain: {label.split(', ')[1]}", "x": x, "y": y})
    points = [_named(row, score) for row in here if not on_curve(row, sae)]
    return {"title": hook, "xlabel": "plain FVU", "ylabel": score, "lines": lines, "points": points}


def _placed(row: Row, score: str) -> bool:
    fvu, found = row["metrics"].get("fvu", {}), row["scores"].get(score, {})
    return fvu.get("value") is not None and found.get("value") is not None


def _xy(row: Row, score: str) -> tuple[float, float]:
    return row["metrics"]["fvu"]["value"], row["scores"][score]["value"]


def _named(row: Row, score: str) -> dict[str, Any]:
    x, y = _xy(row, score)
    record = row["scores"][score]
    group = GROUPS.get(row["robust"] if row["rule"] != "none" else "none", "")
    if row["rule"] not in ("none", "variance"):
        group = row["rule"].replace("_", " ")
    elif row["rule"] == "variance" and row["robust"] == "none":
        group = "variance, raw"
    label = row["member"].removeprefix("variance-")
    return {
        "label": label,
        "group": group,
        "x": x,
        "y": y,
        "low": record["low"],
        "high": record["high"],
    }
