"""Encoder and threshold in one kernel that writes one bit per pre-activation, and batch Top-k made of it.

Bits cannot overflow as a list of fixed room would, are 1/16 of the product in bf16, and their order is the pairs' own.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int64
from torch import Tensor

from wsae.ops.triton.sums import products
from wsae.ops.triton.support import check
from wsae.ops.triton.tiles import CONFIGS, block_of, columns_per_tile, product_tile, prune_configs

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

    The threshold is one number or one per latent [d_sae]; the pre-activations are centred @ W_enc_t.T + b_enc with
    `dtype` inputs summed in fp32. Values at the pairs come from `sums.products`.
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

    Twin: `wsae.ops.select.select_batch_topk` of the product. Exact: a threshold guessed from a sample of rows only
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
