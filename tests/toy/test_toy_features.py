"""Features: what a batch depends on, to the bit; and that every law is the one it says, marginals and pairs."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from wsae.core.errors import UserError
from wsae.toy.config import (
    Correlated,
    EqualRates,
    FeatureConfig,
    Hierarchical,
    Independent,
    ZipfRates,
)
from wsae.toy.features import FeatureStream, activity, feature_covariance, feature_moments

ROWS = 40_000
STRUCTURES = (
    Independent(),
    Correlated(group=4, rho=0.6),
    Correlated(group=3, rho=-0.5),
    Hierarchical(children=3, given_parent=0.4),
)
MAGNITUDES = ("uniform", "constant", "exponential", "half_normal")
LAWS = {  # of an active feature's magnitude
    "uniform": stats.uniform(),
    "exponential": stats.expon(),
    "half_normal": stats.halfnorm(),
}


def config(n: int = 10, sparsity: float = 0.7, **fields) -> FeatureConfig:
    return FeatureConfig.parse({"n_features": n, "sparsity": sparsity, **fields})


def draw(cfg: FeatureConfig, rows: int = ROWS, seed: int = 0, step: int = 0) -> np.ndarray:
    return FeatureStream([cfg], [seed], rows).batch(step)[0].numpy().astype(np.float64)


def close(found, probability, rows=ROWS, sigmas=5.0):
    """A share of `rows` independent draws lies within so many standard deviations of its probability."""
    spread = np.sqrt(np.maximum(probability * (1 - probability), 1 / rows) / rows)
    assert np.all(np.abs(found - probability) <= sigmas * spread), (found, probability)


configs = st.builds(
    lambda sparsity, magnitudes, rates, structure: FeatureConfig(
        n_features=7, sparsity=sparsity, magnitudes=magnitudes, rates=rates, structure=structure
    ),
    st.sampled_from([0.0, 0.3, 0.97, 1.0]),
    st.sampled_from(MAGNITUDES),
    st.sampled_from([EqualRates(), ZipfRates(exponent=1.2)]),
    st.sampled_from(STRUCTURES),
)


@settings(max_examples=60, deadline=None)
@given(
    cfgs=st.lists(configs, min_size=1, max_size=4),
    seeds=st.lists(st.integers(0, 2), min_size=4, max_size=4),
    steps=st.lists(st.integers(0, 3), min_size=1, max_size=4),
    threads=st.sampled_from([1, 2]),
)
def test_a_batch_depends_on_config_seed_and_step_alone(cfgs, seeds, steps, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        stream = FeatureStream(cfgs, seeds[: len(cfgs)], 33)
        for step in steps:
            together = stream.batch(step).clone()
            for world, cfg in enumerate(cfgs):
                lone = FeatureStream([cfg], [seeds[world]], 33).batch(step)
                assert torch.equal(together[world], lone[0])
            last = len(cfgs) - 1
            assert torch.equal(stream.batch(step, last, last + 1)[0], together[last])
    finally:
        torch.set_num_threads(before)


def test_seeds_and_steps_differ():
    batches = [draw(config(), 50, seed, step) for seed, step in ((0, 0), (0, 1), (1, 0))]
    for one, other in itertools.combinations(batches, 2):
        assert not np.array_equal(one, other)
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.2


def test_worlds_of_one_seed_share_their_draws_across_sparsities():
    levels = (0.0, 0.5, 0.9)
    x = FeatureStream([config(sparsity=s) for s in levels], [3] * 3, 500).batch(4).double()
    for low, high in itertools.pairwise(range(3)):
        sparser = x[high] > 0
        assert bool((x[low][sparser] > 0).all()), "whatever is active at high S is active at low S"
        depth = [(1 - x[i][sparser]) * (1 - levels[i]) for i in (low, high)]
        torch.testing.assert_close(depth[0], depth[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda s: f"{s.kind}")
@pytest.mark.parametrize("rates", [EqualRates(), ZipfRates(exponent=0.7)], ids=lambda r: r.kind)
@pytest.mark.parametrize("magnitudes", MAGNITUDES)
def test_marginals_are_those_stated(structure, rates, magnitudes):
    cfg = config(structure=structure, rates=rates, magnitudes=magnitudes)
    x, p = draw(cfg), activity(cfg)
    close((x > 0).mean(0), p)
    for i in (0, 5, 9):
        active = x[:, i][x[:, i] > 0]
        if magnitudes == "constant":
            assert set(active) == {1.0}
        else:
            assert stats.kstest(active, LAWS[magnitudes].cdf).pvalue > 1e-4
    mean, second = (m.numpy() for m in feature_moments(cfg))
    spread = x.std(0) / ROWS**0.5
    assert np.all(np.abs(x.mean(0) - mean) < 5 * spread)
    assert np.all(np.abs((x**2).mean(0) - second) < 5 * (x**2).std(0) / ROWS**0.5)


def test_uniform_features_lie_in_the_half_open_interval():
    x = draw(config(n=100, sparsity=0.4), 4_000)
    assert x.min() == 0.0
    assert x.max() <= 1.0
    assert x.max() > 1 - 1e-4


def test_all_and_none():
    assert draw(config(sparsity=0.0), 500).min() > 0
    assert draw(config(sparsity=1.0), 500).max() == 0
    assert (
        draw(config(sparsity=1.0, structure=Correlated(), magnitudes="exponential"), 50).max() == 0
    )


def test_independent_features_fire_independently():
    cfg = config(sparsity=0.6, rates=ZipfRates(exponent=0.5))
    active, p = draw(cfg) > 0, activity(cfg)
    for i, j in itertools.combinations(range(10), 2):
        close((active[:, i] & active[:, j]).mean(), p[i] * p[j])
    counts = draw(config(sparsity=0.6)).astype(bool).sum(1)
    close(np.bincount(counts, minlength=11) / ROWS, stats.binom(10, 0.4).pmf(np.arange(11)))


@pytest.mark.parametrize("rho", [0.8, -0.3])
def test_correlated_features_follow_the_gaussian_copula(rho):
    """Within a group P(both active) is the bivariate normal's; across groups, and in magnitude, independence."""
    cfg = config(n=11, structure=Correlated(group=4, rho=rho), rates=ZipfRates(exponent=0.3))
    x, p = draw(cfg), activity(cfg)
    active, z = x > 0, stats.norm.ppf(p)
    normal = stats.multivariate_normal(cov=[[1, rho], [rho, 1]])
    for i, j in itertools.combinations(range(11), 2):
        both = normal.cdf([z[i], z[j]]) if i // 4 == j // 4 else p[i] * p[j]
        close((active[:, i] & active[:, j]).mean(), both)
    both = active[:, 0] & active[:, 1]
    assert abs(stats.spearmanr(x[both, 0], x[both, 1]).statistic) < 5 / both.sum() ** 0.5
    for alone in (0, 4, 8):  # magnitude and company
        assert stats.ks_2samp(x[both, 0], x[active[:, 0] & ~active[:, 1], 0]).pvalue > 1e-4, alone


