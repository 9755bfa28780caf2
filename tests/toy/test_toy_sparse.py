"""The sparse sampler has the dense sampler's law, and its activations are those of the dense product."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from wsae.core.errors import UserError
from wsae.toy.config import Correlated, EqualRates, FeatureConfig, Independent, ZipfRates
from wsae.toy.features import FeatureStream, activity, embed_sparse, sample_sparse

ROWS = 40_000


def config(n: int = 12, sparsity: float = 0.8, **fields) -> FeatureConfig:
    return FeatureConfig.parse({"n_features": n, "sparsity": sparsity, **fields})


def close(found, probability, rows=ROWS, sigmas=5.0):
    spread = np.sqrt(np.maximum(probability * (1 - probability), 1 / rows) / rows)
    assert np.all(np.abs(found - probability) <= sigmas * spread), (found, probability)


@settings(max_examples=50, deadline=None)
@given(
    n=st.integers(1, 40),
    rows=st.integers(1, 30),
    sparsity=st.floats(0, 1),
    exponent=st.sampled_from([None, 0.5, 3.0]),
    seed=st.integers(0, 5),
)
def test_entries_are_in_order_once_and_positive(n, rows, sparsity, exponent, seed):
    rates = EqualRates() if exponent is None else ZipfRates(exponent=exponent)
    code = sample_sparse(config(n, sparsity, rates=rates), rows, seed)
    assert code.batch == rows
    assert code.offsets[-1] == len(code.values) == len(code.indices)
    cell = code.rows() * n + code.indices
    assert bool((cell.diff() > 0).all())
    assert bool((code.values > 0).all() and (code.values <= 1).all())
    if len(cell):
        assert 0 <= int(code.indices.min()) <= int(code.indices.max()) < n


@pytest.mark.parametrize("sparsity", [0.3, 0.8, 0.97])
@pytest.mark.parametrize("rates", [EqualRates(), ZipfRates(exponent=1.2)], ids=lambda r: r.kind)
@pytest.mark.parametrize("magnitudes", ["uniform", "exponential", "half_normal"])
def test_the_law_is_the_dense_samplers(sparsity, rates, magnitudes):
    """Marginals, magnitudes, number of active features, pairs; against the dense sampler and against theory."""
    cfg = config(sparsity=sparsity, rates=rates, magnitudes=magnitudes)
    x = sample_sparse(cfg, ROWS, seed=5).dense(12).numpy()
    dense = FeatureStream([cfg], [6], ROWS).batch(0)[0].numpy()
    p = activity(cfg)
    close((x > 0).mean(0), p)
    for i in (0, 4, 11):
        assert stats.ks_2samp(x[:, i][x[:, i] > 0], dense[:, i][dense[:, i] > 0]).pvalue > 1e-4
    counts = [np.bincount((a > 0).sum(1), minlength=13) for a in (x, dense)]
    seen = sum(counts) > 20
    assert stats.chi2_contingency([c[seen] for c in counts]).pvalue > 1e-4
    for i, j in itertools.combinations((0, 1, 5, 11), 2):
        close(((x[:, i] > 0) & (x[:, j] > 0)).mean(), p[i] * p[j])
    one, next_row = x[:-1, 3] > 0, x[1:, 3] > 0
    close((one & next_row).mean(), p[3] ** 2)


def test_a_feature_that_is_always_active_is_in_every_row():
    cfg = config(n=20, sparsity=0.8, rates=ZipfRates(exponent=2.0))
    assert activity(cfg)[0] == 1
    code = sample_sparse(cfg, 300, seed=0)
    assert int((code.indices == 0).sum()) == 300


def test_all_and_none():
    assert len(sample_sparse(config(sparsity=1.0), 50, seed=0).values) == 0
    assert len(sample_sparse(config(sparsity=0.0), 50, seed=0).values) == 50 * 12


def test_the_draw_depends_on_seed_and_step_alone():
    one, again, other, later = (
        sample_sparse(config(), 40, seed, step) for seed, step in ((0, 0), (0, 0), (1, 0), (0, 1))
    )
    for a, b in zip(one, again, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(one.dense(12), other.dense(12))
    assert not torch.equal(one.dense(12), later.dense(12))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_activations_are_those_of_the_dense_product(dtype):
    W_p = torch.randn(5, 300, dtype=dtype, generator=torch.Generator().manual_seed(0))
    code = sample_sparse(config(n=300, sparsity=0.99), 64, seed=2)
    assert int(code.offsets.diff().min()) == 0, "some row should be empty"
    x = code.dense(300).to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for layout in (W_p, W_p.T.contiguous().T):
        found = embed_sparse(layout, code)
        assert found.dtype == dtype
        torch.testing.assert_close(found, x @ W_p.T, rtol=tolerance, atol=tolerance)


def test_a_hundred_thousand_features_make_no_dense_matrix():
    """Four million rows' worth of cells per entry kept: a dense x would be 1.6 TB."""
    cfg = config(n=100_000, sparsity=1 - 1e-8)
    code = sample_sparse(cfg, 4_000_000, seed=1)
    expected = 4_000
    assert abs(len(code.values) - expected) < 5 * expected**0.5
    quarter = np.bincount(code.indices.numpy() // 25_000, minlength=4)
    assert stats.chisquare(quarter).pvalue > 1e-4
    assert stats.kstest(code.rows().numpy() / 4_000_000, "uniform").pvalue > 1e-4
    assert stats.kstest(code.values.numpy(), "uniform").pvalue > 1e-4


def test_structures_it_cannot_draw_are_refused():
    with pytest.raises(UserError, match="structure 'correlated'"):
        sample_sparse(config(structure=Correlated()), 10, seed=0)
    with pytest.raises(UserError, match="rows = 0"):
        sample_sparse(config(structure=Independent()), 0, seed=0)
