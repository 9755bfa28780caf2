"""Worlds, and the source made of one: the contract with the trainer, and the truth behind every row."""

import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import wsae
from wsae.acts.source import ActivationSource
from wsae.core.errors import UserError
from wsae.kernels.eager import SparseCode
from wsae.theory.geometry import digons, direct_sum, orthogonal, polygon, random_unit, simplex
from wsae.toy.config import (
    Anisotropic,
    Correlated,
    FeatureConfig,
    Hierarchical,
    Isotropic,
    LowRank,
    ToyModelConfig,
    ZipfRates,
)
from wsae.toy.features import feature_moments
from wsae.toy.model import train_toy_models
from wsae.toy.world import NoiseStream, SyntheticSource, World, superposition

N, D = 30, 4
TRAIN, HELDOUT = 2_500, 90
"""Two whole blocks of 1,024 training rows and a part of one."""


def features(n: int = N, sparsity: float = 0.8, **fields) -> FeatureConfig:
    return FeatureConfig.parse({"n_features": n, "sparsity": sparsity, **fields})


def world(**fields) -> World:
    return World(random_unit(D, N, 0), features(), **fields)


@pytest.fixture(params=["dense", "sparse"])
def source(request) -> SyntheticSource:
    return SyntheticSource(world(sparse=request.param == "sparse"), TRAIN, HELDOUT, TRAIN, name="x")


NOISES = (Isotropic(level=0.5), Anisotropic(level=0.3, spread=20), LowRank(level=2, rank=2))
noises = pytest.mark.parametrize("noise", NOISES, ids=lambda noise: noise.kind)


def key(row: torch.Tensor) -> bytes:
    return row.numpy().tobytes()


def rows_of(stream, batches: int) -> Counter:
    return Counter(key(row) for _ in range(batches) for row in stream.next()["x"])


@pytest.mark.parametrize("sparse", [False, True])
def test_activations_are_w_p_times_the_features(sparse):
    made = world(sparse=sparse)
    x, acts = made.sample(200, seed=3, step=5)
    assert x.shape == (200, N)
    torch.testing.assert_close(
        acts.double(), x.double() @ made.W_p.double().T, rtol=1e-5, atol=1e-6
    )
    again, other = made.sample(200, seed=3, step=5)[0], made.sample(200, seed=3, step=6)[0]
    assert torch.equal(x, again)
    assert not torch.equal(x, other)
    assert (x > 0).double().mean() == pytest.approx(0.2, abs=0.03)


def test_the_sparse_draw_is_the_sparse_worlds_sample():
    made = world(sparse=True)
    x, acts = made.sample(50, seed=1)
    code = made.sample_sparse(50, seed=1)
    assert isinstance(code, SparseCode)
    assert torch.equal(code.dense(N), x)
    assert torch.equal(made.embed(code), acts)
    torch.testing.assert_close(made.embed(x), acts)


def test_a_world_comes_from_a_trained_toy_model():
    cfg = ToyModelConfig(features=features(n=5), d_in=2, steps=5, batch=8)
    models = train_toy_models([cfg, cfg.model_copy(update={"seed": 1})])
    made = World.of_toy_model(models, 1)
    assert torch.equal(made.W_p, models.W_p[1])
    assert made.features == cfg.features
    assert (made.d_in, made.n_features) == (2, 5)
    with pytest.raises(UserError, match="toy model 2: there are only 2"):
        World.of_toy_model(models, 2)


@pytest.mark.parametrize(
    ("W_p", "words"),
    [
        (torch.zeros(3), "shape"),
        (torch.ones(2, 4), "4 columns for n_features = 3"),
        (torch.tensor([[1.0, 0.0, float("nan")]]), "nan"),
        (torch.tensor([[1.0, 0.0, 2.0]]), "column 1 is zero"),
    ],
)
def test_impossible_matrices_are_refused(W_p, words):
    with pytest.raises(UserError, match=words):
        World(W_p, features(n=3))


def test_a_world_without_a_signal_is_refused():
    with pytest.raises(UserError, match="sparsity 1: no feature is ever active"):
        World(torch.ones(1, 3), features(n=3, sparsity=1.0))


def test_worlds_with_other_matrices_have_other_names():
    one, same, other = (World(random_unit(D, N, seed), features()) for seed in (0, 0, 1))
    assert one.digest == same.digest != other.digest
    assert json.loads(json.dumps(one.describe()))["features"]["sparsity"] == 0.8


