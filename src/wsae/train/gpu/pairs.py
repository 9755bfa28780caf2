"""The pairs (row, latent) of a step, sorted by latent, without waiting for the device.

`Plan.build` does the same where waiting costs nothing: bincount reads the largest index back.
"""

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from wsae.ops import SparseCode
from wsae.ops.sparse import Plan


def in_row_order(code: SparseCode) -> Plan:
    """Return a plan with its pairs in order of row alone: enough to decode and for products of pairs."""
    none = code.indices[:0]
    return Plan(code.indices, code.offsets, code.rows(), none, none, none)


def joined(plans: list[Plan]) -> Plan:
    """Return plans over the same batch as one, in order of row alone; the rows of the second follow the first's."""
    if len(plans) == 1:
        return plans[0]
    batch, pairs = 0, 0
    offsets, rows = [plans[0].offsets[:1]], []
    for plan in plans:
        offsets.append(plan.offsets[1:] + pairs)
        rows.append(plan.rows + batch)
        batch, pairs = batch + len(plan.offsets) - 1, pairs + len(plan.indices)
    indices = torch.cat([plan.indices for plan in plans])
    none = indices[:0]
    return Plan(indices, torch.cat(offsets), torch.cat(rows), none, none, none)


def sort_by_latent(plan: Plan, d_sae: int) -> Plan:
    """Return the plan with its pairs sorted by latent too (stable, so sums are in row order and reproducible)."""
    latents, order = plan.indices.int().sort(stable=True)
    bounds = torch.arange(d_sae + 1, dtype=torch.int32, device=latents.device)
    latent_offsets = torch.searchsorted(latents, bounds, out_int32=len(latents) < 2**31)
    return plan._replace(
        order=order, latent_offsets=latent_offsets, latent_rows=plan.rows[order].int()
    )


def twice(plan: Plan, rows: Int32[Tensor, " nnz"]) -> Plan:
    """Return the plan with each pair followed by a second one of the same latent, in row `rows[p]`.

    Of the weights the first half belongs to the plan's pairs, the second to the added ones. Sorted by latent only.
    """
    order = plan.order
    return plan._replace(
        indices=torch.cat([plan.indices, plan.indices]),
        order=torch.stack([order, order + len(order)], dim=1).flatten(),
        latent_offsets=2 * plan.latent_offsets,
        latent_rows=torch.stack([plan.latent_rows, rows], dim=1).flatten(),
    )


def per_latent(plan: Plan, weights: Float[Tensor, " nnz"]) -> Float[Tensor, " d_sae"]:
    """Return the sum of the weights of each latent's pairs, in order of row."""
    ordered, offsets = weights[plan.order], plan.latent_offsets
    return torch.segment_reduce(ordered, "sum", offsets=offsets, unsafe=True, initial=0)
