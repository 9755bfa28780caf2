"""How well positive contexts are told from negative ones: exact AUC, balanced accuracy, and the score of one latent.

Every scorer, asked or free, hands out `LatentScore`. NaN stands for a context without a usable verdict (a reply that
could not be parsed, a text without tokens): it is counted in `failed` and enters nothing else.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

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
    could be set) leaves the AUC alone: all counts are 0.
    """
    usable = [np.asarray(values, dtype=np.float64) for values in verdicts]
    failed = sum(int(np.isnan(values).sum()) for values in usable)
    positive, negative, hard = (values[~np.isnan(values)] for values in usable)
    tp, fp, hard_fp = (int((values >= threshold).sum()) for values in (positive, negative, hard))
    fn, tn, hard_tn = (int((values < threshold).sum()) for values in (positive, negative, hard))
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