def test_children_fire_only_with_their_parents():
    cfg = config(n=11, sparsity=0.6, structure=Hierarchical(children=3, given_parent=0.4))
    active, p = draw(cfg) > 0, activity(cfg)
    assert activity(cfg).mean() == pytest.approx(0.4)
    for parent in (0, 4, 8):
        children = range(parent + 1, min(parent + 4, 11))
        on = active[:, parent]
        for child in children:
            assert p[child] == pytest.approx(0.4 * p[parent])
            assert not (active[:, child] & ~on).any()
            close(active[on, child].mean(), 0.4, on.sum())
        for one, other in itertools.combinations(children, 2):
            close((active[on, one] & active[on, other]).mean(), 0.16, on.sum())
    close((active[:, 0] & active[:, 4]).mean(), p[0] * p[4])


@given(
    n=st.integers(1, 30),
    sparsity=st.floats(0, 1),
    exponent=st.floats(0, 4),
    structure=st.sampled_from(STRUCTURES),
)
def test_activities_have_the_stated_mean_and_proportions(n, sparsity, exponent, structure):
    cfg = config(n, sparsity, rates=ZipfRates(exponent=exponent), structure=structure)
    p = activity(cfg)
    assert p.mean() == pytest.approx(1 - sparsity, abs=1e-9)
    assert p.min() >= 0
    assert p.max() <= 1
    family = 4 if isinstance(structure, Hierarchical) else 1
    weight = np.array(
        [(1 + i // family) ** -exponent * (0.4 if i % family else 1) for i in range(n)]
    )
    low, high = 0.0, 2.0 / weight.min()  # the common factor c, by bisection
    for _ in range(200):
        middle = (low + high) / 2
        under = np.minimum(1, middle * weight).sum() < n * (1 - sparsity)
        low, high = (middle, high) if under else (low, middle)
    np.testing.assert_allclose(p, np.minimum(1, high * weight), atol=1e-8)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sparsity": 1.5}, "sparsity"),
        ({"sparsity": float("nan")}, "sparsity"),
        ({"sparsity": -0.1}, "sparsity"),
        ({"n_features": 0}, "n_features"),
        ({"magnitudes": "gamma"}, "magnitudes"),
        ({"structure": {"kind": "correlated", "group": 4, "rho": -0.5}}, "impossible between 4"),
        ({"structure": {"kind": "correlated", "rho": 1.0}}, "rho"),
        ({"structure": {"kind": "hierarchical", "given_parent": 0.0}}, "given_parent"),
        ({"rates": {"kind": "zipf", "exponent": -1.0}}, "exponent"),
        ({"sparseness": 0.1}, "nearest: sparsity"),
    ],
)
def test_impossible_worlds_are_refused_in_one_line(fields, words):
    with pytest.raises(UserError, match=words) as caught:
        FeatureConfig.parse({"n_features": 4, "sparsity": 0.5, **fields})
    assert "\n" not in str(caught.value)


