"""One SAE's weights and Adam moments in slices, and their update from pairs without a gradient matrix.

The specification is autograd through `wsae.kernels.eager` followed by `wsae.kernels.eager.adam_rows_`.
"""

import ctypes
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from wsae.kernels.eager import AdamStep
from wsae.kernels.native.build import library
from wsae.kernels.native.select import RoundedEncoder
from wsae.kernels.native.slices import (
    SLICE,
    CPairs,
    Slices,
    SortedPairs,
    address,
    decode,
    dots,
    empty,
    from_slices,
    slice_count,
    to_slices,
)

BLOCK = 64


class CTerms(ctypes.Structure):
    """struct Terms of sparse.cpp."""

    _fields_ = (
        ("pairs", CPairs),
        *((name, ctypes.c_void_p) for name in ("z", "v", "along", "G")),
    )


class CMatrix(ctypes.Structure):
    """struct Matrix of sparse.cpp."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("W", "m", "v"))


class CUpdate(ctypes.Structure):
    """struct Update of sparse.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("d_sae", "d_in", "d_out", "tokens", "terms")),
        ("term", ctypes.c_void_p),
        ("centred", ctypes.c_void_p),
        ("decoder", CMatrix),
        ("encoder", CMatrix),
        *((name, ctypes.c_void_p) for name in ("b_enc", "b_enc_m", "b_enc_v")),
        *((name, ctypes.c_float) for name in ("lr", "beta1", "beta2", "eps")),
        *((name, ctypes.c_float) for name in ("correction1", "correction2")),
        ("unit", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("row_scale", "norm", "pull")),
        *((name, ctypes.c_void_p) for name in ("partial", "dim", "largest", "square")),
        ("factor", ctypes.c_float),
        ("slope", ctypes.c_void_p),
    )


class DenseMatrix(NamedTuple):
    """A weight matrix and its Adam moments as rows."""

    W: Float[Tensor, "rows d_in"]
    m: Float[Tensor, "rows d_in"]
    v: Float[Tensor, "rows d_in"]


class Bias(NamedTuple):
    """b_enc and its Adam moments."""

    b: Float[Tensor, " d_sae"]
    m: Float[Tensor, " d_sae"]
    v: Float[Tensor, " d_sae"]


@dataclass
class Matrix:
    """A weight matrix [rows, d_in] and its Adam moments, in slices."""

    W: Float[Tensor, "slices rows 32"]
    m: Float[Tensor, "slices rows 32"]
    v: Float[Tensor, "slices rows 32"]

    @staticmethod
    def of(
        rows: Float[Tensor, "rows d_in"],
        m: Float[Tensor, "rows d_in"],
        v: Float[Tensor, "rows d_in"],
    ) -> "Matrix":
        """Take rows and moments in the usual layout."""
        return Matrix(to_slices(rows), to_slices(m), to_slices(v))

    def dense(self, d_in: int, scale: Float[Tensor, " rows"] | None = None) -> "DenseMatrix":
        """Return rows (each times its scale) and moments in the usual layout."""
        moments = (from_slices(t, d_in) for t in (self.m, self.v))
        return DenseMatrix(from_slices(self.W, d_in, scale), *moments)

    def c(self, slices: int, rows: int) -> CMatrix:
        """Return the C struct."""
        return CMatrix(*(address(t, slices, rows, SLICE) for t in (self.W, self.m, self.v)))


class Terms(NamedTuple):
    """One set of pairs and their part of the gradients, sorted by latent: dW_dec[j] = sum z G, dW_enc[j] = sum v c."""

    pairs: SortedPairs
    z: Float[Tensor, " pairs"]
    v: Float[Tensor, " pairs"]
    along: Float[Tensor, " pairs"]
    """W_dec[j] . G[token]: with z, the radial part of the decoder's gradient."""
    gradient: Slices
    """G = dL/dx_hat."""

    def c(self, d_sae: int, slices: int, batch: int) -> CTerms:
        """Return the C struct."""
        pairs = [address(t, len(self.pairs.tokens)) for t in (self.z, self.v, self.along)]
        gradient = address(self.gradient, slices, batch, SLICE)
        return CTerms(self.pairs.c(d_sae), *pairs, gradient)


class Updated(NamedTuple):
    """What a step's gradients came to, before the step."""

    by_bias: Float[Tensor, " d_in"]
    """sum_j db_enc[j] W_enc[j]."""
    square: Float64[Tensor, ""]
    """Sum of squares of the gradients of both matrices and b_enc, not multiplied by the scale."""


