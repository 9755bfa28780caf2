"""Which latents are active when they lie on several ranks: exact, and the same whatever the number of ranks.

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
_DIGITS = ((20, 11), (10, 10), (0, 10))
"""(shift, bits) that cut the 31 bits of a positive float's pattern into three digits, the highest first."""


def choose_topk(pre: Float[Tensor, "batch own"], k: int, latents: Axis) -> Pairs:
    """Return the pairs among the k largest of each row over all ranks.

    Each rank's k best values per row are gathered (batch * k numbers from each), its own column numbers stay here.
    """
    values, columns = pre.float().topk(min(k, pre.shape[1]), dim=1)
    short = k - values.shape[1]
    everyone = latents.gather(F.pad(values, (0, short), value=-math.inf))  # [ranks, batch, k]
    flat = everyone.permute(1, 0, 2).flatten(1)
    last = flat.topk(k, dim=1).values[:, -1:]
    above, equal = flat > last, flat == last
    room = k - above.sum(1, keepdim=True)
    kept = above | (equal & (equal.cumsum(1) <= room))
    first = latents.index * k
    rows, place = kept[:, first : first + values.shape[1]].nonzero(as_tuple=True)
    return rows, columns[rows, place]


def choose_groups(
    pre: Float[Tensor, "batch own"], first: int, size: int, k: int, latents: Axis
) -> Pairs:
    """Return the pairs that are the largest of their group; group g holds latents g * size to (g + 1) * size - 1.

    This rank's columns are the latents from `first` on; a group may lie on several ranks. The groups' best values are
    gathered (batch * k numbers from each rank).
    """
    batch, own = pre.shape
    low, high = first // size, (first + own - 1) // size + 1
    whole = F.pad(pre.float(), (first - low * size, high * size - first - own), value=-math.inf)
    values, place = whole.view(batch, high - low, size).max(2)
    best = F.pad(values, (low, k - high), value=-math.inf)
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
    """Say which of this rank's positive values are among the `wanted` largest of all ranks together.

    A radix selection: positive floats are ordered as their bit patterns are, so counting one digit after the other
    (three sums of at most 2048 counts) finds the pattern of the last one kept, exactly.
    """
    total = place.reduce_(torch.tensor(len(values), device=values.device))
    if int(total) <= wanted:
        return torch.ones_like(values, dtype=torch.bool)
    bits = values.contiguous().view(torch.int32)
    prefix, room = bits.new_zeros((), dtype=torch.int64), wanted
    for shift, width in _DIGITS:
        inside = (bits >> (shift + width)) == prefix
        digits = ((bits >> shift) & (2**width - 1))[inside]
        counts = place.reduce_(torch.bincount(digits, minlength=2**width))
        down = counts.flip(0).cumsum(0)
        skipped = int((down < room).sum())
        room -= int(down[skipped - 1]) if skipped else 0
        prefix = prefix * 2**width + (2**width - 1 - skipped)
    equal = bits == prefix
    before = place.before(equal.sum())
    return (bits > prefix) | (equal & (before + equal.cumsum(0) <= room))
