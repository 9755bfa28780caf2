"""Semantic consistency per dimension from labels (Wang et al. 2024b; the paper's beta, Section 5.2.2).

The code of Wang et al. counts, for every dimension, the samples on which it is active (|f| > 1e-5 after scaling rows to
length 1) and takes the share of their most frequent class. A dimension active on one sample scores 1 whatever it means,
and one active on all of them scores the share of the largest class: `wsae.stats.chance` corrects for both.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from wsae.core.errors import UserError

ACTIVE = 1e-5
"""A dimension is active on a sample when its value, after L2 normalisation of the row, exceeds this."""


class ConsistencyCounts:
    """Streaming counts [d_in, n_classes] of the samples each dimension is active on; exact and mergeable."""

    def __init__(self, d_in: int, n_classes: int) -> None:
        self.counts: Int64[Tensor, "d_in n_classes"] = torch.zeros(
            d_in, n_classes, dtype=torch.int64
        )

    def update(self, x: Float[Tensor, "rows d_in"], labels: Int64[Tensor, " labels"]) -> None:
        """Add rows with their labels; raises UserError when they differ in number or a label is out of range."""
        check_labels(labels, len(x), self.counts.shape[1])
        norms = x.double().norm(dim=1, keepdim=True).clamp_min(1e-12)
        active = (x.double().abs() / norms > ACTIVE).double()
        classes = torch.zeros(len(x), self.counts.shape[1], dtype=torch.float64)
        classes.scatter_(1, labels[:, None], 1.0)
        self.counts += (active.T @ classes).round().to(torch.int64)

    def consistency(self) -> Float64[Tensor, " d_in"]:
        """Return beta_i, the share of the most frequent label among the samples active in dimension i (0 if none)."""
        return largest_share(self.counts).nan_to_num(0.0)


def check_labels(labels: Int64[Tensor, " labels"], rows: int, n_classes: int) -> None:
    """Raise UserError unless there is one label per row, from 0 to n_classes - 1."""
    if rows != len(labels):
        raise UserError(f"{len(labels)} labels for {rows} rows; give one label per row")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < n_classes:
        raise UserError(
            f"labels run from {int(labels.min())} to {int(labels.max())}; use 0 .. n_classes - 1"
        )


def largest_share(counts: Int64[Tensor, "units n_classes"]) -> Float64[Tensor, " units"]:
    """Return max_c counts[i, c] / sum_c counts[i, c]; NaN where the sum is 0."""
    return counts.amax(1).double() / counts.sum(1).double()


class NclSummary(NamedTuple):
    """What the reference prints of a set of dimensions, as shares rather than percent."""

    mean: float | None
    std: float | None
    """Over dimensions, with n - 1."""
    entropy: float | None
    """Mean over dimensions of -sum_c p_c ln(p_c + 1e-5)."""
    n: int
    """Dimensions averaged."""


def ncl_summary(
    counts: Int64[Tensor, "units n_classes"], positive: Bool[Tensor, " units"] | None = None
) -> NclSummary:
    """Return the mean over dimensions of the share of the most frequent label, as Wang et al.'s `main_eval.py` does.

    Averaged are the dimensions with a positive sum of positive parts (`positive`; none: all) that are active on at
    least one sample. `counts` must come from rows scaled to length 1 over the positive dimensions alone.
    """
    seen = counts.sum(1) > 0
    kept = counts[seen if positive is None else seen & positive]
    if not len(kept):
        return NclSummary(None, None, None, 0)
    share = largest_share(kept)
    p = kept.double() / kept.sum(1, keepdim=True).double()
    entropy = -(p * (p + ACTIVE).log()).sum(1)
    std = float(share.std()) if len(kept) > 1 else None
    return NclSummary(float(share.mean()), std, float(entropy.mean()), len(kept))


def minibatch_consistency(
    rows: Int64[Tensor, " hits"],
    units: Int64[Tensor, " hits"],
    labels: Int64[Tensor, " batch"],
) -> float | None:
    """Return the mean share of the most frequent label within one mini-batch, as the reference's training log has it.

    (rows, units) are the active entries of the batch. Dimensions active on one sample of the batch score 1, so that the
    value depends on the size of the batch: it is here to show how much. None where nothing is active.
    """
    if not len(units):
        return None
    n_classes = int(labels.max()) + 1
    seen, place = units.unique(return_inverse=True)
    keys = place * n_classes + labels[rows]
    counts = torch.bincount(keys, minlength=len(seen) * n_classes).view(len(seen), n_classes)
    return float(largest_share(counts).mean())
