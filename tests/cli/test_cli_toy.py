"""`wsae toy`: the plain twin is always there, the rows add up to the tables, bad input is one line, work is kept."""

import contextlib
import io
import json
import re
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from wsae.cli import toy
from wsae.cli.common import parse
from wsae.cli.main import main
from wsae.evals.glossary import RECOVERY
from wsae.studies import sweep as sweep_run
from wsae.studies.sweep import twin_of
from wsae.toy.config import Anisotropic, Isotropic, LowRank
from wsae.toy.model import ToyModels, importances

SMALL = ["--n-features", "12", "--d-in", "4", "--toy-steps", "40", "--steps", "40"]
SMALL += ["--batch-size", "32", "--sparsity", "0.5", "0.8", "--seeds", "2", "--device", "cpu"]
MANY = ["--activation", "relu", "topk", "--gamma", "variance", "whiten", "--alpha", "1", "-0.5"]
SHOWN = ("fvu", "mcc_direction", "mcc_code", "gt_scaled_rel", "activated_participation")
RULES = ("plain", "variance-a1", "variance-a-0.5", "whiten-a1", "whiten-a-0.5")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("toy") / "out"


@pytest.fixture(scope="module")
def found(place) -> dict:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["toy", *SMALL, *MANY, "--out", str(place), "--json"]) == 0
    return json.loads(out.getvalue())


def values(found: dict, method: str, level: float, score: str) -> np.ndarray:
    rows = [r for r in found["rows"] if (r["method"], r["sparsity"]) == (method, level)]
    return np.array([r[score] for r in sorted(rows, key=lambda r: r["seed"])])


def config(*words: str):
    return toy.config(parse(toy.Flags, "wsae toy", list(words), ""))


def test_every_kind_and_rule_stands_beside_its_plain_twin_and_the_controls(found):
    methods = [f"{kind} {rule}" for kind in ("relu", "topk") for rule in RULES]
    keys = {(r["method"], r["sparsity"], r["seed"]) for r in found["rows"]}
    expected = [*methods, "random", "closed form"]
    assert keys == {(m, s, seed) for m in expected for s in (0.5, 0.8) for seed in (0, 1)}
    assert len(found["rows"]) == len(keys)
    pairs = {(d["a"], d["b"]) for d in found["differences"]}
    assert pairs == {(m, f"{m.split()[0]} plain") for m in methods if not m.endswith("plain")}


def test_summaries_are_means_over_seeds_with_students_intervals(found):
    assert {s["score"] for s in found["summaries"]} == set(SHOWN)
    for line in found["summaries"]:
        if line["method"] == "chance":
            assert line["score"] == "mcc_direction"
            x = values(found, "relu plain", line["sparsity"], "mcc_direction_chance")
        else:
            x = values(found, line["method"], line["sparsity"], line["score"])
        assert (line["n"], line["value"]) == (2, pytest.approx(x.mean()))
        half = stats.t.ppf(0.975, 1) * x.std(ddof=1) / 2**0.5
        assert line["low"] == pytest.approx(x.mean() - half)
        assert line["high"] == pytest.approx(x.mean() + half)


def test_differences_are_paired_by_seed(found):
    assert len(found["differences"]) == len(SHOWN) * 8 * 2
    for line in found["differences"]:
        a, b = (values(found, line[k], line["sparsity"], line["score"]) for k in "ab")
        assert line["value"] == pytest.approx((a - b).mean(), abs=1e-12)
        half = stats.t.ppf(0.975, 1) * (a - b).std(ddof=1) / 2**0.5
        assert line["high"] - line["low"] == pytest.approx(2 * half, abs=1e-9)


