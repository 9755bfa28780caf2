"""Superposition matrices that the claims on weights are tried on."""

import torch
from torch import Tensor

from wsae.core.seeds import seed_for
from wsae.theory.geometry import (
    digons,
    direct_sum,
    nonpositive,
    orthogonal,
    polygon,
    random_unit,
    simplex,
)
from wsae.theory.losses import closed_form, grid, sae_loss

EXAMPLE_1 = direct_sum(orthogonal(1), digons(1))
"""Example 1's W_p: a monosemantic dimension and one that two features share."""


def gram(W_p: Tensor) -> Tensor:
    """Return W_p W_p^T: the covariance of x_p for iid features of variance 1."""
    return W_p @ W_p.T


def rotation(seed: int, number: int, d: int) -> Tensor:
    """Return a random orthogonal matrix [d, d]."""
    made = torch.Generator().manual_seed(seed_for(seed, "rotation", number, d))
    return torch.linalg.qr(torch.randn(d, d, generator=made, dtype=torch.float64)).Q


def blocks(seed: int, count: int) -> list[Tensor]:
    """Return direct sums of one monosemantic dimension and two to four random blocks."""
    made = torch.Generator().manual_seed(seed_for(seed, "blocks"))
    kinds = (orthogonal(1), digons(1), polygon(3), polygon(5), simplex(4))
    worlds = []
    for _ in range(count):
        size = int(torch.randint(2, 5, (1,), generator=made))
        picks = torch.randint(1, len(kinds), (size,), generator=made).tolist()
        worlds.append(direct_sum(orthogonal(1), *(kinds[i] for i in picks)))
    return worlds


def uneven(seed: int, count: int) -> list[Tensor]:
    """Return random directions in dimensions of unequal loudness."""
    loud = torch.logspace(-0.5, 0.5, 5, dtype=torch.float64)[:, None]
    return [loud * random_unit(5, 9, seed_for(seed, "uneven", i)) for i in range(count)]


def rotated(seed: int) -> list[Tensor]:
    """Return the block-built worlds, each turned at random."""
    return [rotation(seed, i, len(W)) @ W for i, W in enumerate(blocks(seed, 50))]


def unfinished(seed: int, count: int, d_in: int = 3, n: int = 5) -> list[Tensor]:
    """Return random non-positive W_p, n < 2 d_in, whose L_SAE at W_p^T is not 0 (not digons alone)."""
    found: list[Tensor] = []
    number = 0
    while len(found) < count:
        W_p = nonpositive(d_in, n, seed_for(seed, "unfinished", number))
        if float(sae_loss(closed_form(W_p), W_p, *grid(n, 0.5, 1))) > 1e-9:
            found.append(W_p)
        number += 1
    return found


def shared_blocks() -> list[Tensor]:
    """Return a monosemantic dimension beside one or two simplices, axis by axis: interference is non-positive."""
    simplices = [(3,), (4,), (5,), (2, 3), (3, 3), (3, 4)]
    return [direct_sum(orthogonal(1), *(simplex(p) for p in sizes)) for sizes in simplices]
