"""Which latents are active and their exact values, from an 8-bit product that keeps no [batch, d_sae] array.

The specification is `wsae.kernels.eager` on (x - b_dec) @ W_enc + b_enc in float32; select.cpp says how and how
surely the 8-bit product finds the same latents.
"""

import ctypes
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from wsae.kernels.eager import SparseCode, code_from_topk, offsets_of, select_group_topk
from wsae.kernels.native.build import has_int8, library
from wsae.kernels.native.slices import (
    SLICE,
    Centred,
    Slices,
    address,
    empty,
    from_slices,
    slice_count,
)

CHUNK = 84
"""Tokens scanned together: 6 tiles of 14, whose 8-bit rows and candidates stay in the second-level cache."""
LARGEST_SHARE = 8
"""A Top-k with k above d_sae / 8 is not sparse enough to gain."""
ROWS = 256
"""Rows whose pre-activations exist at a time on a CPU without 8-bit dot products."""


_AGREE = ctypes.CFUNCTYPE(ctypes.c_void_p)


class CEncoder(ctypes.Structure):
    """struct Encoder of select.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("W", "bias", "floor")),
        *((name, ctypes.c_int64) for name in ("d_sae", "d_in", "group")),
        *((name, ctypes.c_void_p) for name in ("packed", "scale", "norm", "dim")),
    )


class CSelection(ctypes.Structure):
    """struct Selection of select.cpp."""

    _fields_ = (
        ("k", ctypes.c_int64),
        *((name, ctypes.c_float) for name in ("above", "guess", "trend")),
        *((name, ctypes.c_int64) for name in ("keep", "whole")),
        *((name, ctypes.c_void_p) for name in ("norms", "lower")),
        ("agree", _AGREE),
        ("parts", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("values", "indices", "counts")),
        *((name, ctypes.c_int64) for name in ("examined", "exhaustive", "repeated")),
    )


@dataclass
class Effort:
    """What selections cost so far; it changes with machine and history, the selected latents do not."""

    tokens: int = 0
    examined: int = 0
    """Pre-activations computed exactly."""
    exhaustive: int = 0
    """Tokens for which all were."""
    repeated: int = 0
    """Tokens scanned twice."""


@dataclass
class RoundedEncoder:
    """An 8-bit copy of the encoder, in panels of 32 latents of one group, and what bounds its rounding errors."""

    d_sae: int
    d_in: int
    group: int
    """Latents per group (d_sae where there are no groups)."""
    dim: Float[Tensor, " padded_d_in"]
    """Scale of each dimension: activations are divided by it, weights multiplied."""
    int8: bool = field(init=False)
    packed: Tensor = field(init=False)
    scale: Tensor = field(init=False)
    norm: Tensor = field(init=False)
    largest: Tensor = field(init=False)
    square: Tensor = field(init=False)
    guess: float = math.nan
    trend: float = math.nan
    effort: Effort = field(default_factory=Effort)

    def __post_init__(self) -> None:
        d_sae, d_in, group = self.d_sae, self.d_in, self.group
        if min(d_sae, d_in, group) < 1 or d_sae % group:
            raise ValueError(f"groups of {group} of {d_sae} latents, {d_in} dimensions")
        self.int8 = has_int8()
        padded = library().padded_latents(d_sae, group)
        size = library().packed_bytes(d_sae, d_in, group) if self.int8 else 0
        self.packed = empty(size, dtype=torch.uint8).fill_(128)
        self.scale, self.norm = empty(padded).fill_(1), empty(padded).zero_()
        self.largest, self.square = empty(d_sae).zero_(), empty(d_sae).zero_()

    def measure(self, W: Slices) -> None:
        """Find each row's largest entry and square norm, times the dimensions' scales."""
        library().measure_rows(*self._rows(W), self.d_sae, self.d_in, *self._measured())

    def pack(self, W: Slices) -> None:
        """Round the rows of W; `largest` and `square` must be theirs."""
        if self.int8:
            packed = address(self.packed, len(self.packed), dtype=torch.uint8)
            padded = [address(t, len(self.scale)) for t in (self.scale, self.norm)]
            sizes = (self.d_sae, self.d_in, self.group)
            library().pack(*self._rows(W), *self._measured(), *sizes, packed, *padded)

    def _rows(self, W: Slices) -> list[int | None]:
        slices = slice_count(self.d_in)
        return [address(W, slices, self.d_sae, SLICE), address(self.dim, slices * SLICE)]

    def _measured(self) -> list[int | None]:
        return [address(t, self.d_sae) for t in (self.largest, self.square)]


def dimension_scales(spread: Float[Tensor, " d_in"]) -> Float[Tensor, " padded_d_in"]:
    """Return sqrt(spread), padded with ones: rounding errors are then shared by activations and weights alike."""
    d_in = len(spread)
    typical = float(spread.double().square().mean().sqrt()) or 1.0
    scales = empty(slice_count(d_in) * SLICE).fill_(1)
    scales[:d_in] = (spread.float() / typical).clamp_min(1e-3).sqrt()
    return scales


def select_topk(
    encoder: RoundedEncoder, W: Slices, bias: Tensor | None, centred: Centred, k: int
) -> SparseCode:
    """Return the k largest pre-activations of each row, or the largest of each of k groups, in order of latent."""
    groups = encoder.group < encoder.d_sae
    if not encoder.int8:
        values, indices = [], []
        for pre in _products(W, bias, centred.rows):
            picked = select_group_topk(pre, k) if groups else pre.topk(k, sorted=False).indices
            indices.append(picked.sort(1).values)
            values.append(pre.gather(1, indices[-1]))
        return code_from_topk(torch.cat(values), torch.cat(indices))
    if not 1 <= k <= encoder.d_sae or (groups and k * encoder.group != encoder.d_sae):
        raise ValueError(f"{k} of {encoder.d_sae} latents in groups of {encoder.group}")
    batch = len(centred.rows)
    values, indices = empty(batch, k), empty(batch, k, dtype=torch.int64)
    asked = CSelection(k=1 if groups else k, keep=k, above=-math.inf)
    asked.values, asked.indices = values.data_ptr(), indices.data_ptr()
    _run(encoder, W, bias, None, centred, asked, None)
    return code_from_topk(values, indices)


def select_topk_shared(
    encoder: RoundedEncoder,
    W: Slices,
    bias: Tensor | None,
    centred: Centred,
    k: int,
    gather: Callable[[Tensor], Tensor],
    part: int,
) -> SparseCode:
    """Return which of each row's k largest pre-activations are of these latents, where others have more.

    `gather` returns everyone's tensors of one shape, stacked; this is part `part` of them. Lower bounds from the 8-bit
    product are gathered first, so that few more than k exact values a row are computed by all parts together. The guess
    from the batch before is of the k-th largest of all; rows for which the parts find fewer than k above it are done
    again without. Ties go to the lower part.
    """
    batch = len(centred.rows)
    norms, guess = empty(batch), torch.tensor([encoder.guess, encoder.trend], dtype=torch.float32)
    values, indices = _best(encoder, W, bias, centred, k, norms, batch, gather)
    everyone = gather(values)
    short = ((everyone > -math.inf).sum((0, 2)) < k).nonzero()[:, 0]
    if len(short):
        encoder.guess = math.nan
        again = Centred(centred.rows[short], centred.slices[:, short].contiguous())
        best = _best(encoder, W, bias, again, k, empty(len(short)), batch, gather)
        values[short], indices[short] = best
        everyone[:, short] = gather(values[short])
    offsets = empty(batch + 1, dtype=torch.int64)
    library().keep_shared(
        address(everyone, len(everyone), batch, k),
        *(len(everyone), part, batch, k),
        address(norms, batch),
        address(values, batch, k),
        address(indices, batch, k, dtype=torch.int64),
        address(offsets, batch + 1, dtype=torch.int64),
        address(guess, 2),
    )
    encoder.guess, encoder.trend = guess.tolist()
    n = int(offsets[-1])
    return SparseCode(values.view(-1)[:n], indices.view(-1)[:n], offsets)


class _Best(NamedTuple):
    """Each row's k largest pre-activations, or those of them above its guess; -infinity where there are fewer."""

    values: Float[Tensor, "batch k"]
    indices: Int64[Tensor, "batch k"]