def test_an_epoch_visits_each_training_row_once_except_a_dropped_tail(source):
    assert isinstance(source, ActivationSource)
    every = Counter(key(row) for row in source.acts(np.arange(TRAIN), "train"))
    stream = source.stream(20, seed=1)
    assert rows_of(stream, TRAIN // 20) == every
    assert rows_of(stream, TRAIN // 20) == every, "and so does the second"
    assert not rows_of(source.stream(333, seed=1), TRAIN // 333) - every


def test_epochs_and_seeds_differ_and_runs_repeat(source):
    streams = [source.stream(500, seed=s) for s in (0, 0, 1)]
    one, again, other = ([s.next()["x"] for _ in range(10)] for s in streams)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[0], other[0])
    assert not torch.equal(one[0], one[5])


@settings(max_examples=20, deadline=None)
@given(position=st.integers(0, 12), size=st.sampled_from([7, 333, 1024, 2048, 2500]))
def test_a_restored_stream_continues_bit_identically(position, size):
    source = SyntheticSource(world(), TRAIN, HELDOUT)
    stream = source.stream(size, seed=9)
    for _ in range(position):
        stream.next()
    state = json.loads(json.dumps(stream.state()))
    again = source.stream(size, seed=9, state=state)
    for _ in range(4):
        ours = again.next()["acts"]
        assert ours.shape == (size, D)
        assert torch.equal(ours, stream.next()["acts"])
    assert again.state() == stream.state()


def test_bad_positions_are_refused(source):
    state = source.stream(20, seed=0).state()
    with pytest.raises(UserError, match="saved with batch_size 20, not 10"):
        source.stream(10, seed=0, state=state)
    with pytest.raises(UserError, match="no full batch"):
        source.stream(TRAIN + 1, seed=0)


def test_heldout_rows_come_once_in_order_and_are_never_trained_on(source):
    chunks = list(source.heldout(37))
    assert torch.equal(torch.cat([c.seq for c in chunks]), torch.arange(HELDOUT))
    whole = next(source.heldout(10_000))
    assert torch.equal(torch.cat([c.x["x"] for c in chunks]), whole.x["x"])
    held = {key(row) for row in whole.x["x"] if row.any()}
    trained = {key(row) for row in source.acts(np.arange(TRAIN), "train")}
    assert not held & trained


def test_the_features_of_any_row_can_be_had(source):
    W_p = source.world.W_p
    for split, total in (("train", TRAIN), ("heldout", HELDOUT)):
        index = np.random.default_rng(0).permutation(total)[:60]
        x, acts = source.features(index, split), source.acts(index, split)
        torch.testing.assert_close(x @ W_p.T, acts, rtol=1e-4, atol=1e-6)
        every = source.features(torch.arange(total), split)
        assert torch.equal(every[torch.from_numpy(index)], x)
    chunk = next(source.heldout(50))
    torch.testing.assert_close(
        source.features(chunk.seq) @ W_p.T, chunk.x["x"], rtol=1e-4, atol=1e-6
    )
    assert source.features(np.zeros(0, np.int64)).shape == (0, N)
    with pytest.raises(UserError, match="rows 0 to 90 of 90 heldout rows"):
        source.acts(np.array([0, HELDOUT]))
    with pytest.raises(UserError, match="rows -1 to 3"):
        source.acts(np.array([3, -1]))


@pytest.mark.parametrize("count", [TRAIN, 1_500, 10])
def test_statistics_are_exact_over_the_stated_rows(count):
    source = SyntheticSource(world(), TRAIN, HELDOUT, count)
    stats = source.stats()["acts"]
    x = source.acts(np.arange(count), "train").double()
    assert stats.kept.n == count
    torch.testing.assert_close(stats.kept.mean, x.mean(0), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(stats.kept.variance, x.var(0, correction=0), rtol=1e-10, atol=0)


def test_another_seed_draws_other_rows():
    one, other = (SyntheticSource(world(), TRAIN, HELDOUT, seed=s) for s in (0, 1))
    assert one.digest() != other.digest()
    assert not torch.equal(next(one.heldout(9)).x["acts"], next(other.heldout(9)).x["acts"])
    again = SyntheticSource(world(), TRAIN, HELDOUT)
    assert one.digest() == again.digest()
    assert one.digest() != SyntheticSource(world(), TRAIN, HELDOUT + 1).digest()
    assert one.describe()["kind"] == "synthetic"
    assert one.tokens() is None


def test_an_sae_is_fitted_to_a_source():
    source = SyntheticSource(World(digons(3), features(n=6, sparsity=0.7)), rows=4_096)
    sae = wsae.fit(
        source, activation="relu", d_sae=6, tokens=60_000, batch_size=128, tied=True, lr=3e-3
    )
    x = next(source.heldout(2_000)).x["acts"]
    error = (sae(x) - x).square().mean() / x.square().mean()
    assert error < 0.2, "six latents suffice for three digons"


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ({"rows": 0}, "rows = 0"),
        ({"heldout_rows": 0}, "heldout_rows = 0"),
        ({"stats_rows": 0}, "stats_rows = 0"),
        ({"rows": 10, "stats_rows": 11}, "stats_rows = 11 of only 10"),
    ],
)
def test_sources_of_no_rows_are_refused(counts, words):
    with pytest.raises(UserError, match=words):
        SyntheticSource(world(), **counts)


@pytest.mark.parametrize(
    ("W_p", "share", "positive", "negative"),
    [
        (orthogonal(3), 1.0, 0.0, 0.0),
        (digons(2), 1 / 2, 0.0, 2 / 6),
        (simplex(3), 2 / 3, 0.0, 1.0),
        (simplex(4), 3 / 4, 0.0, 1.0),
        (polygon(5), 2 / 5, 1 / 2, 1 / 2),
        (2.0 * polygon(5), 2 / 5, 1 / 2, 1 / 2),
        (direct_sum(simplex(3), simplex(3)), 2 / 3, 0.0, 6 / 15),
    ],
)
def test_known_geometries_have_their_known_dimensionality(W_p, share, positive, negative):
    found = superposition(W_p)
    torch.testing.assert_close(found.dimensionality, torch.full_like(found.norms, share))
    assert found.positive_share == pytest.approx(positive)
    assert found.negative_share == pytest.approx(negative)
    assert found.represented == W_p.shape[1]


def test_the_summary_is_that_of_its_formulas_written_as_loops():
    W = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)).double()
    W[:, 2] = 0.0
    W[:, 5] *= 0.01
    found = superposition(W, above=0.5, tolerance=0.1)
    columns = W.T.tolist()
    dot = lambda a, b: sum(x * y for x, y in zip(a, b, strict=True))  # noqa: E731
    kept = []
    for i, a in enumerate(columns):
        norm = math.sqrt(dot(a, a))
        assert float(found.norms[i]) == pytest.approx(norm)
        shared = sum((dot(a, b) / norm) ** 2 for b in columns) if norm else 1.0
        assert float(found.dimensionality[i]) == pytest.approx(norm**2 / shared)
        kept += [a] if norm > 0.5 else []
    signs = [dot(a, b) for a, b in itertools.combinations(kept, 2)]
    assert found.represented == len(kept) < 8
    assert found.positive_share == pytest.approx(sum(s > 0.1 for s in signs) / len(signs))
    assert found.negative_share == pytest.approx(sum(s < -0.1 for s in signs) / len(signs))


