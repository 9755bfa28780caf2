"""The sums over rows from which every score of a code follows: four products, never a [rows, n, d_sae] tensor."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from wsae.evals.recovery.spread import ROWS, Moments, moments
from wsae.evals.recovery.truth import GroundTruth, check_finite

Assignment = Int64[Tensor, " n"]
"""Latent of each feature; -1 where it has none (more features than latents)."""


@dataclass(frozen=True)
class Sums:
    """Sums over rows t of features x, their activity a = [x > 0] and latents z, for every pair (i, j)."""

    overlap: Float64[Tensor, "n d_sae"]
    """sum_t x_ti z_tj."""
    strength: Float64[Tensor, "n d_sae"]
    """sum_t a_ti z_tj."""
    active_energy: Float64[Tensor, "n d_sae"]
    """sum_t a_ti z_tj^2."""
    hits: Float64[Tensor, "n d_sae"]
    """sum_t a_ti [z_tj != 0]."""
    energy: Float64[Tensor, " d_sae"]
    """sum_t z_tj^2."""
    fired: Float64[Tensor, " d_sae"]
    """sum_t [z_tj != 0]."""
    moments: Moments
    """Mean and central moments of each latent."""


def sums(truth: GroundTruth, latents: Float[Tensor, "rows d_sae"]) -> Sums:
    """Return the sums of latents [rows, d_sae] (any precision), in fp64.

    Raises UserError for a latent that is not finite.
    """
    x, a = truth.features, truth.active
    overlap, strength, active_energy, hits = x.new_zeros(4, x.shape[1], latents.shape[1])
    energy, fired, total = x.new_zeros(3, latents.shape[1])
    for at, block in enumerate(latents.split(ROWS)):
        rows = slice(at * ROWS, at * ROWS + len(block))
        z = block.double()
        fires, square = (z != 0).double(), z.square()
        overlap.addmm_(x[rows].T, z)
        strength.addmm_(a[rows].T, z)
        active_energy.addmm_(a[rows].T, square)
        hits.addmm_(a[rows].T, fires)
        energy += square.sum(0)
        fired += fires.sum(0)
        total += z.sum(0)
    if not bool(torch.isfinite(energy).all()):
        check_finite("latents", latents)
    spread = moments(latents, total / len(latents))
    return Sums(overlap, strength, active_energy, hits, energy, fired, spread)


def assign(gain: Float64[Tensor, "n d_sae"]) -> Assignment:
    """Return the one-to-one assignment of min(n, d_sae) pairs with the largest total gain (Hungarian method)."""
    from scipy.optimize import linear_sum_assignment  # takes a third of a second, needed here only

    rows, columns = linear_sum_assignment(gain.cpu().numpy(), maximize=True)
    latent = torch.full((len(gain),), -1, dtype=torch.int64)
    latent[torch.from_numpy(rows)] = torch.from_numpy(columns)
    return latent.to(gain.device)


def of_pair(table: Float64[Tensor, "n d_sae"], latent: Assignment) -> Float64[Tensor, " n"]:
    """Return table[i, latent(i)] for every feature i; 0 where it has no latent."""
    value = table.gather(1, latent.clamp_min(0)[:, None])[:, 0]
    return torch.where(latent >= 0, value, 0.0)


def of_latent(values: Float64[Tensor, " d_sae"], latent: Assignment) -> Float64[Tensor, " n"]:
    """Return values[latent(i)] for every feature i; 0 where it has no latent."""
    return torch.where(latent >= 0, values[latent.clamp_min(0)], 0.0)


def quotient(top: Float64[Tensor, "..."], bottom: Float64[Tensor, "..."]) -> Float64[Tensor, "..."]:
    """Return top / bottom, and 0 where bottom is 0."""
    return torch.where(bottom != 0, top / torch.where(bottom != 0, bottom, 1.0), 0.0)
