"""`wsae reproduce figure4|figure5`: from settings to panels, tables and pictures."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from wsae.core.artifact import read_manifest
from wsae.core.files import write_json, write_text
from wsae.core.progress import Progress
from wsae.experiments.presets import Preset
from wsae.experiments.tables.text import markdown
from wsae.experiments.vision.config import VisionChoices
from wsae.experiments.vision.estimate import announce
from wsae.experiments.vision.figures import figure4, figure5
from wsae.experiments.vision.pictures import draw
from wsae.experiments.vision.pipeline import Workshop, run_vision
from wsae.experiments.vision.plan import FigureName
from wsae.experiments.vision.presets import vision_config
from wsae.experiments.vision.rows import run_rows
from wsae.experiments.vision.text import tables

WORK = "vision"
"""Directory, under the output directory, that both figures share."""


class Place(NamedTuple):
    """Where a figure lives, what the user chose, and whom it tells how far it is."""

    out: Path
    choices: VisionChoices
    progress: Progress
    say: Callable[[str], None]


def reproduce_vision(
    name: FigureName, preset: Preset, place: Place, seed: int = 0, device: str = "cpu"
) -> tuple[dict[str, Any], list[Path]]:
    """Run what is missing of a figure and return its panels and tables, and the files written.

    Raises UserError as the stages do, and before anything starts where there are no images or these have no classes.
    """
    cfg = vision_config(name, preset, place.choices, seed, device)
    shop = Workshop(cfg, place.out / WORK, place.progress, place.say)
    for line in announce(cfg, len(shop.images), torchrun_hint=preset == "paper"):
        place.say(line)
    jobs = run_vision(shop)
    rows = [row for job in jobs for row in run_rows(cfg.plan.runs[job.number], job.path)]
    panels = figure4(rows) if name == "figure4" else figure5(rows)
    shown = tables(rows)
    out = place.out / name
    write_json(out / "rows.json", rows)
    write_text(out / "tables.md", markdown(shown))
    pictures = draw(name, panels, out)
    result = {
        "panels": [panel.to_dict() for panel in panels],
        "tables": shown,
        "backbones": {backbone.name: _probes(shop, backbone.name) for backbone in cfg.used()},
        "runs": [str(job.path) for job in jobs],
        "config": cfg.to_dict(),
    }
    return result, [out / "rows.json", out / "tables.md", *pictures]


def _probes(shop: Workshop, backbone: str) -> Any:
    """Return what a backbone's embeddings know of the classes: accuracies of probes, beside raw pixels'."""
    return read_manifest(shop.model(backbone), "pretrain", verify=False).info.get("probes")
