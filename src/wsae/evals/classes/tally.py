"""Passes over labelled held-out rows, and the scores of latents that follow.

One pass for what the data are, one for each member's table by class. A member at a time: only one table is in memory,
and what a pass reads again is small beside what it encodes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int, Int64
from torch import Tensor

from wsae.core.errors import UserError
from wsae.core.files import Json
from wsae.core.progress import Progress, quiet
from wsae.core.seeds import seed_for
from wsae.evals.config import ClassesConfig
from wsae.evals.data import HeldOut
from wsae.evals.glossary import CLASS_SCORES
from wsae.evals.intervals import estimate, mean, resampled_means
from wsae.evals.latents import Entries
from wsae.sae import SAE
from wsae.sae.encoding import Encoder
from wsae.stats.classes import (
    Chance,
    ClassTable,
    Hits,
    OverImages,
    corrected_information,
    corrected_share,
    jackknife,
    largest_share,
    minibatch_consistency,
    ncl_summary,
    over_images,
    selectivity,
)
from wsae.stats.moments import Covariance

Encode = Callable[[Float[Tensor, "rows d_in"]], Hits]
Labels = Int[np.ndarray, " images"]
"""The class of every image by its number, from 0; a held-out chunk's `seq` holds such numbers."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Labelled:
    """The held-out rows of one hook with their classes."""

    source: HeldOut
    hook: str
    labels: Labels

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield activations, classes and image numbers of some rows; raises UserError for a row without a class."""
        if self.hook not in self.source.hooks:
            known = ", ".join(self.source.hooks)
            raise UserError(f"the data have no hook {self.hook!r}; they have {known}")
        labels = torch.from_numpy(np.asarray(self.labels, dtype=np.int64))
        for chunk in self.source.heldout(size):
            image = chunk.seq.long()
            known = image < len(labels)
            classes = torch.where(known, labels[image.clamp_max(len(labels) - 1)], -1)
            if bool((classes < 0).any()):
                first = int(image[classes < 0][0])
                raise UserError(
                    f"held-out image {first} has no class; give every held-out image one, numbered from 0"
                )
            yield chunk.x[self.hook], classes, image

    def permuted(self, ground: "Ground", seed: int) -> "Labelled":
        """Return the same rows with the held-out images' classes in a random order."""
        rng = np.random.default_rng(seed_for(seed, "classes", "shuffled", self.hook))
        labels = np.asarray(self.labels, dtype=np.int64).copy()
        images = ground.images.numpy()
        labels[images] = labels[images][rng.permutation(len(images))]
        return Labelled(self.source, self.hook, labels)


@dataclass(frozen=True)
class Ground:
    """What the held-out rows of one hook are, before any member is looked at."""

    rows: int
    totals: Int64[Tensor, " n_classes"]
    """Rows of each class; at least two are not 0."""
    images: Int64[Tensor, " images"]
    """The held-out images' numbers, ascending."""
    mean: Float64[Tensor, " d_in"]
    covariance: Float64[Tensor, "d_in d_in"]
    positive: Bool[Tensor, " d_in"]
    """Dimensions that are above 0 on some row."""


def look(data: Labelled, cfg: ClassesConfig) -> Ground:
    """Read the held-out rows once; raises UserError for none, for NaN, and for classes that are all one."""
    covariance, above, images, counts = None, [], [], []
    for x, classes, image in data.batches(cfg.batch_size):
        covariance = covariance or Covariance(x.shape[1])
        covariance.update(x)
        above.append((x > 0).any(0))
        images.append(image.unique())
        counts.append(torch.bincount(classes))
    if covariance is None:
        raise UserError("there are no held-out images to score on; hold out more data")
    totals = torch.nn.utils.rnn.pad_sequence(counts).sum(1)
    if int((totals > 0).sum()) < 2:
        raise UserError(
            f"the held-out images are all of class {len(totals) - 1}; consistency needs two classes or more"
        )
    return Ground(
        rows=covariance.n,
        totals=totals,
        images=torch.cat(images).unique(),
        mean=covariance.mean,
        covariance=covariance.covariance,
        positive=torch.stack(above).any(0),
    )


def latents_of(sae: SAE) -> Encode:
    """Return what gives a batch's active latents."""
    encoder = Encoder(sae)

    def encode(x: Float[Tensor, "rows d_in"]) -> Hits:
        active = Entries(encoder(x.to(sae.W_dec.device)))
        return Hits(active.rows, active.indices, active.values)

    return encode


