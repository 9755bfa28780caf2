"""Tensors in slices of 32 dimensions, [slices, rows, 32], and pairs sorted by latent: what the kernels work on.

Dense equivalents (the specification) are in each function's docstring; W stands for the rows a slice tensor holds.
"""

import ctypes
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int32, Int64
from torch import Tensor

from wsae.ops.codes import SparseCode
from wsae.ops.native.build import library

SLICE = 32
Slices = Float[Tensor, "slices rows 32"]


def pointer(tensor: Tensor | None) -> ctypes.c_void_p | None:
    """Return the address of a contiguous CPU tensor's data."""
    if tensor is None:
        return None
    assert tensor.is_contiguous(), tensor.shape
    return ctypes.c_void_p(tensor.data_ptr())


def slice_count(d_in: int) -> int:
    """Return the number of slices that d_in dimensions take."""
    return -(-d_in // SLICE)


def to_slices(
    rows: Float[Tensor, "rows d_in"], centre: Float[Tensor, " d_in"] | None = None
) -> Slices:
    """Return rows - centre in slices, padded with zeros."""
    n, d_in = rows.shape
    out = torch.empty(slice_count(d_in), n, SLICE)
    rows = rows.contiguous()
    library().to_slices(pointer(rows), pointer(centre), _i(n), _i(d_in), pointer(out))
    return out


def from_slices(
    slices: Slices, d_in: int, scale: Float[Tensor, " rows"] | None = None
) -> Float[Tensor, "rows d_in"]:
    """Return the rows of a slice tensor, each times its scale."""
    n = slices.shape[1]
    out = torch.empty(n, d_in)
    library().from_slices(pointer(slices), pointer(scale), _i(n), _i(d_in), pointer(out))
    return out


class CPairs(ctypes.Structure):
    """struct Pairs of common.h."""

    _fields_ = (("offsets", ctypes.c_void_p), ("tokens", ctypes.c_void_p))


class SortedPairs(NamedTuple):
    """Pairs (token, latent) by latent, tokens in order within one; `order` says where each stood in the code."""

    offsets: Int64[Tensor, " d_sae_plus_1"]
    tokens: Int32[Tensor, " pairs"]
    order: Int64[Tensor, " pairs"]

    def c(self) -> CPairs:
        """Return the C struct; the tensors must outlive its use."""
        return CPairs(self.offsets.data_ptr(), self.tokens.data_ptr())


def sort_pairs(code: SparseCode, d_sae: int) -> SortedPairs:
    """Sort a code's pairs by latent (as `wsae.ops.sparse.Plan`)."""
    n = len(code.indices)
    offsets = torch.empty(d_sae + 1, dtype=torch.int64)
    order, tokens = torch.empty(n, dtype=torch.int32), torch.empty(n, dtype=torch.int32)
    library().sort_pairs(
        pointer(code.indices.contiguous()),
        pointer(code.offsets.contiguous()),
        _i(code.batch),
        _i(d_sae),
        pointer(offsets),
        pointer(order),
        pointer(tokens),
    )
    return SortedPairs(offsets, tokens, order.long())


def decode(
    pairs: SortedPairs,
    values: Float[Tensor, " pairs"],
    W: Float[Tensor, "slices d_sae 32"],
    scale: Float[Tensor, " d_sae"] | None,
    shape: tuple[int, int],
    start: Float[Tensor, " d_in"] | None = None,
) -> Float[Tensor, "slices batch 32"]:
    """Return start + sum over a token's pairs of value * scale * W[latent], in slices; `shape` is (batch, d_in)."""
    batch, d_in = shape
    out = torch.empty(slice_count(d_in), batch, SLICE)
    library().decode(
        ctypes.byref(pairs.c()),
        pointer(values),
        pointer(W),
        pointer(scale),
        pointer(start),
        _i(W.shape[1]),
        _i(batch),
        _i(d_in),
        pointer(out),
    )
    return out


def dots(
    pairs: SortedPairs,
    left: Float[Tensor, "slices batch 32"],
    W: Float[Tensor, "slices d_sae 32"],
    scale: Float[Tensor, " d_sae"] | None,
    d_in: int,
) -> Float[Tensor, " pairs"]:
    """Return scale * W[latent] . left[token] for every pair (as `wsae.ops.sparse._pair_products`)."""
    out = torch.zeros(len(pairs.tokens))
    library().dots(
        ctypes.byref(pairs.c()),
        pointer(left),
        pointer(W),
        pointer(scale),
        _i(W.shape[1]),
        _i(left.shape[1]),
        _i(d_in),
        pointer(out),
    )
    return out


class Residual(NamedTuple):
    """What the reconstruction of a batch leaves."""

    gradient: Slices
    """G = dL/dx_hat = (2 / batch) gamma^2 (x_hat - x)."""
    errors: Float64[Tensor, "batch 2"]
    """|x_hat - x|^2 and |gamma (x_hat - x)|^2 per token."""
    total: Float[Tensor, " d_in"]
    """Sum of G over the batch."""
    error: Float[Tensor, "batch d_in"] | None = None
    """x_hat - x, kept where a matrix Gamma made G of it."""


def residual(
    x_hat: Float[Tensor, "slices batch 32"],
    x: Float[Tensor, "batch d_in"],
    gamma: Float[Tensor, " d_in"],
) -> Residual:
    """Return G, in place of x_hat, and the losses (Eq. 12)."""
    batch, d_in = x.shape
    errors = torch.empty(batch, 2, dtype=torch.float64)
    partial = torch.empty(-(-batch // 64), d_in)
    library().residual(
        pointer(x_hat),
        pointer(x.contiguous()),
        pointer(gamma.contiguous()),
        _i(batch),
        _i(d_in),
        pointer(errors),
        pointer(partial),
    )
    return Residual(x_hat, errors, partial.sum(0))


def _i(value: int) -> ctypes.c_int64:
    return ctypes.c_int64(value)
