"""Encoder and group Top-k in one kernel that never writes the [batch, d_sae] product."""
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int64
from torch import Tensor

from wsae.ops.triton.support import check
from wsae.ops.triton.tiles import CONFIGS, columns_per_tile, product_tile, prune_configs


def group_topk_encode(
    centred: Float[Tensor, "batch d_in"],
    W_enc_t: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"] | None,
    k: int,
    dtype: torch.dtype,
) -> Int64[Tensor, "batch k"]:
    """Return the latent [batch, k] with the largest pre-activation in each of k contiguous groups; k divides d_sae.

    Twin: `select_group_topk` of centred @ W_enc_t.T + b_enc with `dtype` inputs summed in fp32; of equal values the
    first. Values at the choice come from `sums.pair_products`.
    """
    (batch, d_in), d_sae = centred.shape, len(W_enc_t)
    assert d_sae % k == 0, (d_sae, k)  # SAEConfig refuses it with a message
    size = d_sae // k
    x, w = centred.to(dtype).contiguous(), W_enc_t.to(dtype)
    for tensor, *shape in ((w, d_sae, d_in), (b_enc, d_sae)):
        check(x.device, tensor, *shape)
    indices = torch.empty(batch, k, dtype=torch.int64, device=x.device)
    if batch:
        grid = lambda meta: (triton.cdiv(batch, meta["BM"]), k)  # noqa: E731
        _winners[grid](x, w, b_enc, indices, batch, d_in, k, size, BN=columns_per_tile(size))
    return indices


@triton.autotune(configs=CONFIGS, key=["D", "K", "SIZE"], prune_configs_by=prune_configs)
@triton.jit
@no_type_check
def _winners(
    x, w, bias, indices, B, D, K, SIZE, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    rows, group = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1)
    end = (group + 1) * SIZE
    best = tl.full([BM], float("-inf"), tl.float32)
    best_at = tl.zeros([BM], tl.int32) + group * SIZE
    for start in range(group * SIZE, end, BN):
        cols = start + tl.arange(0, BN)
        pre = product_tile(x, w, bias, rows, cols, end, B, D, BK)
        largest = tl.max(pre, 1)
        at = tl.min(tl.where(pre == largest[:, None], cols[None, :], 0x7FFFFFFF), 1)
        best_at = tl.where(largest > best, at, best_at)
        best = tl.maximum(largest, best)
    tl.store(indices + rows.to(tl.int64) * K + group, best_at.to(tl.int64), mask=rows < B)
