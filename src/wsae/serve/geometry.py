"""What is computed from decoder rows alone, in blocks: nearest latents, and what a latent's direction weighs."""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from wsae.evals.latents import unit_rows

BLOCK = 1 << 24
"""Numbers of a product held at once (64 MB in fp32)."""


def neighbours(
    W_dec: Float[Tensor, "d_sae d_in"], n: int
) -> Iterator[tuple[Float[Tensor, "block n"], Int64[Tensor, "block n"]]]:
    """Yield, block by block, the n other latents of largest signed decoder cosine: (cosines, latents), best first.

    A latent whose row is zero has cosine 0 with every other.
    """
    units = unit_rows(W_dec)
    d_sae = len(units)
    n = min(n, d_sae - 1)
    size = max(1, BLOCK // d_sae)
    for start in range(0, d_sae, size):
        cosine = units[start : start + size] @ units.T
        cosine.diagonal(start).fill_(-torch.inf)
        best = cosine.topk(n, dim=1)
        yield best.values.clamp(-1.0, 1.0).cpu(), best.indices.cpu()


def influence(
    W_dec: Float[Tensor, "d_sae d_in"], gamma: Float[Tensor, "..."]
) -> Float64[Tensor, " d_sae"]:
    """Return ||Gamma d||^2 / ||d||^2 for every decoder row d: what an error along it counts in the weighted loss.

    1 without weights. `gamma` is the diagonal [d_in] or the matrix [d_in, d_in]. A row of zeros gives NaN.
    """
    weights = gamma.detach().double()
    out = []
    for rows in W_dec.split(max(1, BLOCK // W_dec.shape[1])):
        units = unit_rows(rows).double()
        weighed = units * weights if weights.ndim == 1 else units @ weights.T
        length = units.square().sum(1)
        out.append(torch.where(length > 0, weighed.square().sum(1) / length, torch.nan).cpu())
    return torch.cat(out)