def _best(
    encoder: RoundedEncoder,
    W: Slices,
    bias: Tensor | None,
    centred: Centred,
    k: int,
    norms: Float[Tensor, " batch"],
    whole: int,
    gather: Callable[[Tensor], Tensor],
) -> _Best:
    """Return what these latents have, and fill in the rows' norms; they are all or some of a batch of `whole` rows."""
    batch = len(centred.rows)
    lower = empty(batch, k).fill_(-math.inf)
    if not encoder.int8:
        gather(lower)  # others may have bounds to tell
        norms.copy_(torch.linalg.vector_norm(centred.rows, dim=1))
        code = select_topk(encoder, W, bias, centred, k)
        return _Best(code.values.view(batch, k), code.indices.view(batch, k))
    values, indices = empty(batch, k), empty(batch, k, dtype=torch.int64)
    asked = CSelection(k=k, keep=k, whole=whole, above=-math.inf, norms=norms.data_ptr())
    asked.values, asked.indices = values.data_ptr(), indices.data_ptr()
    told: list[Tensor] = []
    failed: list[BaseException] = []

    def agree() -> int | None:
        try:
            told.append(gather(lower))
        except BaseException as error:  # noqa: BLE001  raised below: nothing passes through C
            failed.append(error)
            return None
        asked.parts = len(told[0])
        return told[0].data_ptr()

    asked.lower, asked.agree = lower.data_ptr(), _AGREE(agree)
    try:
        counts = _run(encoder, W, bias, None, centred, asked, None)
    finally:
        if failed:
            raise failed[0] from None
    values.masked_fill_(torch.arange(k) >= counts[:, None], -math.inf)
    return _Best(values, indices)


