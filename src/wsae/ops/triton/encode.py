"""Encoder and Top-k in two kernels that never write the [batch, d_sae] product.

1. Every tile of the product is cut into buckets of `size` latents, and each row keeps a bucket's two largest.
2. One program per row takes the k largest candidates. A bucket's third can be among the k best only if its second is
   (at least as large), so the few buckets with two chosen are computed again and all their latents compared: the
   choice is exact, whatever the sizes. The chosen values are then computed from the fp32 weights.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int64
from torch import Tensor

from wsae.ops.triton.support import BUCKETS_PER_CHOICE, MAX_CANDIDATES, check
from wsae.ops.triton.tiles import (
    BN,
    CONFIGS,
    LOWEST,
    block_of,
    columns_per_tile,
    latent_of,
    product_tile,
    prune_configs,
    row_products,
    sort_key,
)

MAX_BUCKET = 64
"""A second look at a bucket reads `size` rows of weights."""


def topk_encode(
    centred: Float[Tensor, "batch d_in"],
    W_enc_t: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"] | None,
    k: int,
    dtype: torch.dtype,
) -> tuple[Float[Tensor, "batch k"], Int64[Tensor, "batch k"]]:
    """Return values [batch, k] and latents of the k largest of centred @ W_enc_t.T + b_enc, largest first.

    They are chosen by the product of `dtype` inputs summed in fp32 (of equal values, lower latents first); the values
    are those of fp32 inputs. See `support.unsupported` for what is done.
    """
    (batch, d_in), d_sae = centred.shape, len(W_enc_t)
    columns, size = columns_per_tile(d_sae), bucket_size(d_sae, k)
    tiles = triton.cdiv(d_sae, columns)
    width = 2 * tiles * (columns // size)
    centred = centred.contiguous()
    x, w = centred.to(dtype), W_enc_t.to(dtype)
    for tensor, *shape in ((W_enc_t, d_sae, d_in), (b_enc, d_sae)):
        check(x.device, tensor, *shape)
    keys = torch.empty(batch, width, dtype=torch.int64, device=x.device)
    values = torch.empty(batch, k, dtype=torch.float32, device=x.device)
    indices = torch.empty(batch, k, dtype=torch.int64, device=x.device)
    if batch == 0 or k == 0:
        return values, indices
    grid = lambda meta: (triton.cdiv(batch, meta["BM"]) * tiles,)  # noqa: E731
    _candidates[grid](x, w, b_enc, keys, batch, d_sae, d_in, BN=columns, SIZE=size)
    top = max(2, triton.next_power_of_2(k))  # the sort takes no single lane
    lanes = max(size, top)
    _merge[(batch,)](
        *(keys, x, w, centred, W_enc_t, b_enc, values, indices, width, d_sae, d_in, k),
        WIDTH=max(triton.next_power_of_2(width), top), TOP=top, SIZE=size, BN=columns, LANES=lanes,
        BK=min(128, max(16, 4096 // lanes)), num_warps=4 if lanes <= 256 else 8,
    )  # fmt: skip
    return values, indices


def bucket_size(d_sae: int, k: int) -> int:
    """Return how many latents a bucket has: many fit few candidates in a row, few keep it rare to look again."""
    columns = columns_per_tile(d_sae)
    tiles = triton.cdiv(d_sae, columns)
    size = 2
    while 2 * size <= min(MAX_BUCKET, columns) and d_sae >= 2 * size * BUCKETS_PER_CHOICE * k:
        size *= 2
    while 2 * tiles * (columns // size) > MAX_CANDIDATES and size < BN:
        size *= 2
    return size


@triton.autotune(configs=CONFIGS, key=["F", "D", "BN", "SIZE"], prune_configs_by=prune_configs)
@triton.jit
@no_type_check
def _candidates(
    x, w, bias, keys, B, F, D,
    BN: tl.constexpr, SIZE: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write the keys of the two largest of every bucket: keys [B, tiles * BN / SIZE, 2]."""
    BUCKETS: tl.constexpr = BN // SIZE
    block, tile = block_of(tl.cdiv(B, BM), tl.cdiv(F, BN), 16)
    rows, cols = block * BM + tl.arange(0, BM), tile * BN + tl.arange(0, BN)
    pre = product_tile(x, w, bias, rows, cols, F, B, D, BK)
    # a bucket is every BUCKETS-th latent of the tile: neighbours, often alike, are apart, and a thread's own
    # elements of the tile are mostly one bucket's
    pre, cols = tl.reshape(pre, [BM, SIZE, BUCKETS]), tl.reshape(cols, [1, SIZE, BUCKETS])
    first = tl.max(pre, 1)
    first_at = tl.min(tl.where(pre == first[:, None, :], cols, 0x7FFFFFFF), 1)
    pre = tl.where(cols == first_at[:, None, :], float("-inf"), pre)
    second = tl.max(pre, 1)
    left = (pre == second[:, None, :]) & (cols != first_at[:, None, :])
    second_at = tl.min(tl.where(left, cols, 0x7FFFFFFF), 1)
    bucket = tile * BUCKETS + tl.arange(0, BUCKETS)
    at = keys + rows.to(tl.int64)[:, None] * (2 * BUCKETS * tl.cdiv(F, BN)) + 2 * bucket[None, :]
    tl.store(at, sort_key(first, first_at), mask=(rows < B)[:, None])
    tl.store(at + 1, sort_key(second, second_at), mask=(rows < B)[:, None])


