"""Which latents are active: Top-k, group Top-k and batch Top-k over pre-activations. No gradient passes here."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

_SAMPLE = 1 << 16
"""Entries looked at to guess the batch Top-k threshold."""


def select_topk(pre: Float[Tensor, "*rows d_sae"], k: int) -> Int64[Tensor, "*rows k"]:
    """Return the k largest pre-activations of each row (Gao et al. 2025), unordered."""
    return pre.topk(k, dim=-1, sorted=False).indices


def select_group_topk(pre: Float[Tensor, "*rows d_sae"], k: int) -> Int64[Tensor, "*rows k"]:
    """Return the largest pre-activation in each of k contiguous groups (paper Appendix B.1); k divides d_sae."""
    d_sae = pre.shape[-1]
    assert d_sae % k == 0, (d_sae, k)  # SAEConfig refuses it with a message
    winners = pre.unflatten(-1, (k, -1)).argmax(-1)
    return winners + torch.arange(0, d_sae, d_sae // k, device=pre.device)


def select_batch_topk(
    pre: Float[Tensor, "batch d_sae"], k: int
) -> tuple[Int64[Tensor, " nnz"], Int64[Tensor, " nnz"]]:
    """Return rows and latents of the batch * k largest positive entries (Bussmann et al. 2024), sorted by row.

    Exact: a threshold guessed from a sample only narrows the candidates, and is lowered until they suffice.
    """
    wanted = min(len(pre) * k, pre.numel())
    flat = pre.reshape(-1)
    candidates = _at_least(flat, wanted)
    if len(candidates) > wanted:
        keep = flat[candidates].topk(wanted, sorted=False).indices
        candidates = candidates[keep].sort().values
    return candidates // pre.shape[1], candidates % pre.shape[1]


def _at_least(flat: Float[Tensor, " n"], wanted: int) -> Int64[Tensor, " m"]:
    """Return positions of the positive entries above a threshold that leaves `wanted` or more, if there are."""
    stride = max(1, len(flat) // _SAMPLE)
    sample = flat[::stride]
    share = wanted / len(flat)
    while share < 0.5:
        share *= 1.5
        rank = min(len(sample), int(share * len(sample)) + 8)
        threshold = float(sample.topk(rank).values[-1])
        if threshold <= 0:
            break
        found = (flat > threshold).nonzero()[:, 0]
        if len(found) >= wanted:
            return found
    return (flat > 0).nonzero()[:, 0]
