"""Semantic consistency per dimension from labels (Wang et al. 2024b; the paper's beta, Section 5.2.2)."""

import torch
from jaxtyping import Float, Float64, Int64
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
        if len(x) != len(labels):
            raise UserError(f"{len(labels)} labels for {len(x)} rows; give one label per row")
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.counts.shape[1]:
            raise UserError(
                f"labels run from {int(labels.min())} to {int(labels.max())}; use 0 .. n_classes - 1"
            )
        norms = x.double().norm(dim=1, keepdim=True).clamp_min(1e-12)
        active = (x.double().abs() / norms > ACTIVE).double()
        classes = torch.zeros(len(x), self.counts.shape[1], dtype=torch.float64)
        classes.scatter_(1, labels[:, None], 1.0)
        self.counts += (active.T @ classes).round().to(torch.int64)

    def consistency(self) -> Float64[Tensor, " d_in"]:
        """Return beta_i, the share of the most frequent label among the samples active in dimension i (0 if none)."""
        totals = self.counts.sum(1)
        return self.counts.max(1).values.double() / totals.clamp_min(1).double()
