"""`wsae interpret` on a tiny model made here: results, controls, refusals in one line, and the report after it."""

import json
import re
from pathlib import Path

import pytest
import torch
from acts_models import make_model, make_text, make_tokenizer
from transformers import BertConfig, BertModel

from wsae.cli import interpret
from wsae.cli.main import main
from wsae.core.files import read_json
from wsae.evals.config import InterpretConfig

HOOK = "layers.1"
SMALL = (
    "--n-latents", "6", "--width", "8", "--min-windows", "3", "--n-score", "4", "--n-hard", "2",
    "--surprisal-latents", "3", "--draws", "50", "--device", "cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("cli-interpret")
    make_text(place / "text.jsonl", documents=200)
    make_model(place / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = make_tokenizer()
    BertModel(BertConfig(vocab_size=len(tokenizer), intermediate_size=32, **sizes)).save_pretrained(
        place / "encoder"
    )
    tokenizer.save_pretrained(place / "encoder")
    words = ["harvest", str(place / "model"), "--text", str(place / "text.jsonl"), "--hook", HOOK]
    words += ["--seq-len", "32", "--tokens", "1500", "--heldout-tokens", "700", "--device", "cpu"]
    assert main([*words, "--out", str(place / "acts")]) == 0
    words = ["train", str(place / "acts"), "--k", "3", "--expansion", "2", "--batch-size", "64"]
    words += ["--tokens", "3200", "--device", "cpu", "--out", str(place / "run"), "--alpha", "1"]
    assert main(words) == 0
    return place


def words(place: Path, *rest: str) -> list[str]:
    return ["interpret", str(place / "run"), "--encoder", str(place / "encoder"), *SMALL, *rest]


def test_members_and_controls_are_scored_without_an_llm_and_told_on_the_terminal(
    place, capsys
) -> None:
    assert main(words(place, "--controls", "all", "--out", str(place / "result.json"))) == 0
    text = capsys.readouterr().out
    controls = ("control-random", "control-neurons", "control-pca", "control-shuffled")
    for name in ("plain", "variance-a1", *controls):
        assert name in text
    assert "matched" in text
    assert ", n = " in text  # every score says how many latents it is over
    assert re.search(r"embedding: \d+ of \d+ sampled latents have a match .*\(chance 0\.\d", text)
    assert f"next: wsae report {place / 'run'}" in text
    record = read_json(place / "result.json")
    assert record == read_json(place / "run" / "interpretation" / "interpretation.json")
    assert record["judges"].keys() == {"embedding", "surprisal"}
    found = record["hooks"][HOOK]
    assert set(found["controls"]) == set(controls)
    for entry in (*found["members"].values(), *found["controls"].values()):
        assert entry["counts"]["sampled"] == entry["counts"]["scored"] + sum(
            entry["counts"]["skipped"].values()
        )
        assert 0 < entry["summary"]["embedding"]["n"] == entry["counts"]["scored"]
        assert entry["summary"]["surprisal"]["n"] <= 3
    for line in found["comparisons"]:
        assert (line["over"] == "matched") == ("cosine" in line)
        if line["over"] == "matched":
            assert line["n"] <= line["sampled"]
            assert line["cosine"] is None or -1 <= line["chance"] < line["cosine"] <= 1
    assert main(["report", str(place / "run"), "--out", str(place / "r.html")]) == 0
    assert "matched latents compared" in (place / "r.html").read_text()
    assert "Are the latents interpretable?" in (place / "r.html").read_text()


def test_the_same_command_again_reads_what_is_there(place, capsys) -> None:
    quick = words(place, "--score", "embedding", "--json")
    assert main(quick) == 0
    before = (place / "run" / "interpretation" / "manifest.json").stat().st_mtime_ns
    first = json.loads(capsys.readouterr().out)
    assert main(quick) == 0
    assert json.loads(capsys.readouterr().out) == first
    assert first["run"] == str(place / "run")
    assert (place / "run" / "interpretation" / "manifest.json").stat().st_mtime_ns == before


def test_the_model_with_random_weights_is_a_control_by_name(place, capsys) -> None:
    assert main(words(place, "--score", "embedding", "--controls", "random_model", "--json")) == 0
    found = json.loads(capsys.readouterr().out)["hooks"][HOOK]
    assert found["controls"]["control-random-model"]["counts"]["scored"] > 0
    assert not (place / "run" / "interpretation" / "random-model" / "store").exists()


def test_a_local_model_that_follows_no_instruction_gives_failures_and_no_scores(
    place, capsys
) -> None:
    local = ("--endpoint", f"local:{place / 'model'}", "--answers", str(place / "answers"))
    asked = ("--score", "detection", "--member", "plain", *local)
    assert main(words(place, *asked, "--dry-run")) == 0
    plan = capsys.readouterr().out
    assert "would be asked" in plan
    assert "total" in plan
    assert main(words(place, *asked)) == 0
    text = capsys.readouterr().out
    assert "requested = 0 parsed" in text
    record = read_json(place / "run" / "interpretation" / "interpretation.json")
    summary = record["hooks"][HOOK]["members"]["plain"]["summary"]["detection"]
    assert summary["value"] is None
    assert summary["explanations_failed"] == summary["explanations_requested"] > 0


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (("--score", "detection"), "score detection: asks a language model; name one with --endpoint"),
        (("--agreement",), "score detection: asks a language model"),
        (("--dry-run",), "no score asks a language model"),
        (("--score", "clairvoyance"), "--score: 'clairvoyance' is not one of"),
        (("--controls", "placebo"), "--controls: 'placebo' is not one of"),
        (("--hook", "layers.7"), "hook 'layers.7': the run has layers.1"),
        (("--member", "heavy"), "member 'heavy': the run has plain, variance-a1"),
        (("--n-latents", "0"), "--n-latents"),
        (("--score", "detection", "--endpoint", "ftp://x", "--model", "m"), "endpoint: not a URL"),
        (("--score", "detection", "--endpoint", "http://x/v1"), "model: empty"),
    ],
)  # fmt: skip
def test_bad_flags_end_in_one_line(extra, says, place, capsys) -> None:
    assert main(words(place, *extra)) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1
    assert err.startswith("wsae: error: ")


