"""Statistics of a stream of steps: exact moments of the kept and of all rows, and skipped tokens by reason."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from wsae.acts.flow import REASONS, ROLE
from wsae.stats.classes import ConsistencyCounts
from wsae.stats.moments import Moments

MOST_CLASSES = 1 << 20
"""A label above would have a name, and sums of every dimension, made for each class below it."""


class SourceStats(NamedTuple):
    """Statistics of one hook's training rows: `kept` set gamma; `all` adds the skipped tokens (padding excepted)."""

    kept: Moments
    all: Moments
    skipped: dict[str, int]
    consistency: Float64[Tensor, " d_in"] | None = None
    """Semantic consistency of each dimension, where the rows are labelled."""

    @classmethod
    def beside(cls, parts: "Sequence[SourceStats]") -> "SourceStats":
        """Return the statistics of rows that hold those of several hooks side by side."""
        kept, every = (Moments.beside(m) for m in zip(*(part[:2] for part in parts), strict=True))
        betas = [part.consistency for part in parts if part.consistency is not None]
        beta = torch.cat(betas) if len(betas) == len(parts) else None
        return cls(kept, every, parts[0].skipped, beta)


class Tally:
    """Running statistics per hook; exact, so their order and grouping do not matter.

    With classes, kept rows bring labels and their consistency is counted.
    """

    def __init__(self, hooks: Mapping[str, int], n_classes: int = 0) -> None:
        self.classes = {
            hook: ConsistencyCounts(d, n_classes) for hook, d in hooks.items() if n_classes
        }
        self.kept = {hook: Moments(d_in) for hook, d_in in hooks.items()}
        self.skipped = {hook: Moments(d_in) for hook, d_in in hooks.items()}
        self.counts: dict[str, int] = dict.fromkeys(REASONS[:ROLE], 0)

    def update(
        self,
        kept: Mapping[str, Float[Tensor, "rows _"]],
        skipped: Mapping[str, Float[Tensor, "skipped _"]],
        counts: Mapping[str, int],
        labels: Int64[Tensor, " labels"] | None = None,
    ) -> None:
        """Add one step's rows and counts, and the kept rows' labels where there are classes."""
        for hook, x in kept.items():
            self.kept[hook].update(x)
            if labels is not None:
                self.classes[hook].update(x, labels)
        for hook, x in skipped.items():
            self.skipped[hook].update(x)
        for reason, n in counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + n

    def result(self) -> dict[str, SourceStats]:
        """Return the statistics so far."""
        counts = {reason: n for reason, n in self.counts.items() if reason != "kept"}
        out = {}
        for hook, kept in self.kept.items():
            every = Moments.from_tensors(kept.tensors())
            every.merge(self.skipped[hook])
            beta = self.classes[hook].consistency() if hook in self.classes else None
            out[hook] = SourceStats(kept, every, counts, beta)
        return out

    def tensors(self) -> dict[str, Tensor]:
        """Return the moments as "<hook>|kept|<name>" and "<hook>|skipped|<name>", class counts as "<hook>|classes"."""
        parts = (("kept", self.kept), ("skipped", self.skipped))
        moments = {
            f"{hook}|{part}|{name}": tensor
            for part, per_hook in parts
            for hook, moments in per_hook.items()
            for name, tensor in moments.tensors().items()
        }
        return moments | {f"{hook}|classes": c.counts for hook, c in self.classes.items()}

    @classmethod
    def restore(
        cls, hooks: Mapping[str, int], tensors: Mapping[str, Tensor], counts: Mapping[str, int]
    ) -> "Tally":
        """Rebuild a tally from `tensors()` and `counts`."""
        tally = cls({})
        tally.kept = {hook: _moments(tensors, f"{hook}|kept|") for hook in hooks}
        tally.skipped = {hook: _moments(tensors, f"{hook}|skipped|") for hook in hooks}
        tally.counts = dict(counts)
        for hook, d_in in hooks.items():
            if (found := tensors.get(f"{hook}|classes")) is not None:
                tally.classes[hook] = ConsistencyCounts(d_in, found.shape[1])
                tally.classes[hook].counts = found.clone()
        return tally


def _moments(tensors: Mapping[str, Tensor], prefix: str) -> Moments:
    return Moments.from_tensors(
        {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    )
