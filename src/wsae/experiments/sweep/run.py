"""One sweep over toy models from end to end, kept in a directory and made once."""

from pathlib import Path
from typing import Any

from wsae.core.artifact import MANIFEST, read_manifest, write_manifest
from wsae.core.files import read_json, write_json
from wsae.core.progress import Progress, quiet
from wsae.experiments.sweep.config import ToySweepConfig
from wsae.experiments.sweep.scoring import Row, score_trials
from wsae.experiments.sweep.training import train_trials
from wsae.experiments.sweep.trials import toy_trials
from wsae.toy.config import ToyModelConfig
from wsae.toy.model import ToyModels, train_toy_models

ROWS = "rows.json"


def run_sweep(
    cfg: ToySweepConfig,
    out: Path,
    device: str = "cpu",
    progress: Progress = quiet,
    toys: Path | None = None,
) -> list[Row]:
    """Train the sweep's toy models and SAEs, score them, and return one row per SAE.

    The toy models are kept in `toys`, by default `out`/toy.
    Rows are written to `out`; a finished sweep of the same settings is read, not run again.
    Raises UserError as training does.
    """
    done = read_rows(cfg.to_dict(), out)
    if done is not None:
        return done
    models = toy_models(cfg.toy_models(), toys or out / "toy", device, progress)
    trials = toy_trials(cfg, models)
    trained = train_trials(trials, cfg.methods, cfg.training, device, progress)
    rows = score_trials(trials, trained, cfg.training, progress)
    write_rows(rows, cfg.to_dict(), out)
    return rows


def write_rows(rows: list[Row], settings: dict[str, Any], out: Path) -> None:
    """Write the rows of a finished sweep, its settings in the manifest."""
    write_json(out / ROWS, rows)
    write_manifest(out, "sweep", settings, [ROWS], info={"rows": len(rows)})


def read_rows(settings: dict[str, Any], out: Path) -> list[Row] | None:
    """Return the rows of a finished sweep of these settings in `out`, or None."""
    if not (out / MANIFEST).exists():
        return None
    manifest = read_manifest(out, "sweep")
    if manifest.config != as_stored(settings):
        return None
    rows: list[Row] = read_json(out / ROWS)
    return rows


def toy_models(
    cfgs: list[ToyModelConfig], place: Path, device: str = "cpu", progress: Progress = quiet
) -> ToyModels:
    """Return these toy models, from `place` if they are there, else trained and kept there."""
    if (place / MANIFEST).exists():
        models = ToyModels.load(place)
        if list(models.configs) == cfgs:
            return models
    models = train_toy_models(cfgs, progress, device)
    models.save(place)
    return models


def as_stored(value: Any) -> Any:
    """Return a config as JSON gives it back: tuples are lists."""
    if isinstance(value, dict):
        return {key: as_stored(item) for key, item in value.items()}
    return [as_stored(item) for item in value] if isinstance(value, list | tuple) else value