@pytest.mark.parametrize("magnitudes", ["uniform", "constant", "exponential", "half_normal"])
def test_the_variance_of_activations_is_that_of_many_rows(magnitudes):
    cfg = features(magnitudes=magnitudes, rates=ZipfRates(exponent=0.5))
    source = SyntheticSource(World(random_unit(D, N, 2), cfg), rows=40_000, stats_rows=40_000)
    mean, second = feature_moments(cfg)
    expected = source.world.W_p.double().square() @ (second - mean.square())
    torch.testing.assert_close(source.stats()["acts"].kept.variance, expected, rtol=0.05, atol=0)


@noises
@pytest.mark.parametrize("sparse", [False, True])
def test_the_noise_has_the_covariance_that_the_world_states(noise, sparse):
    """Entry ij of N normal rows' second moment has variance (S_ij^2 + S_ii S_jj) / N."""
    made, rows = world(noise=noise, sparse=sparse), 20_000
    x, acts = made.sample(rows, seed=4)
    e = acts.double() - x.double() @ made.W_p.double().T
    Sigma = made.noise_covariance
    deviation = ((Sigma.square() + Sigma.diagonal().outer(Sigma.diagonal())) / rows).sqrt()
    assert float(((e.T @ e / rows - Sigma) / deviation).abs().max()) < 5
    assert float((e.mean(0) / (Sigma.diagonal() / rows).sqrt()).abs().max()) < 5
    signal = made.W_p.double() @ torch.diag(made_variance(made)) @ made.W_p.double().T
    assert float(Sigma.trace() / signal.trace()) == pytest.approx(noise.level)


