"""What the paper's text leaves open, tried in every combination: which reading gives Figures 2 and 3?

Open are the toy model's importances, the optimiser, the SAE's form and start, and how long it trains; L_GT may compare
latent i with feature i as written (Eq. 10), or match them first. Beside WSAE with the paper's raw weights stand WSAE
with mean weight 1, and the plain SAE at WSAE's loss scale: what both share is not due to weighting.
"""

from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, Literal

from wsae.core.config import Config
from wsae.core.progress import Progress, quiet
from wsae.experiments.figures import LOW, NEGLIGIBLE, judged, relative
from wsae.experiments.presets import LR, Preset, toy_sweep, training
from wsae.experiments.sweep.config import PLAIN, SCALED, UNIT, WSAE, ToySweepConfig, methods
from wsae.experiments.sweep.run import Row, run_sweep
from wsae.experiments.sweep.table import mean_interval, rank_correlation, series
from wsae.toy.config import DecayingImportance, EqualImportance

SGD_LR = 3e-3
"""The largest of 1e-4, 3e-4, 1e-3, 3e-3, 1e-2 at which gradient descent is stable at every S."""
SHORT = 0.1
"""Length of a short training, as a share of the long one."""


class Reading(Config):
    """One combination of what the paper leaves open."""

    importance: Literal["equal", "decay"]
    optimizer: Literal["adam", "sgd"]
    form: Literal["tied", "tied, small start", "untied"]
    """tied: unit rows at the start. small start: rows of length 0.1. untied: with biases, unit decoder rows."""
    length: Literal["long", "short"]

    @property
    def label(self) -> str:
        """A short name."""
        return f"{self.importance} importance, {self.optimizer}, {self.form}, {self.length}"


def all_readings() -> Iterator[Reading]:
    """Yield every combination."""
    forms = ("tied", "tied, small start", "untied")
    choices = product(("equal", "decay"), ("adam", "sgd"), forms, ("long", "short"))
    for importance, optimizer, form, length in choices:
        yield Reading(importance=importance, optimizer=optimizer, form=form, length=length)


def reading_sweep(reading: Reading, preset: Preset, seed: int) -> ToySweepConfig:
    """Return the sweep of one reading."""
    base = toy_sweep(preset, seed)
    long = training(preset).bank.steps if preset == "tiny" else 3000
    steps = long if reading.length == "long" else max(1, round(SHORT * long))
    form: dict[str, Any] = {"tied": reading.form != "untied"}
    if reading.form == "tied, small start":
        form["init_scale"] = 0.1
    lr = LR if reading.optimizer == "adam" else SGD_LR
    decay = DecayingImportance(last=0.01)
    levels = base.sparsities if preset == "tiny" else (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99)
    return base.model_copy(
        update={
            "importance": decay if reading.importance == "decay" else EqualImportance(),
            "sparsities": levels,
            "seeds": min(3, base.seeds),
            "methods": methods(base.n_features, lr=lr, **form),
            "training": training(preset, steps=steps, optimizer=reading.optimizer),
        }
    )


def run_readings(
    preset: Preset,
    out: Path,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = quiet,
    say: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Run every reading (each kept in its own directory of `out`) and return one summary per reading."""
    found = []
    for i, reading in enumerate(all_readings()):
        cfg = reading_sweep(reading, preset, seed)
        place = out / f"reading-{i:02d}"
        say(f"reading {i + 1}: {reading.label}")
        rows = run_sweep(cfg, place, device, progress, toys=out / f"toy-{reading.importance}")
        found.append({**reading.to_dict(), "label": reading.label, **summary(rows)})
    return found


def summary(rows: list[Row]) -> dict[str, Any]:
    """Return what one reading says of each panel: relative differences at low S, and verdicts."""
    plain = series(rows, PLAIN, "activated_sum")
    out: dict[str, Any] = {
        "figure 2": rank_correlation(list(plain), [m.value for m in plain.values()]),
        "settled": max(row.get("loss_still_falling", 0.0) for row in rows),
    }
    scores = {
        "3a raw": ("gt_raw", True),
        "3a matched": ("gt_matched", True),
        "3b raw": ("gt_raw_active", True),
        "3b matched": ("gt_matched_active", True),
        "3c": ("sae_loss", None),
        "3d": ("latent_variance_mean", False),
    }
    for panel, (score, lower) in scores.items():
        out[panel] = _low(rows, WSAE, score)
        out[f"{panel}, scale alone"] = _low(rows, SCALED, score)
        out[f"{panel}, weights alone"] = _low(rows, UNIT, score)
        if lower is not None:
            differences = relative(rows, WSAE, PLAIN, score)
            low = [d for level, d in differences.items() if level <= LOW]
            out[f"{panel} verdict"] = judged(low, lower, NEGLIGIBLE)
    return out


def _low(rows: list[Row], method: str, score: str) -> float:
    """Return the mean relative difference from the plain SAE over S <= 0.5."""
    found = relative(rows, method, PLAIN, score)
    return mean_interval([d.value for level, d in found.items() if level <= LOW]).value
