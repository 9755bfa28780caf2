"""The commands in the order of the work, on a tiny model made here."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from acts_models import make_model, make_text
from safetensors.torch import load_file, save_file

from wsae.acts.config import HarvestConfig, LiveConfig
from wsae.acts.harvest import harvest
from wsae.acts.language import fingerprint
from wsae.acts.live import LiveSource
from wsae.cli.main import main
from wsae.core.cache import SMALL_BYTES
from wsae.serve.model import model_of
from wsae.train.config import TrainConfig
from wsae.train.run import load_run, train_run

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
    words[words.index("layers.1")] = "layers.2.mlp"
    assert main(words) == 2
    assert "source.hooks.0 is 'layers.1' there, 'layers.2.mlp' here" in capsys.readouterr().err


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize(
    "flag", [("--text", "builtin"), ("--seq-len", "8"), ("--shuffle-tokens", "64")]
)
def test_a_store_takes_no_text_nor_a_way_to_read_it(flag, place, tmp_path, capsys):
    words = [
        "train",
        str(place / "acts"),
        "--out",
        str(tmp_path / "x"),
        *flag,
        *SMALL,
    ]
    assert main(words) == 2
    assert "holds activations already; leave the flag out" in capsys.readouterr().err


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
    assert "layers.2.mlp: differences" in text
    assert re.search(r"dead_frac .* latents, unpaired", text)
    assert not re.search(r"fvu .*unpaired", text)
    assert "variance-a0.5" in text
    assert (
        main(["evaluate", str(run), "--draws", "20", "--n-latents", "0", "--splice-tokens", "0"])
        == 0
    )
    text = capsys.readouterr().out
    assert f"wsae compare {run}" in text
    assert "fvu_weighted" in text


def test_few_steps_dense_codes_and_matches_are_told(run, place, tmp_path, capsys):
    assert main(["compare", str(run), "--draws", "20"]) == 0
    text = capsys.readouterr().out
    assert "variance-a1: " in text
    assert "latents matched with plain's, mean cosine" in text
    assert "(chance 0." in text
    found = result(["evaluate", str(run), "--draws", "20", "--splice-tokens", "0"], capsys)
    assert any("only 10 training steps (640 tokens, 64 a step)" in note for note in found["notes"])
    words = ["train", str(place / "acts"), "--hook", "layers.1", "--out", str(tmp_path / "dense")]
    words += ["--k", "16", "--expansion", "2", "--batch-size", "8", "--tokens", "800"]
    assert main([*words, "--alpha", "1"]) == 0
    text = capsys.readouterr().out
    assert "(k = 16)" in text
    assert "training steps" not in text


def sae_of(run: Path, out: Path, **about: str) -> Path:
    """Save one of the run's SAEs as SAELens' with words of its own about where it is from."""
    from wsae.interop import Provenance, save

    sae = load_run(run).saes["layers.1"]["plain"]
    save(sae, out, "saelens", Provenance(**about))
    for ours in ("manifest.json", "wsae.safetensors"):
        (out / ours).unlink()
    return out


def test_an_sae_of_another_place_or_model_is_told_beside_its_scores(run, place, tmp_path, capsys):
    model = (place / "model").name

    def notes(name: str, source: Path, **about: str) -> list[str]:
        sae = sae_of(run, tmp_path / name, **about)
        words = ["evaluate", str(sae), "--source", str(source), "--draws", "5"]
        found = result(words, capsys)
        assert list(found["hooks"]) == ["layers.1"]
        # what an untrained model leaves open is told too
        return [note for note in found.get("notes", []) if "is not defined" not in note]

    store = place / "acts"  # of two hooks: the SAE's own is taken
    assert notes("same", store, hook="layers.1", model=model) == []
    assert notes("lens", store, hook="blocks.1.hook_resid_post", model=f"me/{model}") == []
    one = tmp_path / "one"
    words = ["harvest", str(place / "model"), "--text", str(place / "text.jsonl"), "--hook"]
    words += ["layers.1", "--seq-len", "32", "--tokens", "300", "--heldout-tokens", "64"]
    assert main([*words, "--out", str(one)]) == 0
    (note,) = notes("other", one, hook="blocks.0.hook_resid_post", model=model)
    assert "trained at blocks.0.hook_resid_post, these activations are of layers.1" in note
    (note,) = notes("stranger", one, hook="layers.1", model="gpt2-small")
    assert "trained on openai-community/gpt2" in note
    (note,) = notes("kwargs", one, hook="layers.1", model=model, dataset="x") or [""]
    assert note == ""
    lost = sae_of(run, tmp_path / "lost", hook="blocks.7.hook_resid_post")
    assert main(["evaluate", str(lost), "--source", str(store)]) == 2
    assert "the SAE is of blocks.7.hook_resid_post" in capsys.readouterr().err
    np.save(tmp_path / "wide.npy", np.zeros((20, 5), np.float32))
    assert main(["evaluate", str(lost), "--source", str(tmp_path / "wide.npy")]) == 2
    assert "trained at blocks.7.hook_resid_post), and" in capsys.readouterr().err
    x = np.random.default_rng(0).normal(size=(200, 16)).astype(np.float32) * 1e-3
    np.save(tmp_path / "small.npy", x)
    words = ["evaluate", str(lost), "--source", str(tmp_path / "small.npy"), "--draws", "5"]
    assert "worse than the mean" in result(words, capsys)["notes"][-1]
    assert main(["compare", str(lost)]) == 0
    assert "one SAE, and nothing to compare it with" in capsys.readouterr().out


def test_an_sae_alone_where_a_run_is_needed_is_told_what_works_today(run, tmp_path, capsys):
    theirs = sae_of(run, tmp_path / "theirs", hook="layers.1")
    assert main(["import", str(theirs), "--out", str(tmp_path / "ours")]) == 0
    for command in (["serve", "--index-only"], ["report"], ["interpret"], ["compare"]):
        name, *rest = command
        assert main([name, str(tmp_path / "ours"), *rest]) == 2
        error = capsys.readouterr().err
        assert re.search(r"(wsae evaluate \S+|name a store or an array with) --source", error)
        assert "make it again" not in error
        assert error.count("\n") == 1


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
    assert ": differences" in out
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


@pytest.mark.parametrize("changed", ["model", "text", "store"])
@pytest.mark.parametrize("live", [False, True])
def test_data_that_changed_since_training_are_not_measured_as_if_they_had_not(
    live, changed, tmp_path, capsys
):
    model, text = make_model(tmp_path / "model"), make_text(tmp_path / "text.jsonl", 120)
    store, run = str(tmp_path / "acts"), str(tmp_path / "run")
    where = ["--text", str(text), "--hook", "layers.1", "--seq-len", "32"]
    where += ["--heldout-tokens", "64", "--device", "cpu"]
    train = ["train", store, "--out", run, *SMALL]
    harvest = ["harvest", str(model), "--out", store, "--tokens", "1500", *where]
    if live:
        train[1:2] = [str(model), *where[:-2], "--shuffle-tokens", "64", "--stats-tokens", "256"]
    else:
        assert main(harvest) == 0
    assert main(train) == 0
    evaluate = ["evaluate", run, "--draws", "20", "--splice-tokens", "64", "--device", "cpu"]
    assert main(evaluate) == 0  # mixing of its own included
    if changed == "model":
        weights = load_file(model / "model.safetensors")
        save_file({k: 2 * v for k, v in weights.items()}, model / "model.safetensors")
    elif changed == "text":
        make_text(text, 120, seed=1)
    elif not live:
        shutil.rmtree(store)
        assert main([*harvest, "--seed", "1"]) == 0
    capsys.readouterr()
    same = (changed, live) in (("text", False), ("store", True))
    assert main([*evaluate, "--seed", "1"]) == (0 if same else 2)
    if not same:
        assert re.search("not as it was in training|another model than", capsys.readouterr().err)
        bare = [*evaluate, "--splice-tokens", "0"]
        assert main(bare) == (0 if (changed, live) == ("model", False) else 2)
    if not live:
        steer = ["steer", "--sae", run, "--set", "1=2", "--prompt", "the cat", "--device", "cpu"]
        steer += ["--new-tokens", "2"]
        assert main(steer) == (2 if changed == "model" else 0)
        assert main([*steer, str(model)]) == 0  # asked for
        assert model_of(Path(run)).why_not.count("another than") == (changed == "model")


def test_a_place_is_the_same_however_and_from_wherever_it_is_named(tmp_path, monkeypatch, capsys):
    home, away = tmp_path / "here", tmp_path / "away"
    home.mkdir()
    away.mkdir()
    make_model(home / "model")
    make_text(home / "text.jsonl", 120)
    (home / "link").symlink_to(home / "model")
    monkeypatch.setenv("HOME", str(home))
    rest = ["--hook", "layers.1", "--seq-len", "32", "--heldout-tokens", "64", "--device", "cpu"]
    mixed = [*SMALL[:-2], "--shuffle-tokens", "64", "--stats-tokens", "256"]
    rows = ["--tokens", "1500"]
    live, store, run = (str(home / name) for name in ("live", "acts", "run"))
    monkeypatch.chdir(home)
    assert main(["train", "model", "--text", "./text.jsonl", "--out", "live", *rest, *mixed]) == 0
    assert main(["harvest", "./model/", "--text", "text.jsonl", "--out", "acts", *rest, *rows]) == 0
    assert main(["train", "acts", "--out", "run", *SMALL]) == 0
    monkeypatch.chdir(away)
    measure = ["--draws", "20", "--splice-tokens", "64", "--device", "cpu"]
    for place in (live, f"../here/./run{os.sep}"):
        assert main(["evaluate", place, *measure]) == 0, "its model and text are found from here"
    first = json.loads(Path(live, "config.json").read_text())
    for model, text in (("../here/model", "~/text.jsonl"), ("../here/link/", "../here/text.jsonl")):
        asked = ["train", model, f"--text={text}", "--out", live, *rest, *mixed]
        assert main(asked) == 0, "the same run, in other words"
        assert main(["harvest", model, f"--text={text}", "--out", store, *rest, *rows]) == 0
        assert main([*asked[:4], "other", *rest, *mixed]) == 0
        other = json.loads((away / "other" / "config.json").read_text())
        assert (other["data"] == first["data"]) == ("link" not in model)
        shutil.rmtree("other")
    shutil.copytree(home / "model", away / "model")
    refused = ["train", "model", "--text", "../here/text.jsonl", "--out", live, *rest, *mixed]
    assert main(refused) == 2, "a copy elsewhere is another"

    typed = {**first["source"]["harvest"], "model": "model", "text": {"path": "text.jsonl"}}
    monkeypatch.chdir(home)  # as an earlier release wrote it down
    cfg = HarvestConfig.parse(typed, where="")
    source = LiveSource(cfg, LiveConfig(shuffle_tokens=64, stats_tokens=256))
    train_run(TrainConfig.parse(first["train"], where=""), source, home / "old")
    assert main(["evaluate", "old", *measure]) == 0
    assert main(["train", "./model", "--text=~/text.jsonl", "--out", "old", *rest, *mixed]) == 0
    harvest(cfg.located().model_copy(update={"tokens": 1500}), store)  # as the command does
    capsys.readouterr()
    shutil.move("model", "gone")
    assert main(["evaluate", run, *measure, "--seed", "1"]) == 2
    assert "--splice-tokens 0" in capsys.readouterr().err


def test_an_array_behind_a_link_is_opened_again_by_its_name(tmp_path):
    rows = np.random.default_rng(0).normal(size=(1000, 8)).astype("float32")
    np.save(tmp_path / "rows.npy", rows)
    (tmp_path / "rows.npy").rename(tmp_path / "0ab1")  # as caches keep what they fetch
    (tmp_path / "acts.npy").symlink_to(tmp_path / "0ab1")
    run = str(tmp_path / "run")
    assert main(["train", str(tmp_path / "acts.npy"), "--out", run, *SMALL]) == 0
    assert main(["evaluate", run, "--draws", "20", "--device", "cpu"]) == 0


@pytest.mark.parametrize("target", [False, True])
def test_an_array_that_changed_since_training_is_not_measured(target, tmp_path, capsys):
    rows, run = tmp_path / "x.npy", str(tmp_path / "run")
    y = tmp_path / "y.npy"
    x = np.random.default_rng(0).normal(size=(600, 8)).astype("float32")
    for path in (rows, y):
        np.save(path, x)
    sides = ["--hook-out", str(y)] if target else []
    assert main(["train", str(rows), *sides, "--out", run, *SMALL]) == 0
    evaluate = ["evaluate", run, "--draws", "20", "--device", "cpu"]
    assert main(evaluate) == 0
    np.save(y if target else rows, x[::-1])
    capsys.readouterr()
    assert main([*evaluate, "--seed", "1"]) == 2
    assert "not as it was in training" in capsys.readouterr().err


def test_a_model_is_known_by_its_weights_and_its_chat_template(tmp_path, monkeypatch):
    monkeypatch.setenv("WSAE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    weights, template = folder / "model.safetensors", folder / "chat_template.jinja"
    found = set()
    for first, said in ((b"a", "x"), (b"b", "x"), (b"b", "y")):
        weights.write_bytes(first + bytes(SMALL_BYTES))
        template.write_text(said)
        found.add(fingerprint(folder))
    assert len(found) == 3


def test_what_goes_on_elsewhere_than_it_began_is_told(tmp_path, capsys):
    store, hooks = str(tmp_path / "acts"), ["layers.1.mlp.input", "layers.1.mlp", "layers.2.mlp"]
    model, text = make_model(tmp_path / "model"), make_text(tmp_path / "text.jsonl")
    where = ["--text", str(text), "--hook", *hooks, "--seq-len", "32", "--heldout-tokens", "64"]
    assert main(["harvest", str(model), "--out", store, "--tokens", "600", *where]) == 0

    def notes(out: str, given: str, *more: str) -> list[str]:
        both = ["--hook", hooks[0], "--hook-out", given]
        capsys.readouterr()
        assert main(["train", store, *both, *SMALL, "--json", "--out", out, *more]) == 0
        return json.loads(capsys.readouterr().out)["notes"]

    first = str(tmp_path / "first")
    alike = notes(first, hooks[1])
    assert notes(str(tmp_path / "same"), hooks[1], "--init-from", first) == alike
    told, *rest = notes(str(tmp_path / "other"), hooks[2], "--init-from", first)
    assert rest == alike
    assert told.startswith(
        f"the SAE was trained at {hooks[1]}, these activations are of {hooks[2]}"
    )