@torch.inference_mode()
def tally(
    data: Labelled,
    encode: Encode,
    units: int,
    ground: Ground,
    cfg: ClassesConfig,
    progress: Progress = quiet,
) -> ClassTable:
    """Return one member's table by class over all held-out rows."""
    table = ClassTable(units, len(ground.totals), cfg.n_top, cfg.groups)
    with progress("classes", ground.rows, "rows") as tick:
        for x, classes, image in data.batches(cfg.batch_size):
            table.update(encode(x), classes, image)
            tick(len(x))
    return table


@torch.inference_mode()
def one_minibatch(
    data: Labelled, encode: Encode, ground: Ground, cfg: ClassesConfig
) -> float | None:
    """Return NCL's consistency within one random mini-batch of held-out images; None where there are fewer."""
    if not 0 < cfg.minibatch <= len(ground.images):
        return None
    rng = np.random.default_rng(seed_for(cfg.seed, "classes", "minibatch", data.hook))
    picked = rng.choice(len(ground.images), cfg.minibatch, replace=False)
    chosen = ground.images[torch.from_numpy(picked)]
    rows, labels = [], []
    for x, classes, image in data.batches(cfg.batch_size):
        keep = torch.isin(image, chosen)
        rows.append(x[keep])
        labels.append(classes[keep])
    x, classes = torch.cat(rows), torch.cat(labels)
    hits = encode(x).active(len(x))
    return minibatch_consistency(hits.row, hits.unit, classes)


@dataclass
class Scored:
    """One member or control: its scores by latent, its means without each group of images, and its summary."""

    name: str
    arrays: dict[str, Tensor]
    images: dict[str, OverImages]
    summary: Json
    sae: SAE | None = None
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
            seed = seed_for(cfg.seed, "classes", self.name, score)
            self._resampled[score] = resampled_means(self.known(score), cfg.draws, seed)
        return self._resampled[score]


def scored(name: str, table: ClassTable, chance: Chance, cfg: ClassesConfig) -> Scored:
    """Return the scores of a table's units with their summary; NaN where a unit is not scored.

    Not scored: never active, on fewer than n samples (top), under the minimum of support.
    """
    positive = table.sums.sum(1) > 0  # on some sample: for codes, all that are active
    support, least = table.support, cfg.min_support
    supported = support >= least
    arrays = {
        "support": support,
        "density": support.double() / int(table.totals.sum()),
        "label": table.counts.argmax(1),
        "consistency_ncl": torch.where(positive, largest_share(table.counts), torch.nan),
        "consistency_top": torch.from_numpy(table.strongest.share()),
        "consistency_corrected": corrected_share(table.counts, chance, least),
        "selectivity": torch.where(supported, selectivity(table.sums, table.totals), torch.nan),
        "information": corrected_information(table.counts, table.totals, chance, least),
    }
    ways = {
        "consistency_ncl": largest_share,
        "consistency_corrected": lambda counts: corrected_share(counts, chance),
    }
    groups = {
        score: over_images(table, way, ~arrays[score].isnan() & (support > 0))
        for score, way in ways.items()
    }
    images = {score: found for score, found in groups.items() if found is not None}
    alive = support > 0
    density = arrays["density"][alive].numpy()
    summary: Json = {
        "scores": {score: _mean(arrays[score], cfg) for score in CLASS_SCORES},
        "over_images": {score: _spread(found, cfg) for score, found in images.items()},
        "ncl": ncl_summary(table.counts, positive)._asdict(),
        "chance_top": float(chance.share[cfg.n_top]) if cfg.n_top < len(chance.share) else None,
        "coverage": {
            "latents": table.units,
            "alive": float(alive.double().mean()),
            "supported": float(supported.double().mean()),
            "top": float(np.mean(table.strongest.full())),
        },
        "l0": float(support.sum()) / max(1, int(table.totals.sum())),
        "density": {
            f"{q:g}": float(np.quantile(density, q)) if len(density) else None for q in QUANTILES
        },
    }
    return Scored(name, arrays, images, summary)


def _mean(values: Tensor, cfg: ClassesConfig) -> Json:
    """Return the mean over the scored latents with its bootstrap interval over latents, and their number."""
    known = values[~values.isnan()].numpy()
    return {**estimate(mean(known), cfg.bootstrap())._asdict(), "n": len(known)}


def _spread(found: OverImages, cfg: ClassesConfig) -> Json:
    low, high = jackknife(found, cfg.confidence)
    return {"value": found.value, "low": low, "high": high, "n": len(found.without)}