def test_every_seed_has_a_world_of_its_own_unless_told(found, place):
    models = ToyModels.load(place / "toy")
    assert [(c.features.sparsity, c.seed) for c in models.configs] == [
        (0.5, 0), (0.5, 1), (0.8, 0), (0.8, 1),
    ]  # fmt: skip
    chance = values(found, "relu plain", 0.5, "mcc_direction_chance")
    assert chance[0] != chance[1]
    assert len(config(*SMALL, "--toy-seeds", "one").toy_models()) == 2


def test_what_out_keeps_is_what_json_printed(found, place):
    assert json.loads((place / "rows.json").read_text()) == found["rows"]
    kept = json.loads((place / "toy.json").read_text())
    assert kept == {key: found[key] for key in kept}
    assert {"config", "summaries", "differences", "loss_still_falling"} == set(kept)


def test_the_same_command_reads_the_same_rows_and_prints_tables(found, place, monkeypatch, capsys):
    monkeypatch.setattr(sweep_run, "train_trials", None)
    monkeypatch.setattr(sweep_run, "train_toy_models", None)
    assert main(["toy", *SMALL, *MANY, "--out", str(place)]) == 0
    out, err = capsys.readouterr()
    assert "holds this sweep already" in err
    for score in SHOWN:
        assert f"{score}: {RECOVERY[score].name}" in out
    assert out.count("minus the plain twin") == len(SHOWN)
    plain = values(found, "topk plain", 0.8, "fvu").mean()
    line = re.search(r"^topk plain +(\S+) ±\S+ +(\S+) ±", out, re.M)
    assert line is not None
    assert float(line[2]) == pytest.approx(plain, rel=6e-3)
    assert re.search(r"^chance +0\.\d+ ±", out, re.M)
    assert "of 80 differences about 4 do so by chance" in out
    assert str(place / "rows.json") in out


def test_other_saes_take_the_kept_toy_models(found, place, tmp_path, monkeypatch, capsys):
    mine = tmp_path / "copy"
    shutil.copytree(place, mine)
    monkeypatch.setattr(sweep_run, "train_toy_models", None)
    words = ["--activation", "relu", "--gamma", "none", "--score", "fvu", "l0"]
    assert main(["toy", *SMALL, *words, "--out", str(mine), "--json"]) == 0
    out, err = capsys.readouterr()
    assert "a sweep of other settings; its rows are replaced" in err
    again = json.loads(out)
    assert again["differences"] == []
    assert {s["score"] for s in again["summaries"]} == {"fvu", "l0"}
    before, after = (values(f, "relu plain", 0.8, "fvu") for f in (found, again))
    np.testing.assert_allclose(after, before, rtol=1e-3)


def test_an_interrupted_run_keeps_its_toy_models_and_goes_on(tmp_path, monkeypatch, capsys):
    words = ["toy", *SMALL, "--activation", "relu", "--gamma", "none", "--out", str(tmp_path / "o")]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sweep_run, "train_toy_models", interrupt)
        assert main(words) == 130
        assert "no toy model is finished yet" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(sweep_run, "train_trials", interrupt)
        assert main(words) == 130
        assert f"{tmp_path / 'o'} keeps its toy models" in capsys.readouterr().err
    before = ToyModels.load(tmp_path / "o" / "toy")
    monkeypatch.setattr(sweep_run, "train_toy_models", None)
    assert main(words) == 0
    assert torch.equal(ToyModels.load(tmp_path / "o" / "toy").W_p, before.W_p)


@pytest.mark.usefixtures("found")
def test_a_directory_of_something_else_is_refused(place, capsys):
    assert main(["toy", *SMALL, "--out", str(place / "toy")]) == 2
    assert "this is a wsae toy, but a sweep is needed here" in capsys.readouterr().err


