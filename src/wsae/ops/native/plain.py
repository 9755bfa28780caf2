"""Selection by float32 products, some rows at a time, for CPUs without 8-bit dot products."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from wsae.ops.codes import SparseCode, code_from_topk, offsets_of
from wsae.ops.native.slices import Slices, from_slices
from wsae.ops.select import select_group_topk
from wsae.ops.select import select_topk as largest

ROWS = 256
"""Rows whose pre-activations exist at a time."""


def select_topk(
    W: Slices, bias: Tensor | None, rows: Float[Tensor, "batch d_in"], k: int, groups: bool
) -> SparseCode:
    """Return the k largest pre-activations of each row, or the largest of each of k groups, in order of latent."""
    values, indices = [], []
    for pre in _products(W, bias, rows):
        picked = (select_group_topk if groups else largest)(pre, k).sort(1).values
        values.append(pre.gather(1, picked))
        indices.append(picked)
    return code_from_topk(torch.cat(values), torch.cat(indices))


def select_above(
    W: Slices,
    bias: Tensor | None,
    rows: Float[Tensor, "batch d_in"],
    above: float,
    floor: Float[Tensor, " d_sae"] | None,
) -> SparseCode:
    """Return every pre-activation with pre - floor > above, in order of row and latent."""
    values, indices, where = [], [], []
    for i, pre in enumerate(_products(W, bias, rows)):
        height = pre if floor is None else pre - floor
        row, latent = (height > above).nonzero(as_tuple=True)
        values.append(pre[row, latent])
        indices.append(latent)
        where.append(row + i * ROWS)
    return SparseCode(
        torch.cat(values), torch.cat(indices), offsets_of(torch.cat(where), len(rows))
    )


def _products(W: Slices, bias: Tensor | None, rows: Tensor) -> Iterator[Tensor]:
    transposed = from_slices(W, rows.shape[1]).T
    for part in rows.split(ROWS):
        yield part @ transposed if bias is None else torch.addmm(bias, part, transposed)
