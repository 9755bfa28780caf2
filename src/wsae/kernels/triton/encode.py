"""Encoder and Top-k in two kernels that never write the [batch, d_sae] product.

1. Every tile of the product is cut into buckets of `size` latents, and each row keeps a bucket's two largest.
2. One program per row takes the k largest candidates. A bucket's third can be among the k best only if its second is
   (at least as large), so the few buckets with two chosen are computed again and all their latents compared: the
   choice is exact, whatever the sizes. The chosen values are then computed from the fp32 weights.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int64
from torch import Tensor
from triton import knobs

from wsae.kernels.triton.sums import products
from wsae.kernels.triton.support import BUCKETS_PER_CHOICE, MAX_CANDIDATES, check

LOWEST = tl.constexpr(-(2**63))
"""Below the key of every latent."""
INTERPRETED = tl.constexpr(knobs.runtime.interpret)
"""Triton's interpreter (3.7.1) multiplies the bit patterns in a tl.dot of bf16: there they are made fp32 before."""

# One tile is BM rows by BN latents. bf16 on Hopper: two groups of four warps share 128 x 256, the widest a tensor core
# instruction goes; three stages of 64 deep fill 144 KiB of shared memory, two fit where there is less. The smaller tile
# fills more processors when the batch is small. fp32 goes without tensor cores, from registers, which hold less.
BN = 256
CONFIGS = [
    triton.Config({"BM": 128, "BK": 64}, num_warps=8, num_stages=3),
    triton.Config({"BM": 128, "BK": 64}, num_warps=8, num_stages=2),
    triton.Config({"BM": 64, "BK": 32}, num_warps=8, num_stages=2),
    triton.Config({"BM": 32, "BK": 16}, num_warps=8, num_stages=2),
]
if INTERPRETED:  # cannot be timed; small, so that a small batch is several tiles
    CONFIGS = [triton.Config({"BM": 32, "BK": 32})]


def _fitting(
    configs: list[triton.Config], args: dict[str, Any], **_: object
) -> list[triton.Config]:
    """Leave out the tiles whose inputs do not fit the registers (fp32) or waste tensor cores (bf16)."""
    small = args["x"].dtype == torch.float32
    return [config for config in configs if (config.kwargs["BM"] < 64) == small]


prune_configs = {"early_config_prune": _fitting}


def columns_per_tile(wanted: int) -> int:
    """Return BN, or less where fewer columns are wanted; a tensor core takes no fewer than 16."""
    return min(BN, max(16, 1 << (wanted - 1).bit_length()))


# `no_type_check`: shape checkers that rewrite functions on import leave kernels alone
@triton.jit
@no_type_check
def product_tile(x, w, bias, rows, cols, limit, B, D, BK: tl.constexpr):
    """Return x[rows] . w[cols] + bias[cols] in fp32; columns from `limit` are -inf, rows from B repeat the last."""
    rows, within = tl.minimum(rows, B - 1).to(tl.int64), tl.minimum(cols, limit - 1)
    d = tl.arange(0, BK)
    x_at = x + rows[:, None] * D + d[None, :]
    w_at = w + within.to(tl.int64)[None, :] * D + d[:, None]
    acc = tl.zeros([rows.shape[0], cols.shape[0]], tl.float32)
    for start in range(0, D, BK):
        a = tl.load(x_at, mask=d[None, :] < D - start, other=0.0)
        b = tl.load(w_at, mask=d[:, None] < D - start, other=0.0)
        if INTERPRETED:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision="ieee")
        x_at += BK
        w_at += BK
    if bias is not None:
        acc += tl.load(bias + within)[None, :]
    return tl.where((cols < limit)[None, :], acc, float("-inf"))


