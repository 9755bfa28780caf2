"""Tensors in slices of 32 dimensions, [slices, rows, 32], and pairs sorted by latent: what the kernels work on.

Dense equivalents (the specification) are in each function's docstring; W stands for the rows a slice tensor holds.
"""

import ctypes
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int32, Int64
from torch import Tensor

from wsae.kernels.eager import SparseCode
from wsae.kernels.native.build import library

SLICE = 32
Slices = Float[Tensor, "slices rows 32"]


def address(tensor: Tensor | None, *shape: int, dtype: torch.dtype = torch.float32) -> int | None:
    """Return where a tensor's data lie; the kernels read what is there as numbers of this type and shape.

    None is a null pointer. Raises TypeError for another type, ValueError for another shape, device or order in memory.
    """
    if tensor is None:
        return None
    if tensor.dtype != dtype:
        raise TypeError(f"a tensor of {tensor.dtype} where the kernels read {dtype}")
    if tensor.shape != shape or tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(
            f"a tensor of shape {tuple(tensor.shape)}, strides {tensor.stride()}, on {tensor.device} "
            f"where the kernels read {shape}, contiguous, on cpu"
        )
    return tensor.data_ptr()


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return memory for a kernel to fill, whatever PyTorch's default type and device are."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def slice_count(d_in: int) -> int:
    """Return the number of slices that d_in dimensions take."""
    return -(-d_in // SLICE)


def to_slices(rows: Float[Tensor, "rows d_in"]) -> Slices:
    """Return rows in slices, padded with zeros."""
    return Centred.of(rows).slices


class Centred(NamedTuple):
    """Activations less a centre, x - b_dec, twice: as rows and in slices padded with zeros."""

    rows: Float[Tensor, "batch d_in"]
    slices: Slices

    @classmethod
    def of(
        cls, x: Float[Tensor, "batch d_in"], centre: Float[Tensor, " d_in"] | None = None
    ) -> "Centred":
        """Centre rows."""
        n, d_in = x.shape
        x, out = x.contiguous(), empty(slice_count(d_in), n, SLICE)
        rows = x if centre is None else empty(n, d_in)
        library().to_slices(
            address(x, n, d_in),
            address(centre, d_in),
            n,
            d_in,
            address(out, *out.shape),
            None if centre is None else address(rows, n, d_in),
        )
        return cls(rows, out)


def from_slices(
    slices: Slices, d_in: int, scale: Float[Tensor, " rows"] | None = None
) -> Float[Tensor, "rows d_in"]:
    """Return the rows of a slice tensor, each times its scale."""
    n = slices.shape[1]
    out = empty(n, d_in)
    library().from_slices(
        address(slices, slice_count(d_in), n, SLICE),
        address(scale, n),
        n,
        d_in,
        address(out, n, d_in),
    )
    return out


class CPairs(ctypes.Structure):
    """struct Pairs of common.h."""

    _fields_ = (("offsets", ctypes.c_void_p), ("tokens", ctypes.c_void_p))


class SortedPairs(NamedTuple):
    """Pairs (token, latent) by latent, tokens in order within one; `order` says where each stood in the code."""

    offsets: Int64[Tensor, " d_sae_plus_1"]
    tokens: Int32[Tensor, " pairs"]
    order: Int64[Tensor, " pairs"]

    def c(self, d_sae: int) -> CPairs:
        """Return the C struct; the tensors must outlive its use."""
        return CPairs(
            address(self.offsets, d_sae + 1, dtype=torch.int64),
            address(self.tokens, len(self.order), dtype=torch.int32),
        )


class Level(NamedTuple):
    """One of the levels of a code's pairs."""

    of: Int64[Tensor, " pairs"]
    """The level of each pair."""
    number: int


def sort_pairs(code: SparseCode, d_sae: int, level: Level | None = None) -> SortedPairs:
    """Sort a code's pairs, or those of a level, by latent (as `wsae.kernels.eager.Plan`).

    Raises ValueError for a latent that is none.
    """
    n, long, short = len(code.indices), torch.int64, torch.int32
    kept = n if level is None else int((level.of == level.number).sum())
    offsets = empty(d_sae + 1, dtype=long)
    order, tokens = empty(kept, dtype=short), empty(kept, dtype=short)
    indices, starts = code.indices.contiguous(), code.offsets.contiguous()
    library().sort_pairs(
        address(indices, n, dtype=long),
        address(starts, code.batch + 1, dtype=long),
        code.batch,
        n,
        d_sae,
        address(None if level is None else level.of, n, dtype=long),
        0 if level is None else level.number,
        address(offsets, d_sae + 1, dtype=long),
        address(order, kept, dtype=short),
        address(tokens, kept, dtype=short),
    )
    return SortedPairs(offsets, tokens, order.long())


def decode(
    pairs: SortedPairs,
    values: Float[Tensor, " pairs"],
    W: Float[Tensor, "slices d_sae 32"],
    scale: Float[Tensor, " d_sae"] | None,
    batch: int,
    d_in: int,
    start: Float[Tensor, " d_in"] | None = None,
) -> Float[Tensor, "slices batch 32"]:
    """Return start + sum over a token's pairs of value * scale * W[latent], in slices."""
    d_sae, slices = W.shape[1], slice_count(d_in)
    out = empty(slices, batch, SLICE)
    library().decode(
        ctypes.byref(pairs.c(d_sae)),
        address(values, len(pairs.tokens)),
        address(W, slices, d_sae, SLICE),
        address(scale, d_sae),
        address(start, d_in),
        d_sae,
        batch,
        d_in,
        address(out, *out.shape),
    )
    return out


def dots(
    pairs: SortedPairs,
    left: Float[Tensor, "slices batch 32"],
    W: Float[Tensor, "slices d_sae 32"],
    scale: Float[Tensor, " d_sae"] | None,
    d_in: int,
) -> Float[Tensor, " pairs"]:
    """Return scale * W[latent] . left[token] for every pair (as `wsae.kernels.eager._pair_products`)."""
    d_sae, batch, slices = W.shape[1], left.shape[1], slice_count(d_in)
    out = empty(len(pairs.tokens)).zero_()
    library().dots(
        ctypes.byref(pairs.c(d_sae)),
        address(left, slices, batch, SLICE),
        address(W, slices, d_sae, SLICE),
        address(scale, d_sae),
        d_sae,
        batch,
        d_in,
        address(out, len(out)),
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
    errors = empty(batch, 2, dtype=torch.float64)
    x, gamma = x.contiguous(), gamma.contiguous()
    partial = empty(-(-batch // 64), d_in)
    library().residual(
        address(x_hat, slice_count(d_in), batch, SLICE),
        address(x, batch, d_in),
        address(gamma, d_in),
        batch,
        d_in,
        address(errors, batch, 2, dtype=torch.float64),
        address(partial, *partial.shape),
    )
    return Residual(x_hat, errors, partial.sum(0))