def test_flags_reach_the_saes_they_are_for():
    kinds = ["--activation", "relu", "topk", "jumprelu", "batch_topk"]
    cfg = config(*SMALL, *kinds, "--l1", "0.1", "--l0", "0.2", "--gamma", "none", "--lr", "0.01")
    members = {m.member.activation.kind: m for m in cfg.methods}
    assert list(members) == ["relu", "topk", "jumprelu", "batch_topk"]
    assert [m.member.tied for m in cfg.methods] == [True, False, False, False]
    assert [m.member.l1 for m in cfg.methods] == [0.1, 0, 0, 0]
    assert [m.member.l0 for m in cfg.methods] == [0, 0, 0.2, 0]
    assert [m.k_from_truth for m in cfg.methods] == [False, True, False, True]
    assert [m.member.auxk > 0 for m in cfg.methods] == [False, True, False, True]
    assert {m.member.lr for m in cfg.methods} == {0.01}
    assert {m.member.d_sae for m in cfg.methods} == {12}
    fixed = config(*SMALL, *kinds, "--k", "5", "--no-tied", "--d-sae", "20", "--gamma", "gap")
    assert [getattr(m.member.activation, "k", None) for m in fixed.methods[::2]] == [
        None,
        5,
        None,
        5,
    ]
    assert not any(m.k_from_truth or m.member.tied for m in fixed.methods)
    assert {m.member.d_sae for m in fixed.methods} == {20}
    for method in fixed.methods:
        twin = next(m for m in fixed.methods if m.name == twin_of(method, fixed.methods))
        assert twin.member.gamma.rule == "none"
        assert twin.member.activation == method.member.activation


def test_importance_and_normalise_reach_the_sweep():
    cfg = config(*SMALL, "--importance", "decay", "--normalise", "none", "--gamma", "variance")
    assert cfg.toy_models()[0].importance.kind == "decay"
    assert cfg.methods[1].member.gamma.normalise == "none"
    assert config("--sparsity", "0.5", "0.5").sparsities == (0.5,)
    power = config(*SMALL, "--importance", "power").toy_models()[0]
    assert importances(power).tolist() == pytest.approx([0.9**i for i in range(12)])
    fixed = config(*SMALL, "--toy-sparsity", "0.7", "--toy-seeds", "one")
    assert [cfg.features.sparsity for cfg in fixed.toy_models()] == [0.7]


