"""Sums over the pairs of a sparse code: decode, its values' gradient and the weight gradients, without atomics.

Twins: `wsae.kernels.eager.decode`, its `_pair_products` and `Plan.scatter`. Every output is summed by one program in
the order of the pairs, so results are reproducible. A latent that fires in every row would keep its program busy long
after the others: its pairs are first summed in chunks of CHUNK by programs of their own, so that none adds up more
than CHUNK pairs and batch / CHUNK sums. (Atomic adds balance as well, but in no fixed order, and need the output
cleared first.)
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int64
from torch import Tensor

from wsae.kernels.eager import Plan
from wsae.kernels.triton.support import check

CHUNK = 64
"""Pairs of one latent that one program sums."""
_PAIRS = 8
"""Pairs read at once, so that their rows are on the way together."""


class PairWeights(NamedTuple):
    """Which row of a matrix each pair adds, and with what weight: weights[p], or with an order weights[order[p]]."""

    columns: Tensor
    weights: Float[Tensor, " nnz"]
    order: Int64[Tensor, " nnz"] | None = None


class Chunks(NamedTuple):
    """Sums of the full chunks of pairs of each latent; the pairs from `rest` on are not in them."""

    sums: Float[Tensor, "chunks d_in"]
    offsets: Int64[Tensor, " d_sae_plus_1"]
    """Chunks of latent j: offsets[j] : offsets[j + 1]."""
    rest: Int64[Tensor, " d_sae"]


def decode(
    values: Float[Tensor, " nnz"], W_dec: Float[Tensor, "d_sae d_in"], plan: Plan
) -> Float[Tensor, "batch d_in"]:
    """Return x_hat [batch, d_in] = sum over the row's pairs of value * W_dec[j], without b_dec, in values' dtype."""
    out = values.new_empty(len(plan.offsets) - 1, W_dec.shape[1])
    _launch_sums(out, W_dec, PairWeights(plan.indices, values), plan.offsets[:-1], plan.offsets[1:])
    return out


def scatter(
    plan: Plan, weights: Float[Tensor, " nnz"], rows: Float[Tensor, "batch d_in"]
) -> Float[Tensor, "d_sae d_in"]:
    """Return G [d_sae, d_in], G[j] = sum over pairs (b, j) of weight * rows[b]."""
    rows = rows.contiguous()
    out = weights.new_empty(len(plan.latent_offsets) - 1, rows.shape[1])
    chunks = sum_chunks(plan, weights, rows)
    terms = PairWeights(plan.latent_rows, weights, plan.order)
    _launch_sums(out, rows, terms, chunks.rest, plan.latent_offsets[1:], chunks)
    return out


def sum_chunks(
    plan: Plan, weights: Float[Tensor, " nnz"], rows: Float[Tensor, "batch d_in"]
) -> Chunks:
    """Sum each latent's first CHUNK pairs, the next, and so on; tables are built without waiting for the device."""
    starts = plan.latent_offsets[:-1].long()
    full = plan.latent_offsets.diff().long() // CHUNK
    offsets = torch.cat([full.new_zeros(1), full.cumsum(0)])
    chunk = torch.arange(len(plan.indices) // CHUNK, device=rows.device)  # as many as there can be
    latent = (torch.searchsorted(offsets, chunk, right=True) - 1).clamp_max(len(starts) - 1)
    first = starts[latent] + (chunk - offsets[latent]) * CHUNK
    used = chunk < offsets[-1]
    starts_of, ends_of = torch.where(used, first, 0), torch.where(used, first + CHUNK, 0)
    sums = weights.new_empty(len(chunk), rows.shape[1])
    terms = PairWeights(plan.latent_rows, weights, plan.order)
    _launch_sums(sums, rows, terms, starts_of, ends_of)
    return Chunks(sums, offsets, starts + full * CHUNK)


def pair_products(
    left: Float[Tensor, "batch d_in"], W: Float[Tensor, "d_sae d_in"], plan: Plan
) -> Float[Tensor, " nnz"]:
    """Return left[b] . W[j] for every pair (b, j) of the plan."""
    return products(left, W, plan.rows, plan.indices)


def products(
    left: Float[Tensor, "batch d_in"],
    W: Float[Tensor, "d_sae d_in"],
    rows: Int64[Tensor, " nnz"],
    indices: Int64[Tensor, " nnz"],
) -> Float[Tensor, " nnz"]:
    """Return left[rows[p]] . W[indices[p]] for every p, in fp64 for fp64 and otherwise in fp32."""
    wide = torch.float64 if left.dtype == torch.float64 else torch.float32
    out = torch.empty(len(indices), dtype=wide, device=left.device)
    for tensor, *shape in ((W, len(W), left.shape[1]), (rows, len(out)), (indices, len(out))):
        check(left.device, tensor, *shape)
    if len(out):
        grid = (triton.cdiv(len(out), _PAIRS),)
        _products[grid](
            *(out, left.contiguous(), W, rows, indices, len(out), left.shape[1]),
            PAIRS=_PAIRS, BD=min(256, triton.next_power_of_2(left.shape[1])),
        )  # fmt: skip
    return out


def _launch_sums(
    out: Tensor,
    matrix: Tensor,
    terms: PairWeights,
    starts: Tensor,
    ends: Tensor,
    chunks: Chunks | None = None,
) -> None:
    """Write out[i] = sum over p from starts[i] to ends[i] of weight[p] * matrix[column[p]], plus the chunks of i."""
    d_in = out.shape[1]
    if out.numel() == 0:
        return
    check(out.device, matrix, len(matrix), d_in)
    for tensor in terms:
        check(out.device, tensor, len(terms.columns))
    block = min(256, triton.next_power_of_2(d_in))
    done = (None, None) if chunks is None else (chunks.sums, chunks.offsets)
    _sums[(len(out), triton.cdiv(d_in, block))](
        *(out, matrix, *terms, starts, ends, *done, d_in), PAIRS=_PAIRS, BD=block
    )


@triton.jit
@no_type_check
def add_rows(
    acc, matrix, columns, weights, order, start, end, d, D, PAIRS: tl.constexpr
):  # fmt: skip
    """Return acc [PAIRS, BD] plus weights[order[p]] * matrix[columns[p], d] of every PAIRS-th p from start to end - 1.

    The caller sums the lanes at the end: the loop itself has no exchange between threads.
    Without `columns` the rows are p themselves, without `order` p's weight is weights[p], without `weights` it is 1.
    """
    for first in range(start, end, PAIRS):
        p = first + tl.arange(0, PAIRS)
        live = p < end
        column = p
        if columns is not None:
            column = tl.load(columns + p, mask=live, other=0)
        mask = live[:, None] & (d < D)[None, :]
        rows = tl.load(matrix + column.to(tl.int64)[:, None] * D + d[None, :], mask=mask, other=0.0)
        rows = rows.to(acc.dtype)
        if weights is not None:
            at = p
            if order is not None:
                at = tl.load(order + p, mask=live, other=0)
            rows *= tl.load(weights + at, mask=live, other=0.0).to(acc.dtype)[:, None]
        acc += rows
    return acc


@triton.jit
@no_type_check
def _sums(
    out, matrix, columns, weights, order, starts, ends, chunk_sums, chunk_offsets, D,
    PAIRS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    acc = tl.zeros([PAIRS, BD], out.dtype.element_ty)
    if chunk_sums is not None:
        start, end = tl.load(chunk_offsets + i), tl.load(chunk_offsets + i + 1)
        acc = add_rows(acc, chunk_sums, None, None, None, start, end, d, D, PAIRS)
    start, end = tl.load(starts + i), tl.load(ends + i).to(starts.dtype.element_ty)
    acc = add_rows(acc, matrix, columns, weights, order, start, end, d, D, PAIRS)
    tl.store(out + i * D + d, tl.sum(acc, 0), mask=d < D)


@triton.jit
@no_type_check
def _products(
    out, left, w, rows, latents, count, D, PAIRS: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    p = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    live = p < count
    left += tl.load(rows + p, mask=live, other=0).to(tl.int64)[:, None] * D
    w += tl.load(latents + p, mask=live, other=0).to(tl.int64)[:, None] * D
    total = tl.zeros([PAIRS, BD], out.dtype.element_ty)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        mask = live[:, None] & (d < D)[None, :]
        a = tl.load(left + d[None, :], mask=mask, other=0.0).to(total.dtype)
        total += a * tl.load(w + d[None, :], mask=mask, other=0.0).to(total.dtype)
    tl.store(out + p, tl.sum(total, 1), mask=live)
