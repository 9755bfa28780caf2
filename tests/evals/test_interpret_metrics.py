"""AUC and balanced accuracy against definitions spelled out in loops."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsae.evals.config import EvalConfig
from wsae.evals.interpret.summary import (
    Verdicts,
    auc,
    balanced_accuracy,
    judge,
    pooled_accuracy,
)

NAN = float("nan")
FEW = st.sampled_from([-1.0, 0.0, 0.25, 0.5, 1.0, np.inf, -np.inf, NAN])
"""Values that tie often."""
SIDE = st.lists(FEW, max_size=7).map(np.array).map(np.float64)


def by_loops(positive, negative):
    """P(p > n) + P(p = n) / 2 over all pairs without NaN."""
    wins = pairs = 0.0
    for p in positive:
        for n in negative:
            if p == p and n == n:
                pairs += 1
                wins += 1.0 if p > n else 0.5 if p == n else 0.0
    return wins / pairs if pairs else None


@given(SIDE, SIDE)
def test_auc_is_the_share_of_pairs_won_with_ties_at_one_half(positive, negative):
    expected = by_loops(positive, negative)
    assert auc(positive, negative) == (None if expected is None else pytest.approx(expected))


@given(SIDE, SIDE)
def test_swapping_the_sides_gives_the_complement(positive, negative):
    one, other = auc(positive, negative), auc(negative, positive)
    assert (one is None) == (other is None)
    if one is not None and other is not None:
        assert one + other == pytest.approx(1)


def test_balanced_accuracy_weighs_both_sides_alike():
    assert balanced_accuracy(tp=9, fn=1, tn=1, fp=1) == pytest.approx((0.9 + 0.5) / 2)
    assert balanced_accuracy(tp=0, fn=4, tn=10, fp=0) == 0.5, "answering 'none' earns nothing"
    assert balanced_accuracy(tp=0, fn=0, tn=3, fp=0) is None


def test_a_latent_is_judged_at_the_threshold_and_failures_are_counted():
    verdicts = Verdicts(
        positive=np.array([0.9, 0.5, 0.1, NAN]),
        negative=np.array([0.2, 0.7]),
        hard=np.array([0.95, NAN, 0.3, 0.4]),
    )
    score = judge(7, 0.01, verdicts, threshold=0.5)
    assert (score.latent, score.density) == (7, 0.01)
    assert (score.tp, score.fn, score.tn, score.fp) == (2, 1, 1, 1), "0.5 itself counts as active"
    assert (score.hard_tn, score.hard_fp, score.failed) == (2, 1, 2)
    assert score.auc == pytest.approx(by_loops(verdicts.positive, verdicts.negative))
    assert score.auc_hard == pytest.approx(by_loops(verdicts.positive, verdicts.hard))
    assert score.balanced_accuracy == pytest.approx((2 / 3 + 1 / 2) / 2)


@given(
    st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=9).map(np.array),
    st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=9).map(np.array),
)
def test_for_yes_and_no_the_auc_is_the_balanced_accuracy(positive, negative):
    score = judge(0, 0.1, Verdicts(positive, negative, np.zeros(0)))
    assert score.auc == pytest.approx(score.balanced_accuracy)
    assert score.auc_hard is None


def test_without_a_usable_verdict_there_is_no_score_but_a_count():
    nothing = judge(0, 0.1, Verdicts(np.full(3, NAN), np.ones(2), np.zeros(0)))
    assert nothing.auc is None
    assert nothing.balanced_accuracy is None
    assert nothing.failed == 3
    unset = judge(0, 0.1, Verdicts(np.ones(3), np.zeros(2), np.zeros(1)), threshold=NAN)
    assert (unset.auc, unset.balanced_accuracy, unset.failed) == (1.0, None, 0)
    assert unset[5:11] == (0,) * 6


def test_pooling_adds_the_counts_before_dividing():
    scores = [
        judge(0, 0.1, Verdicts(np.ones(8), np.zeros(2), np.zeros(0))),
        judge(1, 0.1, Verdicts(np.zeros(2), np.ones(8), np.zeros(0))),
    ]
    pooled = pooled_accuracy(scores, EvalConfig(draws=10)).value
    assert pooled == pytest.approx((8 / 10 + 2 / 10) / 2)
    assert pooled_accuracy([], EvalConfig(draws=10)).value is None
