"""The commands in the order of the work, on a tiny model made here."""

import json
from pathlib import Path

import numpy as np
import pytest

from acts_models import make_model, make_text
from wsae.cli.main import main

SMALL = ("--k", "2", "--expansion", "2", "--batch-size", "64", "--tokens", "640", "--device", "cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("cli")
    make_text(place / "text.jsonl", documents=120)
    make_model(place / "model")
    return place


@pytest.fixture(scope="module")
def run(place) -> Path:
    """Harvest two hooks, train on them and evaluate."""
    text = (
        "--text",
        str(place / "text.jsonl"),
        "--hook",
        "layers.1",
        "layers.2.mlp",
        "--seq-len",
        "32",
    )
    rows = ("--tokens", "1500", "--heldout-tokens", "128", "--device", "cpu")
    assert main(["harvest", str(place / "model"), "--out", str(place / "acts"), *text, *rows]) == 0
    assert (
        main(
            [
                "train",
                str(place / "acts"),
                "--out",
                str(place / "run"),
                "--alpha",
                "1",
                "0.5",
                *SMALL,
            ]
        )
        == 0
    )
    assert (
        main(
            ["evaluate", str(place / "run"), "--draws", "50", "--n-latents", "8", "--device", "cpu"]
        )
        == 0
    )
    return place / "run"


def result(words: list[str], capsys) -> dict:
    capsys.readouterr()
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.usefixtures("run")
def test_harvest_says_what_the_store_holds_and_is_done_only_once(place, capsys):
    words = [
        "harvest",
        str(place / "model"),
        "--out",
        str(place / "acts"),
        "--text",
        str(place / "text.jsonl"),
    ]
    words += ["--hook", "layers.1", "layers.2.mlp", "--seq-len", "32", "--tokens", "1500"]
    found = result([*words, "--heldout-tokens", "128", "--device", "cpu"], capsys)
    assert found["store"] == str(place / "acts")
    assert found["bytes"] > 1500 * 2 * 16 * 4
    assert main([*words, "--heldout-tokens", "64", "--device", "cpu"]) == 2
    assert "another" in capsys.readouterr().err


@pytest.mark.usefixtures("run")
def test_training_reads_one_hook_of_a_store_when_asked(place, tmp_path, capsys):
    words = [
        "train",
        str(place / "acts"),
        "--out",
        str(tmp_path / "one"),
        "--hook",
        "layers.1",
        *SMALL,
    ]
    found = result(words, capsys)
    assert list(found["members"]) == ["layers.1"]


@pytest.mark.usefixtures("run")
def test_a_store_takes_no_text(place, tmp_path, capsys):
    words = [
        "train",
        str(place / "acts"),
        "--out",
        str(tmp_path / "x"),
        "--text",
        "builtin",
        *SMALL,
    ]
    assert main(words) == 2
    assert "leave --text out" in capsys.readouterr().err


def test_evaluation_finds_data_and_model_of_the_run_by_itself(run, capsys):
    found = result(
        ["evaluate", str(run), "--draws", "20", "--n-latents", "4", "--device", "cpu"], capsys
    )
    scores = found["hooks"]["layers.1"]["members"]["plain"]["metrics"]
    assert 0 < scores["fvu"]["value"] < 2
    assert "ce_loss_recovered_zero" in scores, "the model behind the store was not found"


def test_compare_pairs_each_weighted_member_with_the_plain_one(run, tmp_path, capsys):
    found = result(
        ["compare", str(run), "--draws", "50", "--out", str(tmp_path / "c.json")], capsys
    )
    pairs = {(line["a"], line["b"]) for line in found["hooks"]["layers.1"]}
    assert pairs == {("variance-a1", "plain"), ("variance-a0.5", "plain")}
    assert json.loads((tmp_path / "c.json").read_text()) == found


def test_the_report_is_one_file(run, tmp_path, capsys):
    found = result(["report", str(run), "--out", str(tmp_path / "r.html")], capsys)
    assert found["bytes"] == (tmp_path / "r.html").stat().st_size
    assert "variance-a0.5" in (tmp_path / "r.html").read_text()


def test_the_words_on_the_terminal_show_members_intervals_and_the_next_step(run, capsys):
    assert main(["compare", str(run), "--draws", "50"]) == 0
    text = capsys.readouterr().out
    assert "layers.2.mlp: paired differences" in text
    assert "variance-a0.5" in text
    assert (
        main(["evaluate", str(run), "--draws", "20", "--n-latents", "0", "--splice-tokens", "0"])
        == 0
    )
    text = capsys.readouterr().out
    assert f"wsae compare {run}" in text
    assert "fvu_weighted" in text


def test_a_live_model_is_trained_on_without_a_store_and_evaluated(place, tmp_path, capsys):
    words = [
        "train",
        str(place / "model"),
        "--text",
        str(place / "text.jsonl"),
        "--hook",
        "layers.1",
    ]
    words += ["--seq-len", "32", "--heldout-tokens", "64", "--out", str(tmp_path / "live"), *SMALL]
    assert list(result(words, capsys)["members"]) == ["layers.1"]
    found = result(["evaluate", str(tmp_path / "live"), "--draws", "20", "--device", "cpu"], capsys)
    assert found["hooks"]["layers.1"]["members"]["plain"]["metrics"]["l0"]["value"] <= 2


def test_a_run_whose_data_are_gone_says_so(tmp_path, capsys):
    x = np.random.default_rng(0).standard_normal((400, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    assert main(["train", str(tmp_path / "x.npy"), "--out", str(tmp_path / "run"), *SMALL]) == 0
    (tmp_path / "x.npy").rename(tmp_path / "y.npy")
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run")]) == 2
    assert "no longer there; name them with --source" in capsys.readouterr().err
    assert (
        main(
            [
                "evaluate",
                str(tmp_path / "run"),
                "--source",
                str(tmp_path / "y.npy"),
                "--draws",
                "20",
            ]
        )
        == 0
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--activation", "group_topk", "--d-sae", "31"), "use d_sae 30 or 32"),
        (("--d-sae", "1"), "k = 2 active latents of only d_sae = 1"),
    ],
)
@pytest.mark.usefixtures("run")
def test_shapes_that_do_not_fit_leave_nothing_behind(words, says, place, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["train", str(place / "acts"), "--out", str(out), *SMALL, *words]) == 2
    assert says in capsys.readouterr().err
    assert not out.exists()


def test_nan_in_the_data_leaves_nothing_behind(tmp_path, capsys):
    x = np.ones((400, 8), dtype=np.float32)
    x[3, 2] = np.nan
    np.save(tmp_path / "x.npy", x)
    assert main(["train", str(tmp_path / "x.npy"), "--out", str(tmp_path / "run"), *SMALL]) == 2
    assert "row 3, dimension 2" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_demo_runs_on_ones_own_model_and_text(place, tmp_path, capsys):
    words = ["demo", "--model", str(place / "model"), "--text", str(place / "text.jsonl")]
    words += ["--hook", "layers.1", "--tokens", "1000", "--heldout-tokens", "128", "--passes", "1"]
    words += ["--k", "2", "--expansion", "2", "--n-latents", "4", "--device", "cpu"]
    assert main([*words, "--out", str(tmp_path / "demo")]) == 0
    out, err = capsys.readouterr()
    assert "This demo" in err, "it says first what it will do"
    assert "paired differences" in out
    assert (tmp_path / "demo" / "report.html").stat().st_size > 10_000


def test_labels_give_the_consistency_rule_its_classes(tmp_path, capsys):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 400)
    x = rng.random((400, 8)).astype(np.float32)
    x[:, 0] = labels == 1
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", labels)
    words = ["train", str(tmp_path / "x.npy"), "--out", str(tmp_path / "run"), *SMALL]
    words += ["--gamma", "consistency"]
    assert main(words) == 2
    assert "give --labels FILE" in capsys.readouterr().err
    assert main([*words, "--labels", str(tmp_path / "x.npy")]) == 2
    assert "one whole number per row is needed" in capsys.readouterr().err
    assert main([*words, "--labels", str(tmp_path / "y.npy")]) == 0
    gamma = json.loads((tmp_path / "run" / "gamma.json").read_text())["x"]["consistency-a1"]
    assert gamma["heaviest"][0][0] == 0, "the dimension that tells a class apart weighs most"
