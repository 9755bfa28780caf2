"""Statistics of a stream of steps: exact moments of the kept and of all rows, and skipped tokens by reason."""

from collections.abc import Mapping
from typing import NamedTuple

from jaxtyping import Float, Float64
from torch import Tensor

from wsae.acts.skip import REASONS
from wsae.stats.moments import Moments


class SourceStats(NamedTuple):
    """Statistics of one hook's training rows: `kept` set gamma; `all` adds the skipped tokens (padding excepted)."""

    kept: Moments
    all: Moments
    skipped: dict[str, int]
    consistency: Float64[Tensor, " d_in"] | None = None
    """Semantic consistency of each dimension, where the rows are labelled."""


class Tally:
    """Running statistics per hook; exact, so their order and grouping do not matter."""

    def __init__(self, hooks: Mapping[str, int]) -> None:
        self.kept = {hook: Moments(d_in) for hook, d_in in hooks.items()}
        self.skipped = {hook: Moments(d_in) for hook, d_in in hooks.items()}
        self.counts: dict[str, int] = dict.fromkeys(REASONS, 0)

    def update(
        self,
        kept: Mapping[str, Float[Tensor, "rows _"]],
        skipped: Mapping[str, Float[Tensor, "skipped _"]],
        counts: Mapping[str, int],
    ) -> None:
        """Add one step's rows and counts."""
        for hook, x in kept.items():
            self.kept[hook].update(x)
        for hook, x in skipped.items():
            self.skipped[hook].update(x)
        for reason, n in counts.items():
            self.counts[reason] += n

    def result(self) -> dict[str, SourceStats]:
        """Return the statistics so far."""
        counts = {reason: n for reason, n in self.counts.items() if reason != "kept"}
        out = {}
        for hook, kept in self.kept.items():
            every = Moments.from_tensors(kept.tensors())
            every.merge(self.skipped[hook])
            out[hook] = SourceStats(kept, every, counts)
        return out

    def tensors(self) -> dict[str, Tensor]:
        """Return the moments as tensors named "<hook>|kept|<name>" and "<hook>|skipped|<name>"."""
        parts = (("kept", self.kept), ("skipped", self.skipped))
        return {
            f"{hook}|{part}|{name}": tensor
            for part, per_hook in parts
            for hook, moments in per_hook.items()
            for name, tensor in moments.tensors().items()
        }

    @classmethod
    def restore(
        cls, hooks: Mapping[str, int], tensors: Mapping[str, Tensor], counts: Mapping[str, int]
    ) -> "Tally":
        """Rebuild a tally from `tensors()` and `counts`."""
        tally = cls({})
        tally.kept = {hook: _moments(tensors, f"{hook}|kept|") for hook in hooks}
        tally.skipped = {hook: _moments(tensors, f"{hook}|skipped|") for hook in hooks}
        tally.counts.update(counts)
        return tally


def _moments(tensors: Mapping[str, Tensor], prefix: str) -> Moments:
    return Moments.from_tensors(
        {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    )
