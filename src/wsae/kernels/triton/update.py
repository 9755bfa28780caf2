"""The optimiser's step on one weight matrix in one pass; twin: `wsae.kernels.eager`.

One program per row forms the gradient (from its terms, or reads it), drops its radial part, takes Adam's step and
renormalises: W, m and v are read and written once and the gradient's matrix never is.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32
from torch import Tensor

from wsae.kernels.eager import AdamStep, SparseGrad
from wsae.kernels.triton.sums import add_rows, sum_chunks
from wsae.kernels.triton.support import check


def adam_rows_(
    W: Float32[Tensor, "n d"],
    grad: Float32[Tensor, "n d"],
    m: Float32[Tensor, "n d"],
    v: Float32[Tensor, "n d"],
    adam: AdamStep,
    unit: bool,
) -> Float[Tensor, ""] | None:
    """Take the step of `wsae.kernels.eager.adam_rows_` on contiguous W, m, v [n, d] in place; `grad` stays."""
    return _launch(W, m, v, (grad.contiguous(), *[None] * 7), adam, unit)


def update_rows_(
    W: Float32[Tensor, "n d"],
    grad: SparseGrad,
    m: Float32[Tensor, "n d"],
    v: Float32[Tensor, "n d"],
    adam: AdamStep,
    unit: bool,
) -> Float[Tensor, ""] | None:
    """Take the step of `wsae.kernels.eager.update_rows_` on contiguous W, m, v [n, d] in place."""
    plan, rows = grad.plan, grad.rows.contiguous()
    chunks = sum_chunks(plan, grad.weights, rows)
    pairs = (plan.latent_rows, grad.weights, plan.order, chunks.rest, plan.latent_offsets[1:])
    return _launch(W, m, v, (rows, *pairs, chunks.sums, chunks.offsets), adam, unit)


def _launch(
    W: Tensor, m: Tensor, v: Tensor, terms: tuple[Tensor | None, ...], adam: AdamStep, unit: bool
) -> Tensor | None:
    n, d = W.shape
    for tensor in (W, m, v):  # rows are addressed by their number
        check(W.device, tensor, n, d)
        if tensor.dtype != torch.float32:
            raise TypeError(f"a tensor of {tensor.dtype} where the kernels keep float32")
    rows, columns, weights = terms[:3]
    if columns is None:
        check(W.device, rows, n, d)
    elif rows is not None:
        check(W.device, rows, len(rows), d)
        check(W.device, weights, len(columns))
    squares = None if adam.scale is None else W.new_zeros(n)
    if n == 0 or d == 0:
        return None if squares is None else squares.double().sum()
    block = triton.next_power_of_2(d)
    warps = min(16, max(1, block // 256))
    correction1, correction2 = 1 - adam.beta1**adam.step, 1 - adam.beta2**adam.step
    numbers = (adam.lr / correction1, correction2**-0.5, adam.eps, 1 - adam.beta1)
    _step[(n,)](
        *(W, m, v, *terms, adam.scale, squares, *numbers, adam.beta2, 1 - adam.beta2, d),
        UNIT=unit, PAIRS=4 if block <= 1024 else 2, BD=block, num_warps=warps,
    )  # fmt: skip
    return None if squares is None else squares.double().sum()


@triton.jit
@no_type_check
def _step(
    W, m, v, rows, columns, weights, order, starts, ends, chunk_sums, chunk_offsets, factor, squares,
    rate, scale, eps, new1, old2, new2, D,
    UNIT: tl.constexpr, PAIRS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """`rows` is the gradient itself, or with `columns` the rows whose weighted sum it is."""
    j = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BD)
    at, live = j * D + d, d < D
    if columns is None:
        g = tl.load(rows + at, mask=live, other=0.0)
    else:
        terms = tl.zeros([PAIRS, BD], tl.float32)
        start, end = tl.load(chunk_offsets + j), tl.load(chunk_offsets + j + 1)
        terms = add_rows(terms, chunk_sums, None, None, None, start, end, d, D, PAIRS)
        start, end = tl.load(starts + j), tl.load(ends + j).to(starts.dtype.element_ty)
        terms = add_rows(terms, rows, columns, weights, order, start, end, d, D, PAIRS)
        g = tl.sum(terms, 0)
    w = tl.load(W + at, mask=live, other=0.0)
    if UNIT:
        g -= tl.sum(g * w) * w
    if factor is not None:
        tl.store(squares + j, tl.sum(g * g))
        g *= tl.load(factor)
    mean = tl.load(m + at, mask=live, other=0.0)
    mean += new1 * (g - mean)
    square = old2 * tl.load(v + at, mask=live, other=0.0) + new2 * g * g
    w -= rate * mean / (tl.sqrt_rn(square) * scale + eps)
    if UNIT:
        w = w / tl.maximum(tl.sqrt_rn(tl.sum(w * w)), 1e-12)
    tl.store(m + at, mean, mask=live)
    tl.store(v + at, square, mask=live)
    tl.store(W + at, w, mask=live)