@dataclass
class Weights:
    """An SAE's large tensors during compiled training."""

    d_in: int
    d_out: int
    """Width of the decoder's rows; an SAE's is d_in."""
    decoder: Matrix
    encoder: Matrix | None
    """None when tied."""
    row_scale: Float[Tensor, " d_sae"]
    """The decoder is row_scale * decoder.W: unit rows are normalised when next used (tied: 1)."""
    norm: Float[Tensor, " d_sae"]
    """Norms of the decoder's rows (untied: before normalisation)."""
    rounded: RoundedEncoder

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return len(self.row_scale)

    @property
    def encoder_rows(self) -> Slices:
        """The encoder's rows in slices."""
        return self.decoder.W if self.encoder is None else self.encoder.W

    @property
    def scale(self) -> Float[Tensor, " d_sae"] | None:
        """What makes the decoder's rows unit ones (untied)."""
        return None if self.encoder is None else self.row_scale

    @property
    def norms(self) -> Float[Tensor, " d_sae"] | None:
        """The norms of a tied SAE's rows; None stands for unit rows."""
        return self.norm if self.encoder is None else None

    def W_dec(self) -> Float[Tensor, "d_sae d_in"]:
        """Return the decoder's rows in the usual layout."""
        return from_slices(self.decoder.W, self.d_out, self.scale)

    def decode(
        self,
        pairs: SortedPairs,
        z: Float[Tensor, " pairs"],
        batch: int,
        start: Float[Tensor, " d_out"] | None = None,
    ) -> Slices:
        """Return start + sum over a token's pairs of z * W_dec[latent]."""
        return decode(pairs, z, self.decoder.W, self.scale, batch, self.d_out, start)

    def dots(self, pairs: SortedPairs, left: Slices) -> Float[Tensor, " pairs"]:
        """Return W_dec[latent] . left[token] for every pair."""
        return dots(pairs, left, self.decoder.W, self.scale, self.d_out)

    def dense(self) -> "tuple[DenseMatrix, ...]":
        """Return decoder and (untied) encoder in the usual layout, decoder rows normalised."""
        decoder = self.decoder.dense(self.d_out, self.scale)
        return (decoder,) if self.encoder is None else (decoder, self.encoder.dense(self.d_in))

    def update(
        self,
        terms: list[Terms],
        centred: Slices,
        rates: AdamStep,
        bias: Bias | None = None,
        pull: Float[Tensor, " d_sae"] | None = None,
    ) -> Updated:
        """Take one Adam step on both matrices and b_enc.

        `pull` is added to the decoder's gradient times the row (tied L1).
        """
        d_sae, slices, batch = self.d_sae, slice_count(self.d_in), centred.shape[1]
        given = slice_count(self.d_out)
        u = CUpdate()
        keep = (CTerms * len(terms))(*(t.c(d_sae, given, batch) for t in terms))
        u.d_sae, u.d_in, u.d_out = d_sae, self.d_in, self.d_out
        u.tokens, u.terms = batch, len(terms)
        u.term, u.centred = ctypes.addressof(keep), address(centred, slices, batch, SLICE)
        u.decoder = self.decoder.c(given, d_sae)
        u.encoder = CMatrix() if self.encoder is None else self.encoder.c(slices, d_sae)
        u.lr, u.beta1, u.beta2, u.eps = rates.lr, rates.beta1, rates.beta2, rates.eps
        u.correction1 = 1 - rates.beta1**rates.step
        u.correction2 = 1 - rates.beta2**rates.step
        u.unit = int(self.encoder is not None)
        u.row_scale, u.norm = (address(t, d_sae) for t in (self.row_scale, self.norm))
        u.pull = address(pull, d_sae)
        partial = None
        if bias is not None:
            u.b_enc, u.b_enc_m, u.b_enc_v = (address(t, d_sae) for t in bias)
            partial = empty(math.ceil(d_sae / BLOCK), slices * SLICE).zero_()
            u.partial = partial.data_ptr()
        u.dim = address(self.rounded.dim, slices * SLICE)
        u.largest, u.square = (
            address(t, d_sae) for t in (self.rounded.largest, self.rounded.square)
        )
        slope = empty(math.ceil(d_sae / BLOCK))
        u.factor = 1 if rates.scale is None else float(rates.scale)
        u.slope = slope.data_ptr()
        library().update_latents(ctypes.byref(u))
        self.rounded.pack(self.encoder_rows)
        none = empty(self.d_in).zero_()
        by_bias = none if partial is None else partial.sum(0)[: self.d_in]
        return Updated(by_bias, slope.sum(dtype=torch.float64))


def make_weights(
    decoder: Matrix,
    encoder: Matrix | None,
    d_in: int,
    group: int,
    dim: Float[Tensor, " padded_d_in"],
    d_out: int | None = None,
) -> Weights:
    """Return the state of one SAE at any point of its training; a transcoder's decoder has rows of width d_out."""
    d_sae = decoder.W.shape[1]
    rounded = RoundedEncoder(d_sae, d_in, group, dim)
    rows = decoder.W if encoder is None else encoder.W
    rounded.measure(rows)
    rounded.pack(rows)
    norm = torch.linalg.vector_norm(decoder.W, dim=(0, 2))
    return Weights(d_in, d_out or d_in, decoder, encoder, torch.ones_like(norm), norm, rounded)
