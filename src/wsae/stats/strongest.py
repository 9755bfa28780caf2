"""The n samples on which each unit is strongest, with their classes, in one pass and bounded memory."""

import numpy as np
from jaxtyping import Float64, Int64


class Strongest:
    """Running top n of every unit: memory is units x n x 24 bytes, whatever the number of samples.

    Equal values are taken by ascending place, so that the result does not depend on how samples are split or ordered.
    """

    def __init__(self, units: int, n: int) -> None:
        self.n = n
        self.value: Float64[np.ndarray, "units n"] = np.full((units, n), -np.inf)
        self.place: Int64[np.ndarray, "units n"] = np.full((units, n), -1, dtype=np.int64)
        """The samples' numbers, strongest first; -1 where there are fewer than n."""
        self.label: Int64[np.ndarray, "units n"] = np.full((units, n), -1, dtype=np.int64)

    def update(
        self,
        unit: Int64[np.ndarray, " hits"],
        value: Float64[np.ndarray, " hits"],
        place: Int64[np.ndarray, " hits"],
        label: Int64[np.ndarray, " hits"],
    ) -> None:
        """Add activations: of which unit, how strong, on which sample, of which class."""
        enters = value >= self.value[unit, -1]
        columns = [column[enters] for column in (unit, value, place, label)]
        touched = np.unique(columns[0])
        kept, where = (self.place[touched] >= 0).nonzero()
        old = touched[kept]
        held = (old, self.value[old, where], self.place[old, where], self.label[old, where])
        unit, value, place, label = (
            np.concatenate(pair) for pair in zip(held, columns, strict=True)
        )
        order = np.lexsort((place, -value, unit))
        ordered = unit[order]
        start = np.searchsorted(ordered, ordered, side="left")
        rank = np.arange(len(order)) - start
        order, rank = order[rank < self.n], rank[rank < self.n]
        unit = unit[order]
        self.value[unit, rank], self.place[unit, rank] = value[order], place[order]
        self.label[unit, rank] = label[order]

    def full(self) -> np.ndarray:
        """Return which units have n samples [units]."""
        return self.place[:, -1] >= 0

    def share(self) -> Float64[np.ndarray, " units"]:
        """Return the share of the most frequent class among the n strongest samples; NaN where there are fewer."""
        ordered = np.sort(self.label, axis=1)
        run = np.ones(len(ordered), dtype=np.int64)
        best = run.copy()
        for j in range(1, self.n):
            run = np.where(ordered[:, j] == ordered[:, j - 1], run + 1, 1)
            best = np.maximum(best, run)
        return np.where(self.full(), best / self.n, np.nan)
