"""What the encoder kernels share: a tile of the product, products of one row, and keys that sort by value."""
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from triton import knobs

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
