"""Bootstrap intervals against scipy, known coverage and exact symmetries."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from wsae.evals.config import EvalConfig
from wsae.evals.intervals import (
    Ratio,
    estimate,
    estimates,
    mean,
    paired_difference,
    resampled_sums,
    unpaired_difference,
)

CFG = EvalConfig(draws=2000, seed=3)


def test_the_interval_of_a_mean_agrees_with_scipy():
    x = np.random.default_rng(0).gamma(2.0, size=120)
    ours = estimate(mean(x), EvalConfig(draws=20_000))
    theirs = stats.bootstrap(
        (x,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    width = theirs.high - theirs.low
    assert ours.value == pytest.approx(x.mean())
    assert abs(ours.low - theirs.low) < 0.03 * width
    assert abs(ours.high - theirs.high) < 0.03 * width


def test_a_ratio_interval_agrees_with_resampling_units_by_hand():
    rng = np.random.default_rng(1)
    ratio = Ratio(rng.random(30), rng.random(30) + 0.5)
    ours = estimate(ratio, CFG)
    picks = np.random.default_rng(9).integers(0, 30, (20_000, 30))
    by_hand = ratio.num[picks].sum(1) / ratio.den[picks].sum(1)
    low, high = np.quantile(by_hand, [0.025, 0.975])
    assert ours.value == ratio.num.sum() / ratio.den.sum()
    assert abs(ours.low - low) < 0.05 * (high - low)
    assert abs(ours.high - high) < 0.05 * (high - low)


@pytest.mark.parametrize("units", [5, 8, 80])
def test_ninety_percent_intervals_cover_the_true_ratio_about_ninety_percent_of_the_time(units):
    rng = np.random.default_rng(2)
    cfg, trials, hits = EvalConfig(draws=300, confidence=0.9), 400, 0
    for _ in range(trials):
        den = rng.gamma(5.0, size=units)
        found = estimate(Ratio(den * rng.uniform(0.0, 0.6, units), den), cfg)
        hits += found.low <= 0.3 <= found.high
    assert 0.85 < hits / trials < 0.94
    assert estimate(mean(np.arange(4.0)), cfg) == (1.5, None, None)


def test_resampled_sums_do_not_depend_on_the_block_size(monkeypatch):
    columns = np.random.default_rng(0).random((50, 3))
    whole = resampled_sums(columns, 100, 5)
    monkeypatch.setattr("wsae.evals.intervals._BLOCK", 350)
    np.testing.assert_allclose(resampled_sums(columns, 100, 5), whole, rtol=1e-12)


def test_several_estimates_at_once_equal_each_alone():
    rng = np.random.default_rng(4)
    ratios = [Ratio(rng.random(40), rng.random(40) + 1) for _ in range(3)]
    for together, ratio in zip(estimates(ratios, CFG), ratios, strict=True):
        assert tuple(together) == pytest.approx(tuple(estimate(ratio, CFG)))


values = st.lists(st.floats(-100, 100), min_size=5, max_size=30)


@settings(max_examples=40, deadline=None)
@given(values, st.integers(0, 1000))
def test_a_member_differs_from_itself_by_exactly_nothing(x, seed):
    ratio = Ratio(np.array(x), np.arange(1.0, len(x) + 1))
    found = paired_difference(ratio, ratio, EvalConfig(draws=50, seed=seed))
    assert tuple(found) == (0.0, 0.0, 0.0, 0.0, len(x))


@settings(max_examples=40, deadline=None)
@given(st.integers(5, 30), st.integers(0, 1000))
def test_swapping_the_members_flips_every_sign(n, seed):
    rng = np.random.default_rng(seed)
    a, b = (Ratio(rng.standard_normal(n), rng.random(n) + 0.1) for _ in range(2))
    cfg = EvalConfig(draws=101, seed=seed)
    ab, ba = paired_difference(a, b, cfg), paired_difference(b, a, cfg)
    assert ab.difference == pytest.approx(-ba.difference)
    assert (ab.low, ab.high) == pytest.approx((-ba.high, -ba.low))
    assert ab.effect_size == pytest.approx(-ba.effect_size)


def test_the_effect_size_of_paired_means_is_mean_over_sd_of_the_differences():
    rng = np.random.default_rng(5)
    a, b = rng.random(25), rng.random(25)
    found = paired_difference(mean(a), mean(b), CFG)
    assert found.effect_size == pytest.approx((a - b).mean() / (a - b).std(ddof=1))
    t = stats.ttest_rel(a, b).statistic
    assert found.effect_size * np.sqrt(25) == pytest.approx(t)


def test_pairing_narrows_the_interval_when_units_vary_together():
    rng = np.random.default_rng(6)
    common = rng.standard_normal(200) * 10
    a, b = common + rng.standard_normal(200) * 0.1 + 1, common
    paired = paired_difference(mean(a), mean(b), CFG)
    loose = unpaired_difference(a, b, CFG)
    assert paired.difference == pytest.approx(loose.difference)
    assert (paired.high - paired.low) * 20 < loose.high - loose.low
    assert paired.low > 0 > loose.low


def test_the_unpaired_effect_size_is_cohens_d():
    a, b = np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0, 8.0])
    found = unpaired_difference(a, b, CFG)
    assert found.difference == -3.0
    assert found.effect_size == pytest.approx(-3.0 / np.sqrt((1.0 + 20 / 3) / 2))
    assert found.n == 3


def test_one_unit_has_a_value_and_no_interval():
    one = Ratio(np.array([1.0]), np.array([4.0]))
    assert tuple(estimate(one, CFG)) == (0.25, None, None)
    assert tuple(paired_difference(one, one, CFG)) == (0.0, None, None, None, 1)
    assert unpaired_difference(np.array([2.0]), np.array([1.0]), CFG).low is None


def test_no_units_or_no_positive_denominator_have_no_value():
    none = Ratio(np.zeros(0), np.zeros(0))
    assert tuple(estimate(none, CFG)) == (None, None, None)
    negative = Ratio(np.array([1.0, 2.0]), np.array([-1.0, 0.5]))
    assert estimate(negative, CFG).value is None
    assert (
        paired_difference(negative, none._replace(num=np.ones(2), den=np.ones(2)), CFG).low is None
    )


def test_a_constant_gap_has_no_finite_effect_size():
    a = np.array([3.0, 5.0, 9.0, 4.0, 8.0])
    found = paired_difference(mean(a + 2), mean(a), CFG)
    assert (found.low, found.high) == pytest.approx((2.0, 2.0))
    assert found.effect_size is None
