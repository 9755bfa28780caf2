"""Passes over labelled held-out rows: one for what the data are, one for each member's table by class.

A member at a time: only one table is in memory, and what a pass reads again is small beside what it encodes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int, Int64
from torch import Tensor

from wsae.core.errors import UserError
from wsae.core.progress import Progress, quiet
from wsae.core.seeds import seed_for
from wsae.evals.classes.config import ClassesConfig
from wsae.evals.data import HeldOut
from wsae.evals.measure import check_width
from wsae.sae import SparseAutoencoder
from wsae.sae.encoding import Encoder
from wsae.stats.classes import ClassTable, Hits, minibatch_consistency
from wsae.stats.moments import Covariance

Encode = Callable[[Float[Tensor, "rows d_in"]], Hits]
Labels = Int[np.ndarray, " images"]
"""The class of every image by its number, from 0; a held-out chunk's `seq` holds such numbers."""


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
    covariance, positive, images, counts = None, None, [], []
    for x, classes, image in data.batches(cfg.batch_size):
        covariance = covariance or Covariance(x.shape[1])
        covariance.update(x)
        above = (x > 0).any(0)
        positive = above if positive is None else positive | above
        images.append(image.unique())
        counts.append(torch.bincount(classes))
    if covariance is None or positive is None:
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
        positive=positive,
    )


def latents_of(sae: SparseAutoencoder) -> Encode:
    """Return what gives a batch's active latents."""
    encoder = Encoder(sae)

    def encode(x: Float[Tensor, "rows d_in"]) -> Hits:
        code = encoder(x.to(sae.W_dec.device))
        rows, active = code.rows(), code.values != 0
        columns = (rows[active], code.indices[active], code.values[active].double())
        return Hits(*(column.cpu() for column in columns))

    return encode


def dimensions_of(ground: Ground) -> Encode:
    """Return what gives a batch's values of the dimensions that are ever positive."""
    return lambda x: Hits.of_dense(x, ground.positive)


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


def check_members(saes: dict[str, SparseAutoencoder], d_in: int) -> None:
    """Raise UserError unless there is a member and all take rows of this width."""
    if not saes:
        raise UserError("there is no member to score")
    for name, sae in saes.items():
        check_width(name, sae.cfg.d_in, d_in)