@triton.jit
@no_type_check
def row_products(x, w, bias, latents, live, D, BK: tl.constexpr):
    """Return x . w[latents] + bias[latents] in fp32 for one row x [D]; dead lanes are -inf."""
    at = tl.where(live, latents, 0).to(tl.int64)
    total = tl.zeros([latents.shape[0], BK], tl.float32)
    for start in range(0, D, BK):
        d = start + tl.arange(0, BK)
        left = tl.load(x + d, mask=d < D, other=0.0).to(tl.float32)
        mask = live[:, None] & (d < D)[None, :]
        right = tl.load(w + at[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
        total += left[None, :] * right
    acc = tl.sum(total, 1)
    if bias is not None:
        acc += tl.load(bias + at)
    return tl.where(live, acc, float("-inf"))


@triton.jit
@no_type_check
def block_of(n_rows, n_cols, ACROSS: tl.constexpr):
    """Return this program's tile: ACROSS row blocks share the weights they read before the next ones start."""
    program = tl.program_id(0)
    first = program // (ACROSS * n_cols) * ACROSS
    across = tl.minimum(n_rows - first, ACROSS)
    inside = program % (ACROSS * n_cols)
    return first + inside % across, inside // across


@triton.jit
@no_type_check
def sort_key(value, latent):
    """Return an int64 that sorts as (value, then the lower latent): fp32 bits made monotone, above the latent."""
    bits = value.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - latent).to(tl.int64)


@triton.jit
@no_type_check
def latent_of(key):
    """Return the latent of a key."""
    return 0x7FFFFFFF - (key & 0x7FFFFFFF)


SAMPLE = 64
"""Rows whose product is computed in full to guess the threshold of batch Top-k."""
WORD = 32


def above(
    centred: Float[Tensor, "batch d_in"],
    W_enc_t: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"] | None,
    threshold: Float[Tensor, "..."],
    dtype: torch.dtype,
) -> tuple[Int64[Tensor, " nnz"], Int64[Tensor, " nnz"]]:
    """Return rows and latents of the pre-activations above a threshold, sorted by row; waits for the device.

    One kernel writes one bit per pre-activation: bits cannot overflow as a list of fixed room would, are 1/16 of the
    product in bf16, and their order is the pairs' own. The threshold is one number or one per latent [d_sae]; the
    pre-activations are centred @ W_enc_t.T + b_enc with `dtype` inputs summed in fp32. Values at the pairs come from
    `sums.products`.
    """
    (batch, d_in), d_sae = centred.shape, len(W_enc_t)
    columns = max(WORD, columns_per_tile(d_sae))
    tiles = triton.cdiv(d_sae, columns)
    x, w = centred.to(dtype).contiguous(), W_enc_t.to(dtype)
    limits = threshold.to(torch.float32).expand(d_sae).contiguous()
    for tensor, *shape in ((w, d_sae, d_in), (b_enc, d_sae), (limits, d_sae)):
        check(x.device, tensor, *shape)
    words = torch.empty(batch, tiles * columns // WORD, dtype=torch.int32, device=x.device)
    if batch:
        grid = lambda meta: (triton.cdiv(batch, meta["BM"]) * tiles,)  # noqa: E731
        _compare[grid](x, w, b_enc, limits, words, batch, d_sae, d_in, BN=columns)
    rows, word = words.nonzero(as_tuple=True)
    shift = torch.arange(WORD, dtype=torch.int32, device=x.device)
    entry, bit = ((words[rows, word][:, None] >> shift) & 1).nonzero(as_tuple=True)
    return rows[entry], word[entry] * WORD + bit


def select_batch_topk(
    centred: Float[Tensor, "batch d_in"],
    W_enc_t: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"] | None,
    k: int,
    dtype: torch.dtype,
) -> tuple[Int64[Tensor, " nnz"], Int64[Tensor, " nnz"]]:
    """Return rows and latents of the batch * k largest positive pre-activations, sorted by row; waits for the device.

    Twin: `wsae.kernels.eager.select_batch_topk` of the product. Exact: a threshold guessed from a sample of rows only
    narrows the candidates, and is lowered until they suffice.
    """
    wanted = min(len(centred) * k, len(centred) * len(W_enc_t))
    if wanted == 0:
        return (none := torch.empty(0, dtype=torch.int64, device=centred.device)), none
    x, w = centred.to(dtype), W_enc_t.to(dtype)
    sample = _sample(x, w, b_enc)
    share = wanted / (len(centred) * len(W_enc_t))
    while True:
        share *= 1.5
        threshold = _guess(sample, share)
        rows, indices = above(x, w, b_enc, threshold, dtype)
        if len(rows) >= wanted or not threshold > 0:
            break
    if len(rows) > wanted:
        values = products(x, w, rows, indices)
        values = values if b_enc is None else values + b_enc[indices]
        keep = values.topk(wanted, sorted=False).indices.sort().values
        rows, indices = rows[keep], indices[keep]
    return rows, indices


def _sample(x: Tensor, w: Tensor, b_enc: Tensor | None) -> Tensor:
    """Return the pre-activations of about SAMPLE rows, flat and descending."""
    pre = (x[:: max(1, len(x) // SAMPLE)] @ w.T).float()
    return (pre if b_enc is None else pre + b_enc).reshape(-1).sort(descending=True).values


def _guess(sample: Tensor, share: float) -> Tensor:
    """Return the positive threshold that leaves a share of the sample, or 0."""
    rank = int(share * len(sample)) + 8
    if share >= 0.5 or rank > len(sample):
        return sample.new_zeros(())
    return sample[rank - 1].clamp_min(0)


@triton.autotune(configs=CONFIGS, key=["F", "D", "BN"], prune_configs_by=prune_configs)
@triton.jit
@no_type_check
def _compare(
    x, w, bias, limits, words, B, F, D, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """Write a bit per pre-activation, 1 where it is above its latent's limit: words [B, tiles * BN / 32]."""
    WORDS: tl.constexpr = BN // 32
    block, tile = block_of(tl.cdiv(B, BM), tl.cdiv(F, BN), 16)
    rows, cols = block * BM + tl.arange(0, BM), tile * BN + tl.arange(0, BN)
    pre = product_tile(x, w, bias, rows, cols, F, B, D, BK)
    limit = tl.load(limits + cols, mask=cols < F, other=float("inf"))
    bits = tl.where(pre > limit[None, :], 1 << (cols % 32)[None, :], 0)
    packed = tl.sum(tl.reshape(bits, [BM, WORDS, 32]), 2)
    at = rows.to(tl.int64)[:, None] * (WORDS * tl.cdiv(F, BN)) + tile * WORDS
    tl.store(words + at + tl.arange(0, WORDS)[None, :], packed, mask=(rows < B)[:, None])


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