@triton.jit
@no_type_check
def _merge(
    keys, x, w, x_exact, w_exact, bias, values, indices, width, F, D, k,
    WIDTH: tl.constexpr, TOP: tl.constexpr, SIZE: tl.constexpr, BN: tl.constexpr,
    LANES: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Choose one row's k largest and compute their values from fp32."""
    row = tl.program_id(0).to(tl.int64)
    keys += row * width
    slots = tl.arange(0, WIDTH)
    mine = tl.load(keys + slots, mask=slots < width, other=LOWEST)
    best = tl.topk(mine, TOP)
    ranks = tl.arange(0, TOP)
    kth = tl.min(tl.where(ranks < k, best, 0x7FFFFFFFFFFFFFFF))
    if SIZE > 2:
        crowded = tl.max(tl.where((slots % 2 == 1) & (mine >= kth), slots, -1))
        while crowded >= 0:
            others = _rest_of_bucket(keys, crowded, x + row * D, w, bias, F, D, SIZE, BN, LANES, BK)
            if LANES > TOP:
                others = tl.topk(others, TOP)
            best = tl.topk(tl.reshape(tl.join(best, others), [2 * TOP]), TOP)
            again = (slots % 2 == 1) & (mine >= kth) & (slots < crowded)
            crowded = tl.max(tl.where(again, slots, -1))
    latents = latent_of(best)
    chosen = row_products(x_exact + row * D, w_exact, bias, latents, ranks < k, D, BK)
    tl.store(indices + row * k + ranks, latents, mask=ranks < k)
    tl.store(values + row * k + ranks, chosen, mask=ranks < k)


@triton.jit
@no_type_check
def _rest_of_bucket(
    keys, slot, x, w, bias, F, D,
    SIZE: tl.constexpr, BN: tl.constexpr, LANES: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Return the keys of the latents of slot's bucket that are no candidates yet, in LANES lanes."""
    BUCKETS: tl.constexpr = BN // SIZE
    bucket, lanes = slot // 2, tl.arange(0, LANES)
    latents = bucket // BUCKETS * BN + bucket % BUCKETS + lanes * BUCKETS
    live = (lanes < SIZE) & (latents < F)
    live = live & (latents != latent_of(tl.load(keys + 2 * bucket)))
    live = live & (latents != latent_of(tl.load(keys + 2 * bucket + 1)))
    pre = row_products(x, w, bias, latents, live, D, BK)
    return tl.where(live, sort_key(pre, latents), LOWEST)
