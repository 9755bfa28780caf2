"""Sweeps on known worlds: pairing, scales, controls, verdicts; each against a reference of its own."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from wsae.core.errors import UserError
from wsae.sae.config import GammaConfig, make_activation
from wsae.studies.benchmark import made_worlds, mixed, trials
from wsae.studies.figures import figure2, figure3, relative
from wsae.studies.results import (
    Mean,
    differences,
    judged,
    mean_interval,
    rank_correlation,
    select,
    series,
    steps_down,
)
from wsae.studies.sweep.config import (
    PLAIN,
    RAW,
    SCALED,
    UNIT,
    WSAE,
    ToySweepConfig,
    TrainingConfig,
    methods,
    paper_method,
    toy_sweep,
)
from wsae.studies.sweep.run import (
    CLOSED_FORM,
    RANDOM,
    Rows,
    Trial,
    run_sweep,
    score_trials,
    train_trials,
    trial_statistics,
    world_gamma,
)
from wsae.theory import geometry
from wsae.theory.losses import grid, ground_truth_loss
from wsae.toy.config import FeatureConfig
from wsae.toy.world import World
from wsae.train.bank.config import BankConfig

QUICK = TrainingConfig(bank=BankConfig(steps=80), batch_size=32, statistics_rows=4096, rows=256)


def trial(sparsity: float = 0.5, seed: int = 0, n: int = 8, d_in: int = 3) -> Trial:
    W_p = geometry.random_unit(d_in, n, seed).float()
    labels = {"world": "random", "sparsity": sparsity, "seed": seed}
    return Trial(World(W_p, FeatureConfig(n_features=n, sparsity=sparsity)), seed, labels)


# --- statistics over seeds ---


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=9))
def test_the_interval_is_students(values):
    found = mean_interval(values)
    error = stats.sem(values)
    if error > 0:
        low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), error)
        assert found == pytest.approx((np.mean(values), low, high, len(values)), abs=1e-6)
    assert mean_interval(values[:1]) == Mean(values[0], None, None, 1)


@given(st.lists(st.integers(-5, 5), min_size=3, max_size=8, unique=True))
def test_spearman_and_steps(values):
    values = [float(value) for value in values]
    levels = [float(i) for i in range(len(values))]
    assert rank_correlation(levels, values) == pytest.approx(stats.spearmanr(levels, values)[0])
    assert steps_down(values) == sum(b < a for a, b in zip(values, values[1:], strict=False))
    assert rank_correlation(levels, [1.0] * len(values)) == 0


def made_rows(effect: float, noise: float = 0.0) -> list[dict]:
    """Rows of figure 3 in which WSAE differs from SAE by a given relative effect."""
    generator = np.random.default_rng(0)
    out = []
    for level in (0.0, 0.3, 0.5, 0.9):
        for seed in range(4):
            shared = 10 * (1 - level) + generator.normal()  # a seed's own level: pairing removes it
            for method in (PLAIN, WSAE, UNIT, SCALED, RANDOM):
                factor = 1 + (effect + noise * generator.normal()) * (method == WSAE)
                keys = ("gt_raw", "gt_raw_active", "sae_loss", "latent_variance_mean")
                keys += ("activated_sum", "activated_mean", "activated_relative")
                scores = {key: shared * factor for key in (*keys, "activated_participation")}
                labels = {"world": "toy", "sparsity": level, "seed": seed, "method": method}
                out.append({**labels, **scores})
    return out


def test_differences_are_paired_by_seed():
    rows = made_rows(-0.2)
    found = differences(rows, WSAE, PLAIN, "gt_raw")
    plain = series(rows, PLAIN, "gt_raw")
    for level, difference in found.items():
        assert difference.value == pytest.approx(-0.2 * plain[level].value)
        assert relative(rows, WSAE, PLAIN, "gt_raw")[level].value == pytest.approx(-0.2)
    assert differences(list(reversed(rows)), WSAE, PLAIN, "gt_raw")[0.3].value == pytest.approx(
        found[0.3].value
    )


# --- verdicts ---


def test_verdicts_follow_the_rows():
    lower = {panel.panel: panel.verdict for panel in figure3(made_rows(-0.2))}
    assert lower == {"3a": "reproduced", "3b": "reproduced", "3c": "partly", "3d": "opposite"}
    higher = {panel.panel: panel.verdict for panel in figure3(made_rows(+0.2))}
    assert higher == {"3a": "opposite", "3b": "opposite", "3c": "partly", "3d": "reproduced"}
    for rows in (made_rows(-0.005), made_rows(0.0, noise=0.3)):  # negligible; lost in noise
        assert figure3(rows)[0].verdict == "not reproduced"
    falling = figure2(made_rows(0.0))
    assert all("untrained SAE -1.00" in panel.ours for panel in falling)


@given(
    st.lists(st.tuples(st.floats(-1, 1), st.floats(0, 1)), min_size=1, max_size=5), st.booleans()
)
def test_a_verdict_turns_with_its_claim(pairs, lower):
    found = [Mean(value, value - half, value + half, 3) for value, half in pairs]
    mirrored = [Mean(-value, -value - half, -value + half, 3) for value, half in pairs]
    verdict = judged(found, lower, 0.01)
    assert verdict == judged(mirrored, not lower, 0.01)
    if verdict == "reproduced":
        assert judged(found, not lower, 0.01) == "opposite"


# --- training and scoring ---


def test_a_sweeps_sae_is_what_its_trial_alone_gives():
    four = methods(8, lr=0.01)
    together = train_trials([trial(0.2, 0), trial(0.7, 0), trial(0.7, 1)], four, QUICK)
    alone = train_trials([trial(0.7, 1)], [four[1]], QUICK)
    at = together.labels.index(alone.labels[0])
    torch.testing.assert_close(together.saes[at].W_dec, alone.saes[0].W_dec, rtol=1e-3, atol=1e-4)
    assert torch.equal(together.saes[at].gamma, alone.saes[0].gamma)


def test_the_loss_scale_control_has_the_scale_and_not_the_shape():
    control = trial()
    covariance = trial_statistics([control], 8192)[0].covariance
    trained = train_trials([control], methods(8), QUICK)
    gammas = {
        label["method"]: sae.gamma for label, sae in zip(trained.labels, trained.saes, strict=True)
    }
    raw = world_gamma(RAW, covariance)
    torch.testing.assert_close(raw, covariance.diagonal(), rtol=1e-12, atol=0)
    rms = gammas[WSAE].square().mean()
    torch.testing.assert_close(gammas[SCALED], rms.sqrt().expand(3), rtol=1e-5, atol=0)
    torch.testing.assert_close(gammas[UNIT], gammas[WSAE] / rms.sqrt(), rtol=1e-5, atol=0)
    assert torch.equal(gammas[PLAIN], torch.ones(3))


def test_statistics_are_those_of_the_model():
    one = trial(0.4)
    found = trial_statistics([one], 1 << 17)[0]
    active, W_p = 0.6, one.world.W_p.double()
    variance = active / 3 - (active / 2) ** 2
    torch.testing.assert_close(found.covariance, variance * W_p @ W_p.T, rtol=0, atol=0.01)
    torch.testing.assert_close(found.mean, W_p.sum(1) * active / 2, rtol=0, atol=0.02)


def test_rows_of_different_uses_never_meet():
    one = trial(0.0)
    train, score = (Rows([one], use, 64).features(0).clone() for use in ("train", "score"))
    assert not torch.isclose(train[0][:, None], score[0]).all(2).any()


@pytest.mark.parametrize("kind", ["relu", "topk", "batch_topk", "jumprelu"])
def test_unit_scale_is_folded_back(kind):
    big = trial(0.3)
    large = Trial(World(big.world.W_p * 64, big.world.features), big.seed, big.labels)
    method = paper_method("m", 8, activation=make_activation(kind, 2), tied=False, lr=0.01)
    cfg = QUICK.model_copy(update={"unit_scale": True})
    pair = [train_trials([t], [method], cfg).saes[0] for t in (big, large)]
    acts = Rows([big], "score", 16).acts(0)[0]
    x_hat, larger = (sae(x) for sae, x in zip(pair, (acts, acts * 64), strict=True))
    torch.testing.assert_close(larger, x_hat * 64, rtol=1e-3, atol=1e-2)


def test_the_closed_form_control_has_the_theorys_loss():
    n = 4
    one = Trial(
        World(geometry.digons(2), FeatureConfig(n_features=n, sparsity=0.5)),
        0,
        {"world": "digons", "sparsity": 0.5, "seed": 0},
    )
    cfg = QUICK.model_copy(update={"rows": 100_000})
    rows = score_trials([one], train_trials([one], methods(n)[:1], cfg), cfg)
    closed = select(rows, method=CLOSED_FORM)[0]
    features, probability = grid(n, 0.5, levels=24)
    W_p = geometry.digons(2)
    expected = float(ground_truth_loss(W_p.T, W_p, features, probability))
    assert closed["gt_raw"] == pytest.approx(expected, rel=0.02)
    assert closed["sae_loss"] == pytest.approx(0, abs=1e-9)
    assert {row["method"] for row in rows} == {PLAIN, RANDOM, CLOSED_FORM}


def test_a_finished_sweep_is_read_and_a_damaged_one_refused(tmp_path):
    cfg = toy_sweep("tiny")
    first = run_sweep(cfg, tmp_path)
    stamp = (tmp_path / "rows.json").stat().st_mtime_ns
    assert run_sweep(cfg, tmp_path) == first
    assert (tmp_path / "rows.json").stat().st_mtime_ns == stamp
    other = run_sweep(toy_sweep("tiny", seed=5), tmp_path)
    assert [row["fvu"] for row in other] != [row["fvu"] for row in first]
    (tmp_path / "rows.json").write_text("[]")
    with pytest.raises(UserError, match="rows.json"):
        run_sweep(toy_sweep("tiny", seed=5), tmp_path)


@pytest.mark.parametrize(
    ("levels", "message"),
    [((0.5, 1.2), "sparsity 1.2: a probability"), ((1.0,), "no signal"), ((-0.1,), "from 0 to 1")],
)
def test_impossible_levels_are_refused(levels, message):
    with pytest.raises(UserError, match=message):
        ToySweepConfig.parse({"sparsities": levels, "methods": methods(4)}, where="flags")


# --- worlds ---


@settings(max_examples=5)
@given(st.integers(0, 1000))
def test_worlds_are_what_they_say(seed):
    worlds = {world.name: world for world in made_worlds(20, 60)}
    found = {name: trials(world, 1, seed)[0] for name, world in worlds.items()}
    assert all(t.world.W_p.shape == (20, t.world.n_features) for t in found.values())
    torch.testing.assert_close(found["random"].world.W_p.norm(dim=0), torch.ones(60))
    scales = found["uneven"].world.W_p.norm(dim=1)
    assert float(scales.max() / scales.min()) > 2
    gram = mixed().T @ mixed()
    off = gram - torch.eye(29, dtype=gram.dtype)
    assert sorted(set(off.round(decimals=6).abs().flatten().tolist())) == [0.0, 0.5, 1.0]
    variance = world_gamma(GammaConfig(rule="variance", normalise="none"), mixed() @ mixed().T)
    torch.testing.assert_close(  # single axes 1, digons 2, triangles 3/2
        variance, torch.tensor([1.0] * 8 + [2.0] * 6 + [1.5] * 6, dtype=torch.float64)
    )
