"""Which latents are active when they lie on several ranks: exactly those that one process could choose.

Each rank sees the pre-activations of its own latents and returns the pairs (row, column) that are active among these.
Ties at the last place go to the lower rank, then to the earlier entry. No gradient passes here.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from wsae.ops import select_batch_topk
from wsae.train.parallel.world import Axis, Place

Pairs = tuple[Int64[Tensor, " nnz"], Int64[Tensor, " nnz"]]
"""Rows and this rank's columns, sorted by row."""
Mask = Bool[Tensor, "batch own"]
_FEW = 2048
"""Candidates of other ranks per row that are gathered at most; beyond it, counting moves fewer bytes."""
_SHIFTS = (24, 16, 8, 0)
"""The digits of 8 bits that make up a float's pattern, the highest first."""


def choose_topk(pre: Float[Tensor, "batch own"], k: int, latents: Axis) -> Pairs:
    """Return the pairs among the k largest of each row over all ranks.

    Each rank's k best per row are enough. Their values are gathered (batch * k numbers from each rank), or where that
    is much counted (`_by_counting`); column numbers stay here.
    """
    values, columns = pre.topk(min(k, pre.shape[1]), dim=1)
    values = values.float()
    if (latents.size - 1) * k <= _FEW:
        kept = _by_gathering(values, k, latents)
    else:
        kept = _by_counting(values, k, Place(latents=latents))
    rows, place = kept.nonzero(as_tuple=True)
    return rows, columns[rows, place]


def _by_gathering(values: Float[Tensor, "batch own"], k: int, latents: Axis) -> Mask:
    """Say which values are among the k largest of their row over all ranks, from all of them."""
    short = k - values.shape[1]
    everyone = latents.gather(F.pad(values, (0, short), value=-math.inf))  # [ranks, batch, k]
    flat = everyone.permute(1, 0, 2).flatten(1)
    last = flat.topk(k, dim=1).values[:, -1:]
    above, equal = flat > last, flat == last
    room = k - above.sum(1, keepdim=True)
    kept = above | (equal & (equal.cumsum(1) <= room))
    first = latents.index * k
    return kept[:, first : first + values.shape[1]]


def _by_counting(values: Float[Tensor, "batch own"], k: int, place: Place) -> Mask:
    """Say the same of rows with k values or more in all, from counts alone: a radix selection.

    Floats are ordered as their bit patterns are (negative ones turned round), so counting the values with each next
    digit among those still in question finds the pattern of the last one kept, exactly. Four sums of 256 counts a row.
    """
    bits = values.contiguous().view(torch.int32).long()
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) + 2**31
    prefix = order.new_zeros(len(order), 1)
    room = torch.full_like(prefix, k)
    for shift in _SHIFTS:
        inside = (order >> (shift + 8)) == prefix
        counts = torch.zeros(len(order), 256, dtype=torch.int32, device=order.device)
        counts.scatter_add_(1, (order >> shift) & 255, inside.int())
        down = place.reduce_(counts).flip(1).cumsum(1)
        skipped = (down < room).sum(1, keepdim=True)
        passed = down.gather(1, (skipped - 1).clamp_min(0))
        room = torch.where(skipped > 0, room - passed, room)
        prefix = prefix * 256 + 255 - skipped
    equal = order == prefix
    before = place.before(equal.sum(1))[:, None]
    return (order > prefix) | (equal & (before + equal.cumsum(1) <= room))


def choose_groups(
    pre: Float[Tensor, "batch own"], first: int, size: int, k: int, latents: Axis
) -> Pairs:
    """Return the pairs that are the largest of their group; group g holds latents g * size to (g + 1) * size - 1.

    This rank's columns are the latents from `first` on; a group may lie on several ranks. The groups' best values are
    gathered (batch * k numbers from each rank).
    """
    batch, own = pre.shape
    low, high = first // size, (first + own - 1) // size + 1
    whole = F.pad(pre, (first - low * size, high * size - first - own), value=-math.inf)
    values, place = whole.view(batch, high - low, size).max(2)
    best = F.pad(values.float(), (low, k - high), value=-math.inf)
    everyone = latents.gather(best)
    top = everyone == everyone.amax(0)
    wins = top[latents.index] & ~top[: latents.index].any(0)
    rows, groups = wins[:, low:high].nonzero(as_tuple=True)
    return rows, place[rows, groups] + (groups + low) * size - first


def choose_batch_topk(pre: Float[Tensor, "batch own"], wanted: int, place: Place) -> Pairs:
    """Return the pairs among the `wanted` largest positive entries of the whole batch over all ranks."""
    share = min(pre.shape[1], math.ceil(wanted / len(pre)))
    rows, columns = select_batch_topk(pre, share)
    kept = among_largest(pre[rows, columns].float(), wanted, place)
    return rows[kept], columns[kept]


def among_largest(values: Float[Tensor, " n"], wanted: int, place: Place) -> Bool[Tensor, " n"]:
    """Say which of this rank's values are among the `wanted` largest of all ranks together."""
    total = place.reduce_(torch.tensor(len(values), device=values.device))
    if int(total) <= wanted:
        return torch.ones_like(values, dtype=torch.bool)
    return _by_counting(values[None], wanted, place)[0]
