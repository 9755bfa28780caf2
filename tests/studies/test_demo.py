"""The main job from end to end on a tiny model and text made here."""

import json
from pathlib import Path

import pytest
from acts_models import make_model, make_text

from wsae.cli.main import main


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    place = tmp_path_factory.mktemp("demo")
    make_text(place / "text.jsonl", documents=200)
    make_model(place / "model")
    sizes = ("--tokens", "1500", "--heldout-tokens", "400", "--passes", "4", "--expansion", "2")
    rest = ("--k", "3", "--splice-tokens", "256", "--n-latents", "6", "--device", "cpu")
    data = ("--model", str(place / "model"), "--text", str(place / "text.jsonl"))
    return ["demo", "--out", str(place / "out"), *data, "--hook", "layers.1", *sizes, *rest]


def test_the_demo_compares_and_reports_and_then_skips_what_is_done(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 0
    said = capsys.readouterr()
    assert "This demo" in said.err
    assert "report.html" in said.out
    out = Path(words[2])
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}
    assert main([*words, "--json"]) == 0
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")} == before
    result = json.loads(capsys.readouterr().out)
    (members,) = (hook["members"] for hook in result["hooks"].values())
    assert [n for n in members if not n.startswith("control")] == [
        "plain",
        "variance-a1",
        "variance-a0.5",
    ]
    for metric in ("fvu", "fvu_weighted", "l0", "ce_delta", "kl"):
        assert members["plain"]["metrics"][metric]["value"] is not None
    assert "variance-a1" in Path(result["report"]).read_text()


def test_another_config_in_the_same_place_is_refused_and_changes_nothing(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(words[2])
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert main([*words, "--k", "2"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("wsae: error:")
    assert "another config" in error
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
