"""`wsae reproduce`: a figure or table of the paper, measured again, the paper's statement beside ours."""

from pathlib import Path
from typing import Any

from wsae.core.files import locked, write_json
from wsae.studies.benchmark import run_benchmark, run_noise
from wsae.studies.drawing import panels_figure
from wsae.studies.engine import Panel, Reproduction, reproduce_study
from wsae.studies.figures import figure2, figure3, run_readings, run_worlds
from wsae.studies.reproduce_config import (
    Name,
    TableChoices,
    VisionChoices,
    study_config,
    vision_config,
)
from wsae.studies.sweep import run_sweep
from wsae.studies.sweep_config import toy_sweep

TITLES = {
    "gt_raw": "ground-truth loss (Eq. 10)",
    "gt_raw_active": "ground-truth loss, non-zero features",
    "sae_loss": "reconstruction loss of x_p (Eq. 4)",
    "latent_variance_mean": "variance of the latents",
}


def reproduce(
    name: Name,
    at: Reproduction,
    tables: TableChoices = TableChoices(),  # noqa: B008  (frozen)
    vision: VisionChoices = VisionChoices(),  # noqa: B008  (frozen)
) -> dict[str, Any]:
    """Run what is missing in `at.out`, write NAME.json there and its pictures, and return the result.

    Figures 2 and 3 share one sweep, Figures 4 and 5 backbones and SAEs; `vision` is what these two take beside a
    preset, `tables` what the tables take. `readings` tries every reading of what the paper leaves open in training,
    `worlds` every reading of its toy world; `recovery` is the wider benchmark of methods, gamma rules and worlds,
    `noise` the one with noisy worlds; `remedy` asks what helps (docs/remedy.md). Raises UserError as training does.
    """
    out, files = at.out, []
    with locked(out):
        match name:
            case "figure2" | "figure3":
                result, files = _toy_figure(name, at)
            case "readings":
                result = {"readings": run_readings(at)}
            case "worlds":
                result = run_worlds(at)
            case "recovery":
                result, files = run_benchmark(at)
            case "noise":
                result, files = run_noise(at)
            case "figure4" | "figure5":  # as the tables: brings transformers
                from wsae.studies.vision import FigureStudy

                cfg = vision_config(name, at.preset, vision, at.seed, at.device)
                study = FigureStudy(cfg, out / "vision", at.progress, at.say, at.device)
                study.torchrun_hint = at.preset == "paper"
                result, files = reproduce_study(study, out / name)
            case _:  # brings transformers, which the toy models do not need
                from wsae.studies.tables import RemedyStudy, TableStudy

                cfg = study_config(name, at.preset, out, tables, at.seed, at.device)
                where = (out / name, at.progress, at.say, at.device)
                recipe = RemedyStudy if name == "remedy" else TableStudy
                result, files = reproduce_study(recipe(cfg, *where, tables, at.preset), out / name)
        result = {"name": name, "preset": at.preset, "seed": at.seed, **result}
        write_json(out / f"{name}.json", result)
    return {**result, "files": [str(out / f"{name}.json"), *map(str, files)]}


def _toy_figure(name: Name, at: Reproduction) -> tuple[dict[str, Any], list[Path]]:
    cfg = toy_sweep(at.preset, at.seed)
    rows = run_sweep(cfg, at.out / "sweep", at.device, at.progress)
    panels = figure2(rows) if name == "figure2" else figure3(rows)
    pictures = panels_figure([drawn(panel) for panel in panels], at.out / name)
    described = [*panels, *(figure3(rows, "matched")[:2] if name == "figure3" else ())]
    return {
        "panels": [panel.to_dict() for panel in described],
        "loss_still_falling": max(row.get("loss_still_falling", 0.0) for row in rows),
        "config": cfg.to_dict(),
    }, pictures


def drawn(panel: Panel) -> dict[str, Any]:
    """Return a panel as `panels_figure` draws it."""
    number, _, words = panel.panel.partition(": ")
    title = f"({number[1:]}) {panel.verdict}" if not words else f"{words}\n{panel.verdict}"
    return {
        "title": title,
        "ylabel": TITLES.get(panel.score, "features per latent"),
        "series": [line.to_dict() for line in panel.series],
        "log": panel.score == "sae_loss",
    }
