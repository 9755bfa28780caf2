"""From tables by class to what is reported: scores of every latent, means with intervals, coverage."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from wsae.core.seeds import seed_for
from wsae.evals.classes.config import ClassesConfig
from wsae.evals.glossary import CLASS_SCORES
from wsae.evals.intervals import estimate, mean, resampled_sums
from wsae.sae import SparseAutoencoder
from wsae.stats.classes import (
    Chance,
    ClassTable,
    OverImages,
    corrected_information,
    corrected_share,
    jackknife,
    largest_share,
    ncl_summary,
    over_images,
    selectivity,
)

Json = dict[str, Any]
SCORES = tuple(CLASS_SCORES)
"""Scores of a latent; NaN where it is not scored: never active, on fewer than n samples (top), under the minimum."""
OVER_IMAGES = ("consistency_ncl", "consistency_corrected")
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass
class Scored:
    """One member or control: its scores by latent, its means without each group of images, and its summary."""

    name: str
    arrays: dict[str, Tensor]
    images: dict[str, OverImages]
    summary: Json
    sae: SparseAutoencoder | None = None
    """None for the dimensions of the activations."""
    _resampled: dict[str, Float64[np.ndarray, " draws"]] = field(default_factory=dict)

    def values(self, score: str) -> Float64[np.ndarray, " latents"]:
        """Return a score of every latent, NaN where it is not scored."""
        return self.arrays[score].numpy()

    def known(self, score: str) -> Float64[np.ndarray, " scored"]:
        """Return a score of the latents that have it."""
        values = self.values(score)
        return values[~np.isnan(values)]

    def resampled(self, score: str, cfg: ClassesConfig) -> Float64[np.ndarray, " draws"]:
        """Return the mean score of latents drawn with replacement, for every draw; the same each time it is asked."""
        if score not in self._resampled:
            values, seed = self.known(score), seed_for(cfg.seed, "classes", self.name, score)
            sums = resampled_sums(values[:, None], cfg.draws, seed)[:, 0]
            self._resampled[score] = sums / len(values)
        return self._resampled[score]

    @property
    def density(self) -> Float64[np.ndarray, " latents"]:
        """Share of held-out rows on which each latent is active."""
        return self.arrays["density"].numpy()


def scored(name: str, table: ClassTable, chance: Chance, cfg: ClassesConfig) -> Scored:
    """Return the scores of a table's units with their summary."""
    arrays = unit_scores(table, chance, cfg)
    images = _images(table, chance, arrays)
    counts = ncl_summary(table.counts, _positive(table))
    alive, supported = arrays["support"] > 0, arrays["support"] >= cfg.min_support
    summary: Json = {
        "scores": {name: _mean(arrays[name], cfg) for name in SCORES},
        "over_images": {name: _spread(found, cfg) for name, found in images.items()},
        "ncl": counts._asdict(),
        "chance_top": _at(chance, cfg.n_top),
        "coverage": {
            "latents": table.units,
            "alive": float(alive.double().mean()),
            "supported": float(supported.double().mean()),
            "top": float(np.mean(table.strongest.full())),
        },
        "l0": float(arrays["support"].sum()) / max(1, int(table.totals.sum())),
        "density": _quantiles(arrays["density"][alive]),
    }
    return Scored(name, arrays, images, summary)


def unit_scores(table: ClassTable, chance: Chance, cfg: ClassesConfig) -> dict[str, Tensor]:
    """Return support, density, most frequent class and every score of each unit."""
    support, rows = table.support, int(table.totals.sum())
    known, m = support >= cfg.min_support, cfg.min_support
    ncl = torch.where(_positive(table), largest_share(table.counts), torch.nan)
    selective = torch.where(known, selectivity(table.sums, table.totals), torch.nan)
    return {
        "support": support,
        "density": support.double() / rows,
        "label": table.counts.argmax(1),
        "consistency_ncl": ncl,
        "consistency_top": torch.from_numpy(table.strongest.share()),
        "consistency_corrected": corrected_share(table.counts, chance, m),
        "selectivity": selective,
        "information": corrected_information(table.counts, table.totals, chance, m),
    }


def _positive(table: ClassTable) -> Tensor:
    """Return which units are above 0 on some sample (all that are active, for codes)."""
    return table.sums.sum(1) > 0


def _images(table: ClassTable, chance: Chance, arrays: dict[str, Tensor]) -> dict[str, OverImages]:
    ways = {
        "consistency_ncl": largest_share,
        "consistency_corrected": lambda counts: corrected_share(counts, chance),
    }
    found = {
        name: over_images(table, way, ~arrays[name].isnan() & (arrays["support"] > 0))
        for name, way in ways.items()
    }
    return {name: images for name, images in found.items() if images is not None}


def _mean(values: Tensor, cfg: ClassesConfig) -> Json:
    """Return the mean over the scored latents with its bootstrap interval over latents, and their number."""
    known = values[~values.isnan()].numpy()
    if not len(known):
        return {"value": None, "low": None, "high": None, "n": 0}
    return {**estimate(mean(known), cfg.bootstrap())._asdict(), "n": len(known)}


def _spread(found: OverImages, cfg: ClassesConfig) -> Json:
    low, high = jackknife(found, cfg.confidence)
    return {"value": found.value, "low": low, "high": high, "n": len(found.without)}


def _at(chance: Chance, support: int) -> float | None:
    return float(chance.share[support]) if support < len(chance.share) else None


def _quantiles(density: Tensor) -> Json:
    if not len(density):
        return {f"{q:g}": None for q in QUANTILES}
    found = np.quantile(density.numpy(), QUANTILES)
    return {f"{q:g}": float(value) for q, value in zip(QUANTILES, found, strict=True)}
