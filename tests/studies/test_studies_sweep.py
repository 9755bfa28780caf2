"""Sweeps on known worlds: pairing, scales, controls, verdicts; each against a reference of its own."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from wsae.core.errors import UserError
from wsae.sae.config import GammaConfig, make_activation
from wsae.sae.forward import weigh
from wsae.studies import drawing
from wsae.studies.benchmark import (
    NOISE_KINDS,
    NOISE_RULES,
    NOISE_WORLDS,
    SCORES,
    benchmark_methods,
    made_worlds,
    mixed,
    noise_settings,
    noise_tables,
    noisy_trials,
    over_worlds,
    trials,
)
from wsae.studies.engine import (
    Mean,
    differences,
    judged,
    mean_interval,
    rank_correlation,
    select,
    series,
    steps_down,
)
from wsae.studies.figures import (
    figure2,
    figure3,
    low_differences,
    relative,
    world_readings,
    world_sweep,
    worlds_table,
)
from wsae.studies.sweep import (
    CLOSED_FORM,
    RANDOM,
    Rows,
    Trial,
    oracle_gamma,
    read_rows,
    run_sweep,
    score_trials,
    toy_trials,
    train_trials,
    trial_statistics,
    world_gamma,
    write_rows,
)
from wsae.studies.sweep_config import (
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
from wsae.theory import geometry
from wsae.theory.losses import grid, ground_truth_loss
from wsae.toy.config import (
    Anisotropic,
    FeatureConfig,
    Isotropic,
    LowRank,
    Noise,
    ToyModelConfig,
)
from wsae.toy.model import train_toy_models
from wsae.toy.world import World
from wsae.train.config import BankConfig

QUICK = TrainingConfig(bank=BankConfig(steps=80), batch_size=32, statistics_rows=4096, rows=256)


def trial(sparsity: float = 0.5, seed: int = 0, noise: Noise = Isotropic()) -> Trial:  # noqa: B008
    W_p, features = geometry.random_unit(3, 8, seed), FeatureConfig(n_features=8, sparsity=sparsity)
    labels = {"world": "random", "sparsity": sparsity, "seed": seed}
    return Trial(World(W_p, features, noise=noise), seed, labels)


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


# --- noise ---

NOISES = (Anisotropic(level=0.3, spread=20), LowRank(level=1), Isotropic(level=0.5))


def code_error(world: World, gamma: torch.Tensor, support: list[int]) -> float:
    """tr(B Sigma B^T), B = (W^T M W)^-1 W^T M: the error of least squares under M on a known support."""
    W = world.W_p.double()[:, support]
    root = weigh(torch.eye(world.d_in, dtype=torch.float64), gamma)
    M = root @ root.T
    B = torch.linalg.solve(W.T @ M @ W, W.T @ M)
    return float((B @ world.noise_covariance @ B.T).trace())


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(NOISES), st.integers(1, 4))
def test_no_rule_beats_the_oracle_on_any_known_support(seed, noise, active):
    features = FeatureConfig(n_features=10, sparsity=0.8)
    world = World(geometry.random_unit(6, 10, seed), features, noise=noise)
    support = np.random.default_rng(seed).permutation(10)[:active].tolist()
    best = code_error(world, oracle_gamma(world), support)
    rules = {name: own.get("gamma") for name, own in NOISE_RULES.items() if name != "oracle"}
    for name, rule in rules.items():
        gamma = world_gamma(rule or GammaConfig(), world.covariance)
        found = code_error(world, gamma, support)
        assert found >= best * (1 - 1e-9), name
    plain = code_error(world, torch.ones(6), support)
    if noise.kind == "isotropic":
        assert best == pytest.approx(plain)
    else:
        assert best < plain


def test_the_oracles_error_is_what_least_squares_makes_of_drawn_rows():
    features = FeatureConfig(n_features=10, sparsity=0.8)
    world = World(geometry.random_unit(6, 10, 1), features, noise=NOISES[0])
    x, acts = world.sample(40_000, seed=0)
    support, gamma = [2, 7], oracle_gamma(world)
    rest = [i for i in range(10) if i not in support]
    seen = (
        acts.double() - x[:, rest].double() @ world.W_p[:, rest].double().T
    )  # the support alone, and noise
    for weights in (gamma, torch.ones(6, dtype=torch.float64)):
        weighted = weigh(world.W_p.double()[:, support].T, weights).T
        z = torch.linalg.lstsq(weighted, weigh(seen, weights).T).solution.T
        error = (z - x[:, support].double()).square().sum(1)
        expected = code_error(world, weights, support)
        assert abs(float(error.mean()) - expected) < 5 * float(error.std()) / 200


def test_noise_reaches_training_and_scores_and_the_truth_stays():
    quiet, loud = trial(0.7), trial(0.7, noise=Anisotropic(level=1.0))
    assert torch.equal(
        Rows([quiet], "score", 64).features(0), Rows([loud], "score", 64).features(0)
    )
    mixed_rows = Rows([loud, quiet], "train", 64).acts(2)
    torch.testing.assert_close(mixed_rows[1], Rows([quiet], "train", 64).acts(2)[0])
    torch.testing.assert_close(mixed_rows[0], Rows([loud], "train", 64).acts(2)[0])
    found = trial_statistics([loud], 1 << 17)[0]
    torch.testing.assert_close(found.covariance, loud.world.covariance, rtol=0.05, atol=0.01)
    plain, oracle = benchmark_methods(8, {"Top-k": NOISE_KINDS["Top-k"]}, NOISE_RULES)[
        :: len(NOISE_RULES) - 1
    ]
    trained = train_trials([loud, quiet], [plain, oracle], QUICK)
    Gamma = trained.saes[1].gamma.double()
    product = Gamma.T @ Gamma @ loud.world.noise_covariance
    torch.testing.assert_close(product, product[0, 0] * torch.eye(3).double(), rtol=1e-4, atol=1e-6)
    assert float((Gamma.T @ Gamma).trace()) == pytest.approx(3)
    assert torch.equal(trained.saes[3].gamma, torch.ones(3)), "without noise the oracle has no wish"
    rows = select(score_trials([loud, quiet], trained, QUICK), method=plain.name)
    assert [row["acts_unexplained"] > 0.05 for row in rows] == [True, False]


def test_a_new_rule_is_a_line_of_the_table():
    rules = {"plain": {}, "mine": {"gamma": GammaConfig(rule="gap"), "lr": 0.5, "init_scale": 2.0}}
    plain, mine = benchmark_methods(8, {"Top-k": NOISE_KINDS["Top-k"]}, rules)
    assert (mine.member.gamma.rule, mine.member.lr, mine.init_scale) == ("gap", 0.5, 2.0)
    assert plain.member.gamma.rule == "none"


def test_noisy_worlds_differ_by_their_noise_alone():
    found = noisy_trials(6, 12, 2, 2, seed=3)
    assert len(found) == len(NOISE_WORLDS) * len(noise_settings()) * 2
    one = [t for t in found if t.labels["seed"] == 1 and t.labels["world"].startswith("uneven")]
    assert all(torch.equal(t.world.W_p, one[0].world.W_p) and t.seed == 4 for t in one)
    assert [t.world.noise for t in one] == list(noise_settings().values())


def noise_rows(effect: float) -> list[dict]:
    """Rows of the noise benchmark in which the oracle is better than plain by a given effect, in one world alone."""
    draw, out = np.random.default_rng(0), []
    for world in NOISE_WORLDS:
        for noise in noise_settings():
            for seed in range(4):
                own = draw.normal()
                labels = {"world": f"{world} | {noise}", "seed": seed, "mcc_direction_chance": 0.5}
                out.append({**labels, "method": RANDOM, **dict.fromkeys(SCORES, own)})
                for kind, places in NOISE_KINDS.items():
                    for rule in NOISE_RULES:
                        for place in range(len(places)):
                            gain = effect * (rule == "oracle" and world == "uneven") + place
                            score = own + gain + 1e-3 * draw.normal()
                            method = f"{kind} | {rule} | {place}"
                            out.append({**labels, "method": method, **dict.fromkeys(SCORES, score)})
    return out


def test_the_noise_tables_pair_seeds_and_average_worlds():
    rows = noise_rows(0.4)
    pooled = over_worlds(rows)
    found = differences(pooled, "Top-k | oracle", "Top-k | plain", "mcc_direction", "noise")
    assert {mean.n for mean in found.values()} == {4}
    assert all(mean.value == pytest.approx(0.2, abs=2e-3) for mean in found.values())
    lines = noise_tables(rows)["mcc_direction, rule minus plain"]["rows"]
    assert all(line[-1].startswith("+0.") and line[-1].endswith("**") for line in lines)
    assert sum(cell.endswith("**") for line in lines for cell in line[2:-1]) <= 2


# --- readings of the world ---


def test_every_reading_of_the_world_has_its_own_sweep():
    readings = list(world_readings())
    assert len({reading.label for reading in readings}) == len(readings) == 18
    cfgs = [world_sweep(reading, "small", 0) for reading in readings]
    assert len({repr(cfg.to_dict()) for cfg in cfgs}) == len(cfgs)
    assert all(cfg.seeds == 8 for cfg in cfgs)
    fixed = next(r for r in readings if r.matrix == "all S")
    cfg = world_sweep(fixed, "tiny", 0).model_copy(update={"toy_steps": 5})
    models = train_toy_models(cfg.toy_models())
    assert len(models.configs) == cfg.seeds
    found = toy_trials(cfg, models)
    assert len({t.labels["sparsity"] for t in found}) == 4
    for one in found:
        assert torch.equal(one.world.W_p, models.W_p[one.labels["seed"]])
        assert one.world.features.sparsity == one.labels["sparsity"]


def test_low_differences_are_relative_and_paired():
    rows = made_rows(-0.2)
    mean = {S: m.value for S, m in series(rows, PLAIN, "sae_loss").items()}
    expected = [
        np.mean(
            [-0.2 * row["sae_loss"] / mean[row["sparsity"]] for row in own if row["sparsity"] < 0.6]
        )
        for own in (select(rows, method=PLAIN, seed=seed) for seed in range(4))
    ]
    assert low_differences(rows, WSAE, "sae_loss") == pytest.approx(expected)


def test_the_table_of_readings_marks_what_is_sure():
    rows = [
        {
            **row,
            "method": f"{WSAE}, alpha {alpha}",
            "gt_matched": row["gt_raw"],
            "gt_matched_active": 1.0,
        }
        for row in made_rows(-0.2)
        for alpha in ("0.5", "1", "2")
        if row["method"] == WSAE
    ]
    rows += [
        {**row, "gt_matched": row["gt_raw"], "gt_matched_active": 1.0} for row in made_rows(0.0)
    ]
    lines = worlds_table({"one": rows})["rows"]
    assert [line[:2] for line in lines] == [["one", "0.5"], ["one", "1"], ["one", "2"]]
    assert all(line[2].startswith("-") and line[2].endswith("*") for line in lines)
    assert all(line[3].startswith("+0.00") and not line[3].endswith("*") for line in lines)


def test_a_sweep_killed_where_it_replaces_another_is_run_again(tmp_path, monkeypatch) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    features = FeatureConfig(n_features=4, sparsity=0.5)
    models = train_toy_models([ToyModelConfig(features=features, d_in=2, steps=2)])
    write_rows([{"row": 0}], {"of": "old"}, tmp_path / "sweep")
    models.save(tmp_path / "toy")
    monkeypatch.setattr("wsae.studies.sweep.write_manifest", killed)
    monkeypatch.setattr("wsae.toy.model.write_manifest", killed)
    for write in (
        lambda: write_rows([{"row": 1}], {"of": "new"}, tmp_path / "sweep"),
        lambda: models.save(tmp_path / "toy"),
    ):
        with pytest.raises(KeyboardInterrupt):
            write()
    assert read_rows({"of": "new"}, tmp_path / "sweep") is None
    assert not (tmp_path / "toy" / "manifest.json").exists()


@settings(max_examples=10)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=30, unique=True))
def test_names_in_a_scatter_cover_neither_each_other_nor_a_point(places: list[tuple[float, float]]):
    points = [
        {"label": f"variance-a{i}", "group": "g", "x": x, "y": y, "low": None, "high": None}
        for i, (x, y) in enumerate(places)
    ]
    figure = drawing.new_figure(4.6, 3.9)
    (ax,) = figure.subplots(1, 1, squeeze=False).flat
    panel = {"title": "", "xlabel": "x", "ylabel": "y", "lines": [], "points": points}
    drawing._draw_scatter(ax, panel, ["g"])
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in ax.texts]
    assert boxes or len(places) > 1
    for a, b in itertools.combinations(boxes, 2):
        assert not a.padded(-1).overlaps(b.padded(-1))
    for centre in ax.transData.transform(places):
        assert not any(box.contains(*centre) for box in boxes)