@pytest.mark.parametrize(
    ("words", "noise"),
    [
        ((), Isotropic()),
        (("isotropic",), Isotropic(level=0.1)),
        (("anisotropic", "--noise-spread", "3"), Anisotropic(level=0.1, spread=3)),
        (("low_rank", "--noise-level", "2", "--noise-rank", "4"), LowRank(level=2, rank=4)),
    ],
)
def test_noise_reaches_the_sweep(words, noise):
    assert config(*SMALL, *(["--noise", *words] if words else [])).noise == noise


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--d-in", "12"], "no need of superposition"),
        (["--d-sae", "6"], "no 'closed form' to compare with"),
        (["--seeds", "1"], "one seed gives no intervals"),
    ],
)
def test_what_is_allowed_but_worth_a_word_is_said(words, says, tmp_path, capsys):
    small = [*SMALL, "--activation", "topk", "--gamma", "variance", *words]
    assert main(["toy", *small, "--out", str(tmp_path / "o")]) == 0
    out, err = capsys.readouterr()
    assert "note: " in err
    assert says in err
    assert ("closed form" in out) == ("--d-sae" not in words)
    assert ("±" in out) == ("--seeds" not in words)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--noise-level", "1"], "--noise-level 1: needs --noise isotropic or anisotropic or low_rank"),
        (["--noise", "isotropic", "--noise-rank", "2"], "--noise-rank 2: needs --noise low_rank"),
        (["--noise", "low_rank", "--noise-rank", "5"], "noise of rank 5 in 4 dimensions; at most 4"),
        (["--noise", "isotropic", "--noise-level", "-1"], "--noise-level: Input should"),
        (["--toy-sparsity", "1"], "toy sparsity 1: a toy model has nothing to train on"),
        (["--sparsity", "1.5"], "sparsity 1.5: a probability, so from 0 to 1"),
        (["--sparsity", "0.5", "-0.1"], "sparsity -0.1: a probability"),
        (["--sparsity", "nan"], "--sparsity: nan is not a number to work with"),
        (["--sparsity", "1"], "sparsity 1: no feature is ever active, so there is no signal"),
        (["--sparsity", "0.9999"], "sparsity 0.9999: only about 4.9 active features in the 4,096 rows"),
        (["--sparsity"], "--sparsity: give at least one level"),
        (["--sparsity", "high"], "--sparsity: 'high' is not a number"),
        (["--activation"], "--activation: give at least one kind"),
        (["--activation", "tok"], "'tok' is not one of"),
        (["--gamma", "whitten"], "'whitten' is not one of none, variance"),
        (["--gamma", "vector"], "'vector' is not one of"),
        (["--gamma", "none", "--alpha", "2"], "--alpha 2: no rule to apply it to; name one"),
        (["--gamma", "--alpha", "2", "3"], "--alpha 2 3: no rule to apply it to"),
        (["--alpha", "inf"], "alpha"),
        (["--k", "3"], "--k 3: relu has no k"),
        (["--activation", "topk", "--k", "13"], "k = 13 active latents of only d_sae = 12"),
        (["--activation", "topk", "--k", "0"], "greater than 0 (got 0)"),
        (["--activation", "group_topk"], "group_topk needs d_sae divisible by k, but 12 % 5"),
        (["--n-features", "0"], "--n-features 0: a world has at least one"),
        (["--d-in", "0"], "--d-in: Input should be greater than 0 (got 0)"),
        (["--d-sae", "0"], "--d-sae: Input should be greater than 0 (got 0)"),
        (["--seeds", "0"], "seeds: Input should be greater than 0 (got 0)"),
        (["--steps", "0"], "steps: Input should be greater than 0 (got 0)"),
        (["--toy-steps", "0"], "--toy-steps: Input should be greater than 0 (got 0)"),
        (["--batch-size", "0"], "--batch-size: Input should be greater than 0 (got 0)"),
        (["--lr", "0"], "lr: Input should be greater than 0 (got 0"),
        (["--l1", "-1"], "l1: Input should be greater than or equal to 0 (got -1"),
        (["--score"], "--score: give at least one name"),
        (["--score", "mcc_cod"], "score 'mcc_cod' is unknown (nearest: mcc_code"),
        (["--d-sae", "6", "--score", "gt_raw"], "score gt_raw: takes latent i as feature i, but d_sae = 6"),
        (["--seed", "-1"], "--seed: -1 is not between 0 and"),
        (["--toy-seeds", "two"], "'two' is not one of one, each"),
        (["--device", "cuda:77"], "--device cuda:77: not on this machine"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_nothing_is_written(words, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    own = [] if "--activation" in words else ["--activation", "relu"]
    small = ["--n-features", "12", "--d-in", "4"]
    small += ["--sparsity", "0.6"] if "--sparsity" not in words else []
    assert main(["toy", *small, *own, *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"wsae: error: [^\n]+\n", err), err
    assert says in err
    assert list(tmp_path.iterdir()) == []


def test_the_example_world_is_recovered_better_than_chance(monkeypatch, capsys):
    script = Path(__file__).parents[2] / "examples" / "toy_world.py"
    words = ["--features", "12", "--d-in", "8", "--sparsity", "0.9", "--rows", "20000"]
    monkeypatch.setattr("sys.argv", [str(script), *words])
    runpy.run_path(str(script), run_name="__main__")
    out = capsys.readouterr().out
    line = re.search(r"\|cos\| of matched pairs +([\d.]+) +\(random directions: ([\d.]+)\)", out)
    assert line is not None
    assert float(line[1]) > float(line[2]) + 0.1
    assert len(re.findall(r"^  feature +\d+  latent +\d+  ", out, re.M)) == 5
