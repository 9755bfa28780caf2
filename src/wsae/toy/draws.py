"""How uniform and normal draws become features: activity, thresholds and magnitudes of one world."""

from typing import Literal

import numpy as np
import torch
from jaxtyping import Float32, Float64
from scipy.special import ndtri
from torch import Tensor

from wsae.core.seeds import seed_for
from wsae.toy.config import (
    Correlated,
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
    p = torch.from_numpy(activity(cfg))
    match cfg.magnitudes:
        case "uniform":
            first, second = 1 / 2, 1 / 3
        case "constant":
            first, second = 1.0, 1.0
        case "exponential":
            first, second = 1.0, 2.0
        case "half_normal":
            first, second = (2 / np.pi) ** 0.5, 1.0
    return p * first, p * second


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
        self.rate = _per_draw(self._chance())
        """-1 / q: one number where all features share it, else [n_features]."""
        silent, own = cfg.sparsity == 1, not isinstance(cfg.structure, Independent)
        self.finished = not (silent or own or cfg.magnitudes != "uniform")
        """Whether x = max(1 - r / q, 0) is all there is to do."""

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
                np.multiply(out.numpy(), z > self._threshold(), out=out.numpy())
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

    def _threshold(self) -> Float32[np.ndarray, " n_features"]:
        return ndtri(1.0 - self._p).astype(np.float32)


def _per_draw(q: Float64[np.ndarray, " n_features"]) -> Float32[Tensor, "_"]:
    """Return -1 / q, as one number where all are equal."""
    rate = torch.from_numpy(-1.0 / np.maximum(q, 1e-30)).float()
    return rate[:1] if bool((rate == rate[0]).all()) else rate


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