def test_streams_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="1 worlds with 2 seeds"):
        FeatureStream([config()], [0, 1], 10)
    with pytest.raises(UserError, match="0 worlds"):
        FeatureStream([], [], 10)
    with pytest.raises(UserError, match=r"worlds of \[5, 10\] features"):
        FeatureStream([config(), config(n=5)], [0, 0], 10)
    with pytest.raises(UserError, match="rows = 0"):
        FeatureStream([config()], [0], 0)


def dense_covariance(cfg: FeatureConfig) -> np.ndarray:
    found = feature_covariance(cfg)
    out = np.diag(found.variance.numpy())
    out[found.first, found.second] = out[found.second, found.first] = found.value
    return out


@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda s: f"{s.kind}")
@pytest.mark.parametrize("rates", [EqualRates(), ZipfRates(exponent=0.7)], ids=lambda r: r.kind)
def test_the_covariance_of_features_is_that_of_many_rows(structure, rates):
    cfg = config(structure=structure, rates=rates, magnitudes="exponential")
    x = draw(cfg)
    centred = x - feature_moments(cfg)[0].numpy()
    for i, j in itertools.combinations_with_replacement(range(10), 2):
        product = centred[:, i] * centred[:, j]
        assert abs(product.mean() - dense_covariance(cfg)[i, j]) < 5 * product.std() / ROWS**0.5


@given(st.floats(-0.49, 0.99), st.floats(0.001, 0.999), st.floats(0, 1.5), st.sampled_from([2, 3]))
def test_pairs_of_a_group_are_the_bivariate_normals(rho, sparsity, exponent, group):
    cfg = config(
        n=4,
        sparsity=sparsity,
        magnitudes="constant",
        rates=ZipfRates(exponent=exponent),
        structure=Correlated(group=group, rho=rho),
    )
    p, found = activity(cfg), feature_covariance(cfg)
    normal = stats.multivariate_normal(cov=[[1, rho], [rho, 1]])
    for i, j, value in zip(*(t.tolist() for t in found[1:]), strict=True):
        z = np.clip(stats.norm.ppf(p[[i, j]]), -38, 38)
        assert value == pytest.approx(normal.cdf(z) - p[i] * p[j], abs=2e-8)