def rank_levels(code: SparseCode, k: int) -> Int64[Tensor, " pairs"]:
    """Return 0 for the k largest of each row and 1 for the rest (as `wsae.sae.forward.level_by_rank`)."""
    n, batch = len(code.values), code.batch
    values, level = code.values.contiguous(), empty(n, dtype=torch.int64)
    wide = n // max(1, batch)
    library().rank_levels(address(values, n), batch, wide, k, address(level, n, dtype=torch.int64))
    return level


def select_above(
    encoder: RoundedEncoder,
    W: Slices,
    bias: Tensor | None,
    centred: Centred,
    above: float | Float[Tensor, "*per_latent"],
) -> SparseCode:
    """Return every pre-activation above a bound, or above each latent's own, in order of row and latent."""
    floor = above if isinstance(above, Tensor) and above.ndim else None
    above = float(above) if floor is None else 0.0
    if not encoder.int8:
        values, indices, where = [], [], []
        for i, pre in enumerate(_products(W, bias, centred.rows)):
            row, latent = ((pre if floor is None else pre - floor) > above).nonzero(as_tuple=True)
            values.append(pre[row, latent])
            indices.append(latent)
            where.append(row + i * ROWS)
        offsets = offsets_of(torch.cat(where), len(centred.rows))
        return SparseCode(torch.cat(values), torch.cat(indices), offsets)
    return _listed(encoder, W, bias, floor, centred, CSelection(k=0, above=above))