def made_variance(made: World) -> torch.Tensor:
    mean, second = feature_moments(made.features)
    return second - mean.square()


def test_noise_has_the_shape_its_kind_says():
    even, uneven, low = (world(noise=noise).noise_covariance for noise in NOISES)
    assert torch.equal(even, even[0, 0] * torch.eye(D, dtype=torch.float64))
    deviations = uneven.diagonal().sqrt()
    assert torch.equal(uneven, torch.diag(uneven.diagonal()))
    torch.testing.assert_close(
        deviations[1:] / deviations[:-1], torch.full((D - 1,), 20 ** (1 / 3)).double()
    )
    values = torch.linalg.eigvalsh(low) / low.trace()
    expected = torch.tensor([0.1 / D] * 2 + [0.45 + 0.1 / D] * 2, dtype=torch.float64)
    torch.testing.assert_close(values, expected)
    with pytest.raises(UserError, match="noise of rank 5 in 4 dimensions"):
        world(noise=LowRank(rank=5))
    never = FeatureConfig(n_features=N, sparsity=0.0, magnitudes="constant")
    with pytest.raises(UserError, match="level 0.1 over a signal that never varies"):
        World(random_unit(D, N, 0), never, noise=Isotropic(level=0.1))


@noises
def test_noise_of_level_zero_is_no_noise_to_the_bit(noise):
    silent = world(noise=noise.model_copy(update={"level": 0.0}))
    one, other = (SyntheticSource(made, TRAIN, HELDOUT) for made in (world(), silent))
    assert one.digest() == other.digest()
    x, acts = silent.sample(300, seed=2)
    assert torch.equal(acts, x @ silent.W_p.T)
    index = np.arange(HELDOUT)
    assert torch.equal(one.acts(index), other.acts(index))
    assert SyntheticSource(world(noise=noise), TRAIN, HELDOUT).digest() != one.digest()


def test_worlds_of_one_seed_share_their_draws_and_noise_alone_tells_them_apart():
    quiet, loud = (world(noise=Isotropic(level=level)) for level in (0.1, 0.4))
    (x, a), (same, b) = (made.sample(100, seed=1, step=3) for made in (quiet, loud))
    assert torch.equal(x, same)
    signal = quiet.embed(x)
    torch.testing.assert_close(2 * (a - signal), b - signal, rtol=1e-4, atol=1e-5)
    other = quiet.sample(100, seed=1, step=4)
    assert not torch.isclose(other[1] - quiet.embed(other[0]), a - signal).any()
    together = torch.zeros(3, 100, D)
    NoiseStream([quiet, world(), loud], [1, 1, 9]).add_to(together, 3)
    torch.testing.assert_close(together[0], a - signal, rtol=1e-4, atol=1e-5)
    assert not together[1].any()
    assert not torch.isclose(2 * together[0], together[2]).any()


@noises
@pytest.mark.parametrize("sparse", [False, True])
def test_a_noisy_source_gives_the_same_row_under_its_number_and_keeps_the_truth(noise, sparse):
    source = SyntheticSource(world(noise=noise, sparse=sparse), TRAIN, HELDOUT, TRAIN, name="x")
    every = Counter(key(row) for row in source.acts(np.arange(TRAIN), "train"))
    assert rows_of(source.stream(20, seed=1), TRAIN // 20) == every
    whole = next(source.heldout(10_000))
    error = whole.x["x"] - source.world.embed(source.features(whole.seq))
    power = error.double().square().sum(1).mean() / source.world.signal_covariance.trace()
    assert float(power) == pytest.approx(noise.level, rel=0.6)


@pytest.mark.parametrize(
    "structure", [Correlated(group=4, rho=0.6), Hierarchical(children=3)], ids=lambda s: s.kind
)
@noises
def test_the_exact_moments_of_activations_are_those_of_many_rows(structure, noise):
    cfg = features(structure=structure, rates=ZipfRates(exponent=0.5))
    made, rows = World(random_unit(D, N, 2), cfg, noise=noise), 20_000
    acts = made.sample(rows, seed=7)[1].double() - made.mean
    assert float((acts.mean(0) / (made.covariance.diagonal() / rows).sqrt()).abs().max()) < 5
    products = acts[:, :, None] * acts[:, None]
    deviation = products.std(0) / rows**0.5
    assert float(((products.mean(0) - made.covariance) / deviation).abs().max()) < 5
