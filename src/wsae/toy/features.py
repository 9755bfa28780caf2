"""Batches of ground-truth features of many worlds at once; a batch depends on (config, seed, step) alone."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Float64, Int64
from scipy.special import ndtri
from torch import Tensor

from wsae.core.errors import UserError
from wsae.core.seeds import seed_for
from wsae.kernels.eager import SparseCode, offsets_of
from wsae.toy.config import (
    Correlated,
    EqualRates,
    FeatureConfig,
    Hierarchical,
    Independent,
    Magnitudes,
    ZipfRates,
)

Draw = Literal["uniform", "normal"]
_SMALLEST = np.float32(2.0**-25)
"""Magnitude of an active feature whose draw rounds to none: activity always shows as x > 0."""


def generator(seed: int, *names: object) -> np.random.Generator:
    """Return the stream called `names` under the seed; SFC64 is numpy's fastest for float32."""
    return np.random.Generator(np.random.SFC64(seed_for(seed, "features", *names)))


def activity(cfg: FeatureConfig) -> Float64[np.ndarray, " n_features"]:
    """Return P(x_i > 0) of every feature: p_i = min(1, c w_i) with c such that the mean is 1 - S.

    w_i = rank^-a (Zipf; else 1), times P(active | parent active) for the children of a hierarchy.
    """
    n, weights = cfg.n_features, _weights(cfg)
    if weights.min() == weights.max():
        return np.full(n, 1.0 - cfg.sparsity)
    descending = np.sort(weights)[::-1]
    left = n * (1.0 - cfg.sparsity) - np.arange(n)  # activity left once the first k are always on
    scale = left / np.cumsum(descending[::-1])[::-1]
    first = int(np.argmax(scale * descending <= 1 + 1e-12))
    return np.minimum(1.0, scale[first] * weights)


def feature_moments(
    cfg: FeatureConfig,
) -> tuple[Float64[Tensor, " n_features"], Float64[Tensor, " n_features"]]:
    """Return E[x_i] = p_i E[m] and E[x_i^2] = p_i E[m^2], each [n_features]; m is the magnitude."""
    p, (first, second) = torch.from_numpy(activity(cfg)), MOMENTS[cfg.magnitudes]
    return p * first, p * second


MOMENTS: dict[Magnitudes, tuple[float, float]] = {
    "uniform": (1 / 2, 1 / 3),
    "constant": (1.0, 1.0),
    "exponential": (1.0, 2.0),
    "half_normal": ((2 / np.pi) ** 0.5, 1.0),
}
"""E[m] and E[m^2] of an active feature."""


class FeatureCovariance(NamedTuple):
    """Cov(x), exact: the diagonal, and the pairs of features that do not fire independently."""

    variance: Float64[Tensor, " n_features"]
    first: Int64[Tensor, " pairs"]
    second: Int64[Tensor, " pairs"]
    """Each pair once, first < second."""
    value: Float64[Tensor, " pairs"]
    """Cov(x_first, x_second) = (P(both active) - p_first p_second) E[m]^2."""


