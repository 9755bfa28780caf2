"""`wsae reproduce`: a figure or table of the paper, measured again, the paper's statement beside ours."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from wsae.core.files import locked, write_json
from wsae.core.progress import Progress, quiet
from wsae.experiments.benchmark import run_benchmark
from wsae.experiments.engine import reproduce_study
from wsae.experiments.figures import Panel, figure2, figure3
from wsae.experiments.presets import Preset, toy_sweep
from wsae.experiments.readings import run_readings
from wsae.experiments.sweep.run import run_sweep
from wsae.experiments.tables.config import StudyName, TableChoices, study_config
from wsae.experiments.vision.config import FigureName, VisionChoices, vision_config
from wsae.report.panel_figures import panels_figure

Name = Literal["figure2", "figure3", "readings", "recovery"] | StudyName | FigureName

TITLES = {
    "gt_raw": "ground-truth loss (Eq. 10)",
    "gt_raw_active": "ground-truth loss, non-zero features",
    "sae_loss": "reconstruction loss of x_p (Eq. 4)",
    "latent_variance_mean": "variance of the latents",
}


@dataclass(frozen=True)
class Setting:
    """How large a reproduction is, where it lives, and whom it tells how far it is."""

    preset: Preset
    out: Path
    seed: int = 0
    device: str = "cpu"
    progress: Progress = quiet
    say: Callable[[str], None] = lambda _: None
    choices: TableChoices = TableChoices()
    """What the tables take beside a preset."""
    vision: VisionChoices = VisionChoices()
    """What Figures 4 and 5 take beside a preset."""


def reproduce(name: Name, setting: Setting) -> dict[str, Any]:
    """Run what is missing in the setting's `out`, write NAME.json there and its pictures, and return the result.

    Figures 2 and 3 share one sweep, Figures 4 and 5 backbones and SAEs. `readings` tries every reading of what the
    paper leaves open; `recovery` is the wider benchmark of methods, gamma rules and worlds. Raises UserError as
    training does.
    """
    out = setting.out
    with locked(out):
        result, files = _run(name, setting)
        result = {"name": name, "preset": setting.preset, "seed": setting.seed, **result}
        write_json(out / f"{name}.json", result)
    return {**result, "files": [str(out / f"{name}.json"), *map(str, files)]}


def _run(name: Name, at: Setting) -> tuple[dict[str, Any], list[Path]]:
    match name:
        case "figure2" | "figure3":
            return _figure(name, at)
        case "readings":
            found = run_readings(at.preset, at.out, at.seed, at.device, at.progress, at.say)
            return {"readings": found}, []
        case "recovery":
            return run_benchmark(at.preset, at.out, at.seed, at.device, at.progress, at.say)
        case "figure4" | "figure5":  # as the tables: brings transformers
            from wsae.experiments.vision.study import FigureStudy

            cfg = vision_config(name, at.preset, at.vision, at.seed, at.device)
            hint = at.preset == "paper"
            study = FigureStudy(cfg, at.out / "vision", at.progress, at.say, hint)
        case _:  # brings transformers, which the toy models do not need
            from wsae.experiments.tables.study import TableStudy

            cfg = study_config(name, at.preset, at.out, at.choices, at.seed, at.device)
            study = TableStudy(cfg, at.out / name, at.progress, at.say, at.choices, at.preset)
    return reproduce_study(study, at.out / name)


def _figure(name: Name, at: Setting) -> tuple[dict[str, Any], list[Path]]:
    cfg = toy_sweep(at.preset, at.seed)
    rows = run_sweep(cfg, at.out / "sweep", at.device, at.progress)
    panels = figure2(rows) if name == "figure2" else figure3(rows)
    shown = [drawn(panel) for panel in panels]
    pictures = panels_figure(shown, at.out / name)
    settled = max(row.get("loss_still_falling", 0.0) for row in rows)
    described = [panel.to_dict() for panel in panels]
    if name == "figure3":
        described += [panel.to_dict() for panel in figure3(rows, "matched")[:2]]
    return {"panels": described, "loss_still_falling": settled, "config": cfg.to_dict()}, pictures


def drawn(panel: Panel) -> dict[str, Any]:
    """Return a panel as `panels_figure` draws it."""
    number, _, words = panel.panel.partition(": ")
    title = f"({number[1:]}) {panel.verdict}" if not words else f"{words}\n{panel.verdict}"
    label = TITLES.get(panel.score, "features per latent")
    return {
        "title": title,
        "ylabel": label,
        "series": [line.to_dict() for line in panel.series],
        "log": panel.score == "sae_loss",
    }
