"""How each unit (a latent, a dimension) goes with the classes: exact tables in one pass over sparse rows.

Memory is units x classes, whatever the number of samples; a row of codes is never made dense.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int, Int64
from torch import Tensor

from wsae.core.errors import UserError
from wsae.core.seeds import mix64, seed_for
from wsae.stats.chance import x_log2_x
from wsae.stats.consistency import ACTIVE, check_labels
from wsae.stats.strongest import Strongest


class Hits(NamedTuple):
    """Non-zero values of some rows: which row, which unit, how large."""

    row: Int64[Tensor, " hits"]
    unit: Int64[Tensor, " hits"]
    value: Float64[Tensor, " hits"]

    @staticmethod
    def of_codes(values: Float[Tensor, "rows k"], indices: Int[Tensor, "rows k"]) -> "Hits":
        """Return the entries of codes with k values a row; exact zeros (padding) are left out."""
        row, place = values.nonzero(as_tuple=True)
        return Hits(row, indices[row, place].long(), values[row, place].double())

    @staticmethod
    def of_dense(
        x: Float[Tensor, "rows units"], units: Bool[Tensor, " units"] | None = None
    ) -> "Hits":
        """Return the entries of dense rows, of the marked units alone (none: all)."""
        kept = x if units is None else x * units
        row, unit = kept.nonzero(as_tuple=True)
        return Hits(row, unit, x[row, unit].double())

    def active(self, rows: int) -> "Hits":
        """Return the entries above 1e-5 of their row's length."""
        square = torch.bincount(self.row, self.value.square(), minlength=rows)
        norm = square.sqrt().clamp_min(1e-12)
        return self.take(self.value.abs() > ACTIVE * norm[self.row])

    def take(self, keep: Bool[Tensor, " hits"]) -> "Hits":
        """Return some of the entries."""
        return Hits(*(column[keep] for column in self))


class ClassTable:
    """Counts, sums and strongest samples of every unit by class.

    `counts` [units, classes] says on how many samples of a class a unit is active, `sums` adds the positive parts of
    its values, `group_counts` [groups, units, classes] splits the counts by a hash of the image's number, so that
    scores can be computed again without each group (all rows of an image are in one group).
    """

    def __init__(self, units: int, n_classes: int, n_top: int = 20, n_groups: int = 20) -> None:
        if n_classes < 2:
            raise UserError("the samples are all of one class; consistency needs two or more")
        self.units, self.n_classes, self.n_groups = units, n_classes, n_groups
        self.counts: Int64[Tensor, "units n_classes"] = torch.zeros(
            units, n_classes, dtype=torch.int64
        )
        self.sums = torch.zeros(units, n_classes, dtype=torch.float64)
        self.group_counts = torch.zeros(n_groups, units, n_classes, dtype=torch.int32)
        self.totals: Int64[Tensor, " n_classes"] = torch.zeros(n_classes, dtype=torch.int64)
        self.strongest = Strongest(units, n_top)

    def update(
        self, hits: Hits, labels: Int64[Tensor, " labels"], image: Int64[Tensor, " rows"]
    ) -> None:
        """Add rows: their entries, classes and image numbers; raises UserError for a label out of range."""
        check_labels(labels, len(image), self.n_classes)
        self.totals += torch.bincount(labels, minlength=self.n_classes)
        hits = hits.active(len(labels))
        label = labels[hits.row]
        key = hits.unit * self.n_classes + label
        self.counts.view(-1).index_add_(0, key, torch.ones_like(key))
        self.sums.view(-1).index_add_(0, key, hits.value.clamp_min(0.0))
        if self.n_groups:
            group = group_of(image, self.n_groups)[hits.row]
            flat = self.group_counts.view(-1)
            ones = torch.ones(len(key), dtype=torch.int32)
            flat.index_add_(0, group * (self.units * self.n_classes) + key, ones)
        positive = hits.value > 0
        columns = (hits.unit, hits.value, image[hits.row], label)
        self.strongest.update(*(column[positive].numpy() for column in columns))

    @property
    def support(self) -> Int64[Tensor, " units"]:
        """On how many samples each unit is active."""
        return self.counts.sum(1)


def group_of(image: Int64[Tensor, " rows"], n_groups: int) -> Int64[Tensor, " rows"]:
    """Return the group of each image: a hash of its number, the same in every pass."""
    hashed = mix64(image.numpy().astype(np.uint64), seed_for(0, "image groups"))
    return torch.from_numpy((hashed % np.uint64(n_groups)).astype(np.int64))


def selectivity(
    sums: Float64[Tensor, "units n_classes"], totals: Int64[Tensor, " n_classes"]
) -> Float64[Tensor, " units"]:
    """Return the class-selectivity index (mu_max - mu_rest) / (mu_max + mu_rest) (Morcos et al. 2018).

    mu_c = sums_c / totals_c is the mean activation on class c (zeros included), mu_max the largest of them and mu_rest
    the mean of the others; classes without samples are left out. NaN where a unit is never positive. Like the share it
    is 1 for a unit active on a single sample.
    """
    seen = totals > 0
    mean = sums[:, seen] / totals[seen].double()
    top = mean.amax(1)
    rest = (mean.sum(1) - top) / (mean.shape[1] - 1)
    return (top - rest) / (top + rest)


def information(
    counts: Int64[Tensor, "units n_classes"], totals: Int64[Tensor, " n_classes"]
) -> Float64[Tensor, " units"]:
    """Return the plug-in mutual information of "active" and the class, in bits; 0 where a unit is never active.

    I = sum_{a, c} p(a, c) log2 [p(a, c) / (p(a) p(c))]. It is biased upwards by about (classes - 1) / (2 N ln 2).
    """
    n = int(totals.sum())
    active, total = counts.numpy(), totals.numpy()
    support = active.sum(1)
    cells = (x_log2_x(active) + x_log2_x(total - active)).sum(1)
    whole = x_log2_x(np.array([n])) - x_log2_x(total).sum()
    bits = (cells - x_log2_x(support) - x_log2_x(n - support) + whole) / n
    return torch.from_numpy(np.maximum(bits, 0.0))
