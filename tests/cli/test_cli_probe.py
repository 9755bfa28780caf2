"""`wsae probe`: a run, one SAE, labelled text, and what cannot be probed."""

import json
import re
import shutil

import pytest
from acts_models import make_model

from wsae.cli.main import main
from wsae.run import Run

ANIMALS, PLACES = "the cat saw two dogs", "rain fell over green hills"
SMALL = ("--least", "8", "--draws", "50", "--k", "1", "4", "--device", "cpu", "--ablated", "2")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, labelled text, a store and a run of two members."""
    place = tmp_path_factory.mktemp("probe")
    rows = [
        {"text": f"{(ANIMALS, PLACES)[i % 2]} {'on a mat ' * (i % 5)}", "kind": i % 2, "n": i % 3}
        for i in range(120)
    ]
    (place / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_model(place / "model")
    harvest = ["--text", str(place / "text.jsonl"), "--hook", "layers.1", "--seq-len", "32"]
    harvest += ["--tokens", "900", "--heldout-tokens", "500", "--heldout-fraction", "0.4"]
    train = ["--k", "2", "--expansion", "2", "--batch-size", "64", "--tokens", "640"]
    device = ["--device", "cpu"]
    store, run = str(place / "acts"), str(place / "run")
    assert main(["harvest", str(place / "model"), "--out", store, *harvest, *device]) == 0
    assert main(["train", store, "--out", run, "--alpha", "0.5", *train, *device]) == 0
    return place


def test_a_run_is_probed_with_rules_and_with_labels_and_reported(place, capsys):
    run = str(place / "run")
    assert main(["probe", run, *SMALL]) == 0
    said = capsys.readouterr().out
    assert "Sparse probe, latents: 4" in said
    assert "left out: month" in said
    text = ["--text", str(place / "text.jsonl"), "--label", "kind"]
    assert main(["probe", run, *text, *SMALL, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    hook = found["documents"]["hooks"]["layers.1"]
    assert set(hook["members"]) == {"plain", "variance-a0.5"}
    assert set(hook["controls"]) == {"activations", "control-random"}
    assert hook["tasks"] == ["0", "1"]
    assert hook["members"]["plain"]["summary"]["probe_all"]["value"] > 0.9
    assert found["documents"]["counts"]["documents"] == 120
    kept = Run(run).probing_record
    assert list(kept) == ["tokens", "documents"]  # the rules of before are still there
    plain = kept["documents"]["hooks"]["layers.1"]["members"]["plain"]
    assert plain["summary"]["tpp_2"]["value"] is not None
    assert main(["evaluate", run, "--draws", "50", "--n-latents", "0", "--device", "cpu"]) == 0
    capsys.readouterr()
    shutil.copytree(run, place / "again")
    assert main(["compare", run, str(place / "again"), "--json"]) == 0
    itself = json.loads(capsys.readouterr().out)["probing"]["documents"]["layers.1"]
    assert {line["metric"] for line in itself} >= {"probe_1", "tpp_2"}
    assert all(line["difference"] == 0 for line in itself)
    renamed = place / "renamed.jsonl"  # as many classes and documents, of other names
    renamed.write_text((place / "text.jsonl").read_text().replace('"kind": 1', '"kind": "b"'))
    other = ["--text", str(renamed), "--label", "kind"]
    assert main(["probe", str(place / "again"), *other, *SMALL]) == 0
    capsys.readouterr()
    assert main(["compare", run, str(place / "again"), "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["probing"]) == ["tokens"]
    assert main(["compare", run]) == 0
    assert "layers.1, probes of tokens: differences" in capsys.readouterr().out
    assert main(["report", run, "--out", str(place / "run.html")]) == 0
    page = (place / "run.html").read_text()
    assert "Do a few latents tell classes apart?" in page
    assert "Labelled documents: 2 classes, 120 documents" in page
    assert re.search(r"Sparse probe, latents: 4", page)


def test_a_class_may_have_a_single_token(place, capsys):
    """And a letter no word to test on: it is left out."""
    words = ["--least", "1", "--draws", "10", "--k", "1", "--device", "cpu"]
    sae = str(place / "run" / "members" / "layers.1" / "plain")
    assert main(["probe", sae, "--source", str(place / "acts"), *words, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["tokens"]["hooks"].values()
    assert found["tasks"]


def test_one_sae_is_probed_where_it_lies(place, capsys):
    sae = str(place / "run" / "members" / "layers.1" / "plain")
    assert main(["probe", sae, "--source", str(place / "acts"), *SMALL, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["tokens"]["hooks"]["layers.1"]["members"]) == {"sae"}


ROLES = ["--roles", "assistant"]
WHOLE = "--roles assistant: labelled documents are read whole"


@pytest.mark.parametrize(
    ("label", "says"), [([], "has no chat template"), (["--label", "kind"], WHOLE)]
)
def test_what_roles_say_is_probed_for_one_sae_on_a_text(place, label, says, capsys):
    sae = str(place / "run" / "members" / "layers.1" / "plain")
    text = ["--text", str(place / "text.jsonl"), "--model", str(place / "model")]
    assert main(["probe", sae, *text, *ROLES, *label, *SMALL]) == 2
    assert says in capsys.readouterr().err.strip().splitlines()[-1]


WRONG = {
    "roles": (ROLES, "--roles: goes with --text"),
    "no text": (["--label", "kind"], "--label kind: goes with --text"),
    "no label": (["--text", "text.jsonl"], "needs --label"),
    "no column": (
        ["--text", "text.jsonl", "--label", "kin"],
        "no field 'kin' (nearest: kind); see --label",
    ),
    "one class": (["--text", "one.jsonl", "--label", "kind"], "only one class ('0')"),
    "few": (
        ["--text", "text.jsonl", "--label", "kind", "--least", "90"],
        "fewer than two classes have 270 documents",
    ),
    "no second": (
        ["--text", "text.jsonl", "--label", "kind", "--spurious", "kind"],
        "the second label: no two of its values",
    ),
    "rules": (["--least", "4000"], "no task has 4000 tokens"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_cannot_be_probed_is_one_line(place, kind, capsys):
    words, says = WRONG[kind]
    one = [line for line in (place / "text.jsonl").read_text().splitlines() if '"kind": 0' in line]
    (place / "one.jsonl").write_text("\n".join(one) + "\n")
    words = [str(place / word) if word.endswith(".jsonl") else word for word in words]
    given = [] if "--least" in words else ["--least", "8"]
    assert main(["probe", str(place / "run"), *words, *given, "--device", "cpu"]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert says in told[-1]
