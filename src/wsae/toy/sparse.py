"""Features of very large and very sparse worlds: only the active entries, at a cost that follows their number."""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from wsae.core.errors import UserError
from wsae.ops import SparseCode
from wsae.ops.codes import offsets_of
from wsae.toy.config import EqualRates, FeatureConfig, Independent
from wsae.toy.draws import activity, apply_magnitudes, generator

_CERTAIN = 40.0
"""Hazard of a feature that is always active: exp(-40) is below float64's resolution of 1."""


def sample_sparse(cfg: FeatureConfig, rows: int, seed: int, step: int = 0) -> SparseCode:
    """Return the active entries of x [rows, n_features]: values, features (`indices`) and row offsets.

    The points of a Poisson process with intensity h_i = -ln(1 - p_i) in cell (row, i): a cell holds a point with
    probability 1 - exp(-h_i) = p_i, independently of all others, so the law of x is exactly the dense sampler's (the
    draws are others). Row by row, ascending features. Cost follows rows * sum_i h_i, the number of active entries where
    p is small: with equal rates it is the faster sampler from about S = 0.9 on, and 40 times faster at S = 0.999 with
    n = 10,000. Raises UserError for features that do not fire independently.
    """
    if not isinstance(cfg.structure, Independent):
        raise UserError(
            f"structure '{cfg.structure.kind}': only independent features have a sparse sampler; use FeatureStream"
        )
    if rows < 1:
        raise UserError(f"rows = {rows}: a batch has at least one row")
    stream = generator(seed, "sparse", cfg.n_features, step)
    row, feature = _active_cells(cfg, rows, stream)
    # r is in [0, 1), so 1 - r is in (0, 1], as in the dense sampler
    values = np.float32(1) - stream.random(len(row), dtype=np.float32)
    apply_magnitudes(values, cfg.magnitudes)
    offsets = offsets_of(torch.from_numpy(row), rows)
    return SparseCode(torch.from_numpy(values), torch.from_numpy(feature), offsets)


def embed_sparse(
    W_p: Float[Tensor, "d_in n_features"], code: SparseCode
) -> Float[Tensor, "rows d_in"]:
    """Return x_p = W_p x (Eq. 1) [rows, d_in] of a sparse x: the sum of its active columns, weighted.

    No [rows, n_features] matrix is made. A W_p stored column by column (`W_p.T.contiguous().T`) is read in place;
    otherwise each call copies it once.
    """
    directions = W_p.T.contiguous()
    return F.embedding_bag(
        code.indices,
        directions,
        code.offsets[:-1],
        mode="sum",
        per_sample_weights=code.values.to(directions.dtype),
    )


def _active_cells(
    cfg: FeatureConfig, rows: int, stream: np.random.Generator
) -> tuple[Int64[np.ndarray, " nnz"], Int64[np.ndarray, " nnz"]]:
    """Return (row, feature) of the cells with at least one point, in order."""
    n, hazard, edges = cfg.n_features, 0.0, np.zeros(0)
    if isinstance(cfg.rates, EqualRates):
        hazard = float(_hazard(np.array([1.0 - cfg.sparsity]))[0])
        per_row = n * hazard
    else:
        edges = np.cumsum(_hazard(activity(cfg)))
        per_row = edges[-1]
    count = int(stream.poisson(rows * per_row))
    if count == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    gaps = np.cumsum(stream.standard_exponential(count + 1))  # sorted uniforms, without sorting
    place = gaps[:-1] * (rows * per_row / gaps[-1])
    row = np.minimum((place / per_row).astype(np.int64), rows - 1)
    within = place - row * per_row
    feature = (
        np.searchsorted(edges, within, "right") if len(edges) else (within / hazard).astype(int)
    )
    feature = np.clip(feature, 0, n - 1)
    new = np.diff(row * n + feature, prepend=-1) != 0
    return row[new], feature[new]


def _hazard(p: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """Return -ln(1 - p), which is infinite for p = 1, as a finite number that makes no difference."""
    with np.errstate(divide="ignore"):
        return np.minimum(-np.log1p(-p), _CERTAIN)
