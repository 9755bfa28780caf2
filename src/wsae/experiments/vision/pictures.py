"""Pictures of Figures 4 and 5."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wsae.experiments.panels import Panel
from wsae.experiments.vision.figures import PROXIES, READINGS
from wsae.report.panel_figures import panels_figure

_AXES = {
    "5a": "alpha",
    "5b": "weights by",
    "5c": "alpha",
}


def draw(name: str, panels: Sequence[Panel], out: Path) -> list[Path]:
    """Draw a figure's panels; returns the paths of its pictures."""
    if name == "figure4":
        return panels_figure(_figure4(panels), out / name, "embeddings", 3)
    paths = []
    for part, xlabel in _AXES.items():
        shown = [_drawn(panel) for panel in panels if panel.panel.startswith(part)]
        if shown:
            paths += panels_figure(shown, out / f"{name}{part[1:]}", xlabel, 3)
    return paths


def _figure4(panels: Sequence[Panel]) -> list[dict[str, Any]]:
    """Return a panel for each reading: SAE, WSAE and controls at every backbone and hook."""
    out = []
    for score, words in READINGS.items():
        mine = [panel for panel in panels if panel.score == score]
        lines: dict[str, dict[str, Any]] = {}
        for place, panel in enumerate(mine):
            for series in panel.series:
                line = lines.setdefault(
                    series.method,
                    {"method": series.method, "levels": [], "mean": [], "low": [], "high": []},
                )
                line["levels"].append(place)
                for key in ("mean", "low", "high"):
                    line[key].append(getattr(series, key)[0])
        ticks = [
            f"{panel.panel.partition(': ')[2]}\n{panel.verdict}".replace(", ", "\n")
            for panel in mine
        ]
        title = words[0].upper() + words[1:]
        series = list(lines.values())
        out.append({"title": title, "ylabel": "consistency", "series": series, "ticks": ticks})
    return out


def _drawn(panel: Panel) -> dict[str, Any]:
    part, _, where = panel.panel.partition(": ")
    words = READINGS.get(panel.score, "reconstruction error")
    found: dict[str, Any] = {
        "title": f"({part[1:]}) {where}: {words}\n{panel.verdict}",
        "ylabel": "consistency" if panel.score in READINGS else "FVU",
        "series": [line.to_dict() for line in panel.series],
        "bottom": min(min(line.mean) for line in panel.series if line.mean),
    }
    if part == "5b":
        found["ticks"] = ["SAE", *(word.replace(" of ", "\nof ") for word in PROXIES.values())]
    return found