def test_an_array_s_run_has_no_text(tmp_path, capsys) -> None:
    import numpy as np

    x = np.random.default_rng(0).standard_normal((400, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    train = ["train", str(tmp_path / "x.npy"), "--out", str(tmp_path / "run"), "--k", "2"]
    train += ["--expansion", "2", "--batch-size", "64", "--tokens", "640", "--device", "cpu"]
    assert main(train) == 0
    capsys.readouterr()
    for score in ("embedding", "surprisal"):
        assert main(["interpret", str(tmp_path / "run"), "--score", score]) == 2
        assert "no text" in capsys.readouterr().err


def test_flags_become_the_settings() -> None:
    flags = interpret.Flags(run=Path("r"))
    assert interpret.config(flags) == InterpretConfig()
    flags = interpret.Flags(
        run=Path("r"), scoring=interpret.ScoringFlags(controls=("all", "random_model", "pca"))
    )
    assert interpret.config(flags).controls == (
        "random_sae", "neurons", "pca", "shuffled", "random_model",
    )  # fmt: skip
    llm = interpret.LlmFlags(endpoint="http://localhost:1/v1", model="m", budget_requests=7)
    asked = interpret.ScoringFlags(score=("embedding",))
    flags = interpret.Flags(run=Path("r"), agreement=True, scoring=asked, llm=llm)
    assert interpret.config(flags).scores == ("embedding", "surprisal", "detection")
    assert llm.config("cpu", 3).max_requests == 7


def test_ctrl_c_says_what_is_kept_and_how_to_go_on(place, monkeypatch, capsys) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("wsae.evals.interpret.run.score_all", stopped)
    command = words(place, "--score", "embedding", "--force")
    assert main(command) == 130
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith(
        "wsae: interrupted; finished scores and answers are kept; go on with: wsae "
    )
    assert err.endswith(" ".join(command))
