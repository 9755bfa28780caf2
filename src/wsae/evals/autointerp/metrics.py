"""How well positive contexts are told from negative ones: exact AUC, balanced accuracy, and the score of one latent.

Every scorer, asked or free, hands out `LatentScore`. NaN stands for a context without a usable verdict (a reply that
could not be parsed, a text without tokens): it is counted in `failed` and enters nothing else.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

_BLOCK = 1 << 22
"""Pairs compared at once: bounds memory at about 32 MB."""

Values = Float64[np.ndarray, " _"]


class LatentScore(NamedTuple):
    """One latent's score; positives and random negatives make the counts, hard negatives have their own."""

    latent: int
    density: float
    """Share of tokens on which it fires: denser latents score differently."""
    auc: float | None
    """Area under the curve against random negatives; None without verdicts on both sides."""
    auc_hard: float | None
    """The same against hard negatives; None without any."""
    balanced_accuracy: float | None
    tp: int
    fn: int
    tn: int
    fp: int
    hard_tn: int = 0
    hard_fp: int = 0
    failed: int = 0
    """Contexts without a usable verdict."""


class Verdicts(NamedTuple):
    """One latent's contexts as numbers, larger = more likely to activate; NaN = no usable verdict."""

    positive: Values
    negative: Values
    hard: Values


def judge(latent: int, density: float, verdicts: Verdicts, threshold: float = 0.5) -> LatentScore:
    """Return the score of one latent whose contexts count as active where verdict >= threshold.

    For yes/no answers (1 and 0) the AUC with ties at one half equals the balanced accuracy. A NaN threshold (none
    could be set) makes every context failed.
    """
    usable = [np.asarray(values, dtype=np.float64) for values in verdicts]
    if math.isnan(threshold):
        usable = [np.full_like(values, np.nan) for values in usable]
    failed = sum(int(np.isnan(values).sum()) for values in usable)
    positive, negative, hard = (values[~np.isnan(values)] for values in usable)
    tp, fp, hard_fp = (int((values >= threshold).sum()) for values in (positive, negative, hard))
    fn, tn, hard_tn = len(positive) - tp, len(negative) - fp, len(hard) - hard_fp
    return LatentScore(
        latent,
        density,
        auc(positive, negative),
        auc(positive, hard),
        balanced_accuracy(tp, fn, tn, fp),
        *(tp, fn, tn, fp, hard_tn, hard_fp, failed),
    )


def auc(positive: Values, negative: Values) -> float | None:
    """Return the probability that a positive exceeds a negative, ties counting half (Mann-Whitney U / (n_p n_n)).

    AUC = sum_i sum_j ([p_i > n_j] + [p_i = n_j] / 2) / (n_p n_n); NaN entries are left out; None when a side is empty.
    """
    positive, negative = positive[~np.isnan(positive)], np.sort(negative[~np.isnan(negative)])
    if not len(positive) or not len(negative):
        return None
    below = np.searchsorted(negative, positive, side="left")
    not_above = np.searchsorted(negative, positive, side="right")
    wins = int(below.sum()) + int(not_above.sum())  # twice the wins, a tie counting 1
    return wins / (2 * len(positive) * len(negative))


def auc_rows(
    positive: Float64[np.ndarray, "rows n_p"], negative: Float64[np.ndarray, "rows n_n"]
) -> Float64[np.ndarray, " rows"]:
    """Return `auc` of every row at once; rows are padded with NaN, and NaN where a side of a row is empty."""
    parts = [_pairs(positive[span], negative[span]) for span in _spans(positive, negative)]
    wins, pairs = (np.concatenate(column) for column in zip(*parts, strict=True))
    return np.divide(wins, pairs, out=np.full(len(wins), np.nan), where=pairs > 0)


def _spans(positive: np.ndarray, negative: np.ndarray) -> Iterator[slice]:
    step = max(1, _BLOCK // max(1, positive.shape[1] * negative.shape[1]))
    yield from (slice(start, start + step) for start in range(0, max(1, len(positive)), step))


def _pairs(positive: np.ndarray, negative: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each row's wins and its number of pairs without NaN."""
    p, n = positive[:, :, None], negative[:, None, :]
    wins = (p > n).sum((1, 2)) + (p == n).sum((1, 2)) / 2  # a comparison with NaN is false
    return wins, (~np.isnan(positive)).sum(1) * (~np.isnan(negative)).sum(1)


def balanced_accuracy(tp: int, fn: int, tn: int, fp: int) -> float | None:
    """Return (TPR + TNR) / 2 = (tp / (tp + fn) + tn / (tn + fp)) / 2; None when a side is empty."""
    if tp + fn == 0 or tn + fp == 0:
        return None
    return (tp / (tp + fn) + tn / (tn + fp)) / 2


def pooled_counts(scores: Sequence[LatentScore]) -> Float64[np.ndarray, "latents 4"]:
    """Return tp, fn, tn, fp of every latent as columns."""
    counts = [(s.tp, s.fn, s.tn, s.fp) for s in scores]
    return np.asarray(counts, dtype=np.float64).reshape(len(scores), 4)


def pooled_balanced_accuracy(scores: Sequence[LatentScore]) -> float | None:
    """Return the balanced accuracy of all latents' contexts taken together."""
    tp, fn, tn, fp = pooled_counts(scores).sum(0)
    return balanced_accuracy(int(tp), int(fn), int(tn), int(fp))