def feature_covariance(cfg: FeatureConfig) -> FeatureCovariance:
    """Return Cov(x); P(both active) is p_i p_j / p_parent in a family, the normals' upper quadrant in a group."""
    mean, second = feature_moments(cfg)
    variance, p = second - mean.square(), activity(cfg)
    match cfg.structure:
        case Independent():
            size = 1
        case Correlated(group=size):
            pass
        case Hierarchical(children=children):
            size = children + 1
    start = np.arange(len(p))[:, None]
    other = start + np.arange(1, size)
    inside = (other < len(p)) & (other // size == start // size)
    i, j = (np.broadcast_to(x, inside.shape)[inside] for x in (start, other))
    if isinstance(cfg.structure, Correlated):
        apart = _quadrant_excess(p[i], p[j], cfg.structure.rho)
    else:
        parent = p[i - i % size]
        apart = (
            p[i] * p[j] * np.divide(1 - parent, parent, out=np.zeros_like(parent), where=parent > 0)
        )
    value = apart * MOMENTS[cfg.magnitudes][0] ** 2
    return FeatureCovariance(variance, *(torch.from_numpy(x) for x in (i, j, value)))


_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(64)


def _quadrant_excess(
    p: Float64[np.ndarray, " pairs"], q: Float64[np.ndarray, " pairs"], rho: float
) -> Float64[np.ndarray, " pairs"]:
    """Return P(Z > a, Z' > b) - p q for normals of correlation rho with P(Z > a) = p, P(Z' > b) = q.

    By Plackett's identity the integral of exp(-(a^2 - 2 a b sin t + b^2) / (2 cos^2 t)) / (2 pi) from 0 to asin(rho).
    """
    a, b = (np.clip(ndtri(1 - x), -38.0, 38.0)[:, None] for x in (p, q))
    half = np.arcsin(rho) / 2
    t = half * (_NODES + 1)
    exponent = (a * a - 2 * a * b * np.sin(t) + b * b) / (2 * np.cos(t) ** 2)
    return half / (2 * np.pi) * (np.exp(-exponent) @ _NODE_WEIGHTS)


def apply_magnitudes(x: Float32[np.ndarray, "..."], magnitudes: Magnitudes) -> None:
    """Turn active values, uniform on (0, 1], into magnitudes in place; zeros stay zero.

    By numpy, whose results do not depend on where a value lies in memory.
    """
    if magnitudes == "uniform":
        return
    silent = x == 0
    with np.errstate(divide="ignore"):
        match magnitudes:
            case "constant":
                x.fill(1.0)
            case "exponential":
                np.negative(np.log(x, out=x), out=x)
            case "half_normal":
                x *= np.float32(0.5)
                np.negative(ndtri(x, out=x), out=x)
    np.maximum(x, _SMALLEST, out=x)
    x[silent] = 0


class Recipe:
    """One world's way from draws to features.

    Independent and hierarchical features need one uniform r in [0, 1) each: x = max(1 - r / q, 0), which is 0 with
    probability 1 - q and else uniform on (0, 1], whatever q; so worlds that differ in S may share r.
    """

    def __init__(self, cfg: FeatureConfig) -> None:
        self._cfg, self._p = cfg, activity(cfg)
        self.needs: tuple[Draw, ...] = ("uniform",)
        if isinstance(cfg.structure, Correlated):
            self.needs = ("uniform", "normal")
        rate = torch.from_numpy(-1.0 / np.maximum(self._chance(), 1e-30)).float()
        self.rate = rate[:1] if bool((rate == rate[0]).all()) else rate
        """-1 / q: one number where all features share it, else [n_features]."""
        silent, own = cfg.sparsity == 1, not isinstance(cfg.structure, Independent)
        self.finished = not (silent or own or cfg.magnitudes != "uniform")
        """Return whether x = max(1 - r / q, 0) is all there is to do."""

    def finish(
        self, draws: dict[Draw, Float32[Tensor, "rows n"]], out: Float32[Tensor, "rows n"]
    ) -> None:
        """Turn max(1 - r / q, 0) in `out` [rows, n_features] into features: structure, then magnitudes."""
        if self._cfg.sparsity == 1:
            out.zero_()
            return
        match self._cfg.structure:
            case Hierarchical(children=children):
                for first in range(1, children + 1):
                    child = out[:, first :: children + 1]
                    child *= out[:, :: children + 1][:, : child.shape[1]] > 0
            case Correlated() as structure:
                z = _copula(draws["normal"].numpy(), structure)
                quantile = ndtri(1.0 - self._p).astype(np.float32)
                np.multiply(out.numpy(), z > quantile, out=out.numpy())
        apply_magnitudes(out.numpy(), self._cfg.magnitudes)

    def _chance(self) -> Float64[np.ndarray, " n_features"]:
        """Return the probability q that the uniform draw decides: given the parent, or by the copula alone."""
        match self._cfg.structure:
            case Hierarchical(children=children):
                parent = np.repeat(self._p[:: children + 1], children + 1)[: len(self._p)]
                chance = np.divide(self._p, parent, out=np.zeros_like(parent), where=parent > 0)
                chance[:: children + 1] = self._p[:: children + 1]
                return chance
            case Correlated():
                return np.ones_like(self._p)
            case _:
                return self._p


def _weights(cfg: FeatureConfig) -> Float64[np.ndarray, " n_features"]:
    family = cfg.structure.children + 1 if isinstance(cfg.structure, Hierarchical) else 1
    index = np.arange(cfg.n_features)
    exponent = cfg.rates.exponent if isinstance(cfg.rates, ZipfRates) else 0.0
    weights = (1.0 + index // family) ** -exponent
    if isinstance(cfg.structure, Hierarchical):
        weights[index % family != 0] *= cfg.structure.given_parent
    return weights


def _copula(
    e: Float32[np.ndarray, "rows n"], structure: Correlated
) -> Float32[np.ndarray, "rows n"]:
    """Return normals with correlation rho inside each group: Z_i = sqrt(1 - rho) (e_i + c sum_j e_j)."""
    group, n = structure.group, e.shape[1]
    whole = n - n % group
    z = np.empty_like(e)
    for part, size in ((slice(0, whole), group), (slice(whole, n), n - whole)):
        blocks = e[:, part].reshape(len(e), -1, max(size, 1))
        c = _common(structure.rho, size)
        mixed = (1 - structure.rho) ** 0.5 * (blocks + c * blocks.sum(2, keepdims=True))
        z[:, part] = mixed.reshape(len(e), -1)
    return z


def _common(rho: float, size: int) -> float:
    """Solve 2c + size c^2 = rho / (1 - rho): variance 1 and correlation rho for a group of `size`."""
    if size <= 1:
        return (1 - rho) ** -0.5 - 1  # a lone feature: variance 1
    return float((max(0.0, 1 + size * rho / (1 - rho)) ** 0.5 - 1) / size)


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


_Key = tuple[Draw, int]
_WORTH_THREADS = 1 << 20
"""Numbers in a batch from which drawing seeds side by side pays for starting threads."""


class FeatureStream:
    """Features x [worlds, rows, n_features] at any step: random access, nothing to save.

    Worlds with one seed share the underlying draws (common random numbers), so that levels of S differ by S alone; a
    world's batch equals its lone stream's to the bit. All worlds have the same number of features. Seeds of
    different streams are drawn in threads.
    """

    def __init__(
        self, cfgs: Sequence[FeatureConfig], seeds: Sequence[int], rows: int, device: str = "cpu"
    ) -> None:
        sizes = {cfg.n_features for cfg in cfgs}
        if len(cfgs) != len(seeds) or not cfgs:
            raise UserError(f"{len(cfgs)} worlds with {len(seeds)} seeds; give one seed per world")
        if len(sizes) != 1:
            raise UserError(f"worlds of {sorted(sizes)} features in one stream; give all the same")
        if rows < 1:
            raise UserError(f"rows = {rows}: a batch has at least one row")
        self.rows, self.n_features = rows, sizes.pop()
        self._recipes = [Recipe(cfg) for cfg in cfgs]
        self._seeds, self._device = list(seeds), device
        places = {seed: i for i, seed in enumerate(dict.fromkeys(seeds))}
        self._place = torch.tensor([places[seed] for seed in seeds])
        self._uniform = torch.empty(len(places), rows, self.n_features, dtype=torch.float32)
        rates = [recipe.rate for recipe in self._recipes]
        size = max(map(len, rates))  # one number each where no world needs more
        self._rate = torch.stack([rate.expand(size) for rate in rates])[:, None]
        self._draws: dict[_Key, Tensor] = {
            ("uniform", seed): self._uniform[i] for seed, i in places.items()
        }
        self._drawn: dict[_Key, int] = {}
        self._out = torch.empty(0, rows, self.n_features, dtype=torch.float32)

    def batch(
        self, step: int, first: int = 0, last: int | None = None
    ) -> Float32[Tensor, "worlds rows n_features"]:
        """Return step `step` of the worlds first .. last - 1 (all by default), valid until the next call."""
        worlds = range(len(self._recipes))[first:last]
        if len(self._out) < len(worlds):
            self._out = torch.empty(len(worlds), self.rows, self.n_features, dtype=torch.float32)
        self._draw(
            step, [(kind, self._seeds[w]) for w in worlds for kind in self._recipes[w].needs]
        )
        out = self._out[: len(worlds)]
        torch.index_select(self._uniform, 0, self._place[first:last], out=out)
        # separate operations: a fused one would round differently at the ends of a vector
        out.mul_(self._rate[first:last]).add_(1.0).clamp_min_(0.0)
        for place, w in enumerate(worlds):
            recipe = self._recipes[w]
            if not recipe.finished:
                draws: dict[Draw, Tensor] = {
                    kind: self._draws[kind, self._seeds[w]] for kind in recipe.needs
                }
                recipe.finish(draws, out[place])
        return out.to(self._device)

    def _draw(self, step: int, keys: list[_Key]) -> None:
        """Fill the buffers of `keys` that hold another step."""
        missing = [key for key in dict.fromkeys(keys) if self._drawn.get(key) != step]
        for key in missing:
            self._draws.setdefault(
                key, torch.empty(self.rows, self.n_features, dtype=torch.float32)
            )
            self._drawn[key] = step
        work = len(missing) * self.rows * self.n_features
        threads = min(len(missing), torch.get_num_threads()) if work > _WORTH_THREADS else 1
        if threads <= 1:
            for key in missing:
                self._fill(key, step)
            return
        with ThreadPoolExecutor(threads) as pool:  # numpy lets go of the interpreter while it draws
            list(pool.map(self._fill, missing, [step] * len(missing)))

    def _fill(self, key: _Key, step: int) -> None:
        kind, seed = key
        stream, out = generator(seed, kind, self.n_features, step), self._draws[key].numpy()
        if kind == "uniform":
            stream.random(dtype=np.float32, out=out)
        else:
            stream.standard_normal(dtype=np.float32, out=out)