def select_positive(
    encoder: RoundedEncoder, W: Slices, bias: Tensor | None, centred: Centred, k: int
) -> SparseCode:
    """Return the positive pre-activations among the k largest of each row, in order of row and latent."""
    if not encoder.int8:
        found = select_topk(encoder, W, bias, centred, k)
        return found.where(found.values > 0)
    if not 1 <= k <= encoder.d_sae or encoder.group < encoder.d_sae:
        raise ValueError(f"{k} of {encoder.d_sae} latents in groups of {encoder.group}")
    return _listed(encoder, W, bias, None, centred, CSelection(k=k, keep=k, above=0.0))


def _listed(
    encoder: RoundedEncoder,
    W: Slices,
    bias: Tensor | None,
    floor: Tensor | None,
    centred: Centred,
    asked: CSelection,
) -> SparseCode:
    """Run a selection of any number of entries a row."""
    lib = library()
    lists = lib.new_lists()
    try:
        counts = _run(encoder, W, bias, floor, centred, asked, lists)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        n = int(offsets[-1])
        values, indices = empty(n), empty(n, dtype=torch.int64)
        lib.collect(lists, address(values, n), address(indices, n, dtype=torch.int64))
    finally:
        lib.free_lists(lists)
    return SparseCode(values, indices, offsets)


def _products(W: Slices, bias: Tensor | None, rows: Tensor) -> Iterator[Tensor]:
    transposed = from_slices(W, rows.shape[1]).T
    for part in rows.split(ROWS):
        yield part @ transposed if bias is None else torch.addmm(bias, part, transposed)


def _run(
    encoder: RoundedEncoder,
    W: Slices,
    bias: Tensor | None,
    floor: Tensor | None,
    centred: Centred,
    asked: CSelection,
    lists: int | None,
) -> Int64[Tensor, " batch"]:
    rows, slices = centred
    batch = len(rows)
    counts = empty(batch, dtype=torch.int64)
    vectors = [address(t, encoder.d_sae) for t in (bias, floor)]
    c_encoder = _encoder(encoder, W, *vectors)
    asked.whole = asked.whole or batch
    asked.counts, asked.guess, asked.trend = counts.data_ptr(), encoder.guess, encoder.trend
    given = (
        ctypes.byref(c_encoder),
        address(rows, batch, encoder.d_in),
        address(slices, slice_count(encoder.d_in), batch, SLICE),
    )
    library().select_int8(*given, batch, _chunk(batch), ctypes.byref(asked), lists)
    if asked.k and not asked.norms:
        encoder.guess, encoder.trend = asked.guess, asked.trend
    effort = encoder.effort
    effort.tokens += batch
    effort.examined += asked.examined
    effort.exhaustive += asked.exhaustive
    effort.repeated += asked.repeated
    return counts


def product_int8(encoder: RoundedEncoder, W: Slices, rows: Float[Tensor, "batch d_in"]) -> None:
    """Compute the 8-bit product from which latents are selected, and nothing else: a bound to measure."""
    batch = len(rows)
    x = address(rows, batch, encoder.d_in)
    library().product_int8(ctypes.byref(_encoder(encoder, W)), x, batch, _chunk(batch))


def _encoder(
    encoder: RoundedEncoder, W: Slices, bias: int | None = None, floor: int | None = None
) -> CEncoder:
    d_sae, d_in, padded = encoder.d_sae, encoder.d_in, len(encoder.scale)
    shape = (slice_count(d_in), d_sae, SLICE)
    copies = [
        address(encoder.packed, len(encoder.packed), dtype=torch.uint8),
        *(address(t, padded) for t in (encoder.scale, encoder.norm)),
        address(encoder.dim, shape[0] * SLICE),
    ]
    return CEncoder(address(W, *shape), bias, floor, d_sae, d_in, encoder.group, *copies)


def _chunk(batch: int) -> int:
    """Return how many tokens are scanned together."""
    return max(14, min(CHUNK, -(-batch // torch.get_num_threads()) // 14 * 14))
