"""Trials: worlds to train on, each with its seed and the labels its scores are kept under."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from wsae.core.seeds import seed_for
from wsae.experiments.sweep.config import ToySweepConfig
from wsae.toy.config import FeatureConfig
from wsae.toy.features import FeatureStream
from wsae.toy.model import ToyModels


@dataclass(frozen=True)
class Trial:
    """One world under one seed: x_p = W_p x with x drawn by `features`."""

    W_p: Float[Tensor, "d_in n_features"]
    features: FeatureConfig
    seed: int
    labels: dict[str, Any]


def toy_trials(cfg: ToySweepConfig, models: ToyModels) -> list[Trial]:
    """Return one trial per sparsity level and seed, on that level's toy model."""
    per_level = cfg.seeds if cfg.toy_seeds == "each" else 1
    trials = []
    for i, level in enumerate(cfg.sparsities):
        for seed in range(cfg.seeds):
            model = i * per_level + seed % per_level
            labels = {"world": "toy", "sparsity": level, "seed": seed}
            features = models.configs[model].features
            trials.append(Trial(models.W_p[model], features, cfg.seed + seed, labels))
    return trials


class Rows:
    """Rows of many worlds at once, for one use ("train", "statistics", "score"); uses never share a draw."""

    def __init__(self, trials: Sequence[Trial], use: str, rows: int) -> None:
        seeds = [seed_for(trial.seed, "sweep", use) for trial in trials]
        self._features = FeatureStream([trial.features for trial in trials], seeds, rows)
        self._W_p = torch.stack([trial.W_p for trial in trials]).float()

    def features(self, step: int) -> Float[Tensor, "worlds rows n_features"]:
        """Return a step's features, valid until the next call."""
        return self._features.batch(step)

    def acts(self, step: int) -> Float[Tensor, "worlds rows d_in"]:
        """Return a step's activations, x_p = W_p x (Eq. 1)."""
        return torch.bmm(self.features(step), self._W_p.mT)
