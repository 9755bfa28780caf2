"""The bins in which activations are counted: eight per decade, the same for every latent."""

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

PER_DECADE, LOWEST, BINS = 8, -4, 72
"""Eight bins per decade from 1e-4 to 1e5; what lies outside is counted in the last bin of its side."""
DENSITY_EDGES = [-7.0 + 0.25 * i for i in range(29)]
"""The bins in which a member's densities are counted, as powers of ten."""


def bin_of(values: Float64[Tensor, " nnz"]) -> Int64[Tensor, " nnz"]:
    """Return the bin of some activations above 0."""
    return ((values.log10() - LOWEST) * PER_DECADE).floor().long().clamp(0, BINS - 1)


def edge(number: int) -> float:
    """Return the lower edge of a bin, as a power of ten."""
    return LOWEST + number / PER_DECADE


def occupied(counts: list[int]) -> tuple[list[float], list[int]]:
    """Return (edges as powers of ten, counts) of the bins from the first to the last that holds something."""
    used = torch.tensor(counts).nonzero()[:, 0].tolist()
    if not used:
        return [], []
    first, last = used[0], used[-1]
    return [edge(i) for i in range(first, last + 2)], counts[first : last + 1]
