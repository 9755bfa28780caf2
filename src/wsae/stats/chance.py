"""What the scores of a latent that knows nothing of the classes would be: expectations under permuted labels.

A latent active on s of N samples, s fixed, under a random permutation of the labels has class counts that are one draw
from the multivariate hypergeometric distribution of the class totals. The expectation of any score of these counts is
a function of s alone, tabulated here by seeded draws. The first s labels of a random permutation are such a draw for
every s at once, and so is every disjoint stretch of it, which makes the table precise where it matters, at small s.

Samples are taken as exchangeable: right for one row an image, too low a chance level for several rows of each image.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int, Int64

STRETCH = 256
"""Supports up to this use every disjoint stretch of a permutation, larger ones its beginning alone."""


class Chance(NamedTuple):
    """Expectations by support: entry s is for a latent active on s samples; entry 0 is NaN."""

    share: Float64[np.ndarray, " supports"]
    """E[max_c counts_c / s]."""
    information: Float64[np.ndarray, " supports"]
    """E of the plug-in mutual information between "active" and the class, in bits."""


def chance_levels(
    totals: Int[np.ndarray, " n_classes"], largest: int, draws: int = 1000, seed: int = 0
) -> Chance:
    """Return the expectations for supports 0 .. largest, given how many samples each class has.

    `draws` permutations of all labels; the error at support s is about the spread of one score divided by
    sqrt(draws N / 256) for s <= 256 and by sqrt(draws) above.
    """
    totals = np.asarray(totals, dtype=np.int64)
    labels = np.repeat(np.arange(len(totals)), totals)
    n, rng = len(labels), np.random.default_rng(seed)
    largest = min(largest, n)
    short = min(STRETCH, largest)
    sums = {length: np.zeros((2, length)) for length in (short, largest)}
    logs = x_log2_x(np.arange(n + 1))
    for _ in range(draws if largest else 0):
        order = rng.permutation(labels)
        stretches = order[: n // short * short].reshape(-1, short)
        sums[short] += _scores(stretches, totals, logs) / len(stretches)
        if largest > short:
            sums[largest] += _scores(order[None, :largest], totals, logs)
    table = np.full((2, largest + 1), np.nan)
    table[:, 1:] = sums[largest] / draws
    table[:, 1 : short + 1] = sums[short] / draws
    return Chance(*table)


def x_log2_x(x: Int[np.ndarray, "..."]) -> Float64[np.ndarray, "..."]:
    """Return x log2 x, 0 at 0."""
    wide = np.asarray(x, dtype=np.float64)
    return wide * np.log2(np.maximum(wide, 1.0))


def _scores(
    drawn: Int64[np.ndarray, "draws length"],
    totals: Int64[np.ndarray, " n_classes"],
    logs: Float64[np.ndarray, " samples_plus_1"],
) -> Float64[np.ndarray, "2 length"]:
    """Return the sums over draws of share and information of the first 1 .. length labels of each.

    A label that is its class's k-th so far (from 0) raises the class's count from k to k + 1, and
    N I = sum_c [h(c_1) + h(c_0)] - h(s) - h(N - s) - sum_c h(n_c) + h(N),  h(x) = x log2 x,
    over active counts c_1 and silent ones c_0 = n_c - c_1, changes by what that moves.
    """
    n, length = int(totals.sum()), drawn.shape[1]
    before = _earlier(drawn, len(totals))
    share = np.maximum.accumulate(before + 1, axis=1).sum(0) / np.arange(1, length + 1)
    silent = totals[drawn] - before
    moved = logs[before + 1] - logs[before] + logs[silent - 1] - logs[silent]
    s = np.arange(1, length + 1)
    rest = len(drawn) * (logs[n] - logs[s] - logs[n - s])
    return np.stack([share, (moved.sum(0).cumsum() + rest) / n])


def _earlier(
    drawn: Int64[np.ndarray, "draws length"], n_classes: int
) -> Int64[np.ndarray, "draws length"]:
    """Return how many labels before each one, in its draw, are of the same class."""
    keys = (np.arange(len(drawn))[:, None] * n_classes + drawn).ravel()
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    first = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    start = np.maximum.accumulate(np.where(first, np.arange(len(keys)), 0))
    out = np.empty(len(keys), dtype=np.int64)
    out[order] = np.arange(len(keys)) - start
    return out.reshape(drawn.shape)
