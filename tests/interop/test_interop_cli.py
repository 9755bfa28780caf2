"""`wsae export`, `wsae import` and `wsae push` on a run of two SAEs, and the hub's protocol on a loopback port."""

import contextlib
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from interop_hub import serving
from test_interop_roundtrip import make, same_bits
from test_releases import llama

from wsae import SAE, UserError
from wsae.acts.source import ArraySource, open_source
from wsae.cli.live import reopen
from wsae.cli.main import main
from wsae.core.artifact import record
from wsae.core.files import locked, seal
from wsae.core.hub import LLAMA_CONFIG, LLAMA_WEIGHTS, HubPlace, hub_place
from wsae.evals.compare import read_evaluation
from wsae.evals.config import EvalConfig
from wsae.evals.run import evaluate_run, run_subject
from wsae.interop import Provenance, load, save
from wsae.interop.config import SourceName
from wsae.interop.saes import about_member, about_sae, choose
from wsae.run import Run
from wsae.sae import GroupTopK, TopK
from wsae.sae.config import GammaConfig, SAEConfig
from wsae.train.config import MemberConfig, TrainConfig
from wsae.train.run import load_run, train_run

FIXTURES = Path(__file__).parents[1] / "fixtures" / "interop"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of three small SAEs on an array, evaluated."""
    place = tmp_path_factory.mktemp("interop")
    x = np.random.default_rng(0).normal(size=(600, 6)).astype(np.float32)
    np.save(place / "acts.npy", x)
    members = (
        MemberConfig(d_sae=16, activation=TopK(k=4), label="plain"),
        MemberConfig(
            d_sae=16,
            activation=TopK(k=4),
            gamma=GammaConfig(rule="variance", alpha=1.0),
            label="weighted",
        ),
        MemberConfig(d_sae=16, activation=GroupTopK(k=4), label="grouped"),
    )
    cfg = TrainConfig(members=members, tokens=640, batch_size=64)
    source = open_source(place / "acts.npy")
    train_run(cfg, source, place / "run")
    evaluate_run(place / "run", source, EvalConfig(draws=20, n_latents=0, splice_tokens=0))
    return place / "run"


def told(capsys, words: list[str]) -> dict:
    assert main([*words, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def failed(capsys, words: list[str]) -> str:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def member(run: Path, name: str) -> Path:
    return run / "members" / "acts" / name


@pytest.mark.parametrize("name", ["saelens", "dictionary_learning", "sparsify"])
def test_export_and_import_give_the_member_back(run, tmp_path, capsys, name):
    out, back = tmp_path / "theirs", tmp_path / "ours"
    words = ["export", str(run), "--member", "weighted", "--format", name, "--out", str(out)]
    (entry,) = told(capsys, words)["written"]
    assert entry["new"]
    found = told(capsys, ["import", str(out), "--out", str(back)])
    assert found["format"] == name
    assert found["provenance"]["member"] == "weighted"
    assert found["provenance"]["gamma"]["rule"] == "variance"
    assert found["provenance"]["metrics"]["fvu"]["value"] > 0
    assert found["provenance"]["inputs"].keys() == {"data", "run"}
    trained = SAE.load(member(run, "weighted"))
    assert same_bits(SAE.load(back), trained)
    again = tmp_path / "again"
    told(capsys, ["export", str(back), "--format", name, "--out", str(again)])
    assert load(again).about == load(out).about  # what is known survives the way through
    for file in out.iterdir():
        if file.name not in ("manifest.json", ".lock"):
            assert (again / file.name).read_bytes() == file.read_bytes()


def test_nothing_is_written_over_unasked(run, tmp_path, capsys):
    out = tmp_path / "theirs"
    words = ["export", str(run), "--member", "plain", "--out", str(out)]
    told(capsys, words)
    assert told(capsys, words)["written"][0]["new"] is False
    other = ["export", str(run), "--member", "weighted", "--out", str(out)]
    assert "--force" in failed(capsys, other)
    assert told(capsys, [*other, "--force"])["written"][0]["new"] is True
    to_dl = [*other, "--format", "dictionary_learning"]
    assert "--force" in failed(capsys, to_dl)
    told(capsys, [*to_dl, "--force"])
    assert not (out / "cfg.json").exists()  # nothing of the other format is left
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for command in (["export", str(member(run, "plain"))], ["import", str(out)]):
        words = [*command, "--out", str(tmp_path / "mine"), "--force"]
        assert "is not empty" in failed(capsys, words)
    assert (tmp_path / "mine" / "thesis.txt").exists()
    back = ["import", str(out), "--out", str(tmp_path / "sae")]
    assert told(capsys, back)["new"] is True
    assert told(capsys, back)["new"] is False


@pytest.mark.parametrize("command", ["export", "import", "push"])
def test_the_same_command_goes_on_after_one_that_was_cut_off(
    run, tmp_path, capsys, monkeypatch, command
):
    """Whatever was written so far; a folder of somebody else's with the same names is left alone."""
    out = tmp_path / "out"
    words = {
        "export": ["export", str(run), "--member", "plain", "--format", "saelens"],
        "import": ["import", str(FIXTURES / "saelens-topk")],
        "push": ["push", str(run), "a/b", "--member", "plain", "--dry-run"],
    }[command] + ["--out", str(out)]
    found = told(capsys, [*words[:-1], str(tmp_path / "whole")])
    whole = {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()}
    replace = os.replace
    for at in range(len(whole) - 1):
        calls = []

        def full(path, process, at=at, calls=calls):
            calls.append(path)
            if len(calls) > at:
                raise OSError(errno.ENOSPC, "no space")
            return replace(path, process)

        monkeypatch.setattr("wsae.core.files.os.replace", full)
        assert "the disk is full" in failed(capsys, words)
        monkeypatch.undo()
        assert len([p for p in out.iterdir() if not p.name.startswith(".")]) <= at
        assert list(out.glob(".unfinished-*"))
        again = told(capsys, words)
        assert again.keys() == found.keys()
        assert {p.name: p.read_bytes() for p in out.iterdir()} == whole
        shutil.rmtree(out)
    shutil.copytree(tmp_path / "whole", out)
    kind = {"export": "export", "import": "sae", "push": "hub-folder"}[command]
    (out / f".unfinished-{kind}").touch()  # killed between the manifest and the end
    told(capsys, words)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == whole
    (out / "manifest.json").unlink()
    (out / "wsae.json").unlink(missing_ok=True)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    assert "is not empty and holds no wsae" in failed(capsys, words)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_a_push_writes_over_a_push_and_over_no_run(run, tmp_path, capsys):
    words = ["push", str(run), "a/b", "--member", "plain", "--dry-run", "--out"]
    told(capsys, [*words, str(tmp_path / "out")])
    told(capsys, [*words, str(tmp_path / "out")])
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "wsae.json").write_text("{}")
    assert "holds no wsae sae" in failed(capsys, [*words, str(tmp_path / "run")])
    assert (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("command", ["export", "push"])
def test_a_second_process_in_the_same_folder_is_refused(run, tmp_path, capsys, command):
    words = {
        "export": ["export", str(run), "--format", "saelens"],
        "push": ["push", str(run), "a/b", "--dry-run"],
    }[command] + ["--member", "plain", "--out", str(tmp_path / "out")]
    with locked(tmp_path / "out"):
        assert "another wsae process is writing here" in failed(capsys, words)
    told(capsys, words)


def test_all_members_and_the_ones_left_out(run, tmp_path, capsys):
    found = told(capsys, ["export", str(run), "--all", "--out", str(tmp_path / "all")])
    assert [entry["sae"] for entry in found["written"]] == ["acts/plain", "acts/weighted"]
    (left,) = found["refused"]
    assert left["sae"] == "acts/grouped"
    assert "sparsify" in left["reason"]
    assert load(tmp_path / "all/acts/plain").format == "saelens"
    assert main(["export", str(run), "--all", "--out", str(tmp_path / "all")]) == 0
    shown = capsys.readouterr().out
    assert "left out acts/grouped" in shown
    assert "already there" in shown


def refused(place: Path) -> str:
    with pytest.raises(UserError) as caught:
        SAE.load(place)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_load_says_how_whatever_else_becomes_an_sae(run, tmp_path):
    layouts = [*FIXTURES.glob("*-topk"), tmp_path]
    save(SAE.load(member(run, "plain")), tmp_path / "export", "saelens")
    np.savez(tmp_path / "params.npz", W_enc=np.zeros((4, 8)))
    for place in (*layouts, tmp_path / "export", tmp_path / "params.npz"):
        said = refused(place)
        assert f"wsae import {place} --out DIR" in said
        assert "wsae.interop.load(" in said
        assert "make it again" not in said
    assert "members/HOOK/NAME" in refused(run)
    assert "no such directory" in refused(tmp_path / "nowhere")
    weights = member(run, "plain") / "sae.safetensors"
    assert same_bits(SAE.load(weights), SAE.load(weights.parent))
    with pytest.raises(
        UserError, match="is a wsae run; give one of its SAEs, for example .*members"
    ):
        load(run)


def test_the_help_of_import_names_every_format_it_reads(capsys):
    assert main(["import", "--help"]) == 0
    said = re.findall(r"\w+", capsys.readouterr().out)
    assert set(get_args(SourceName)) <= set(said)


def test_what_import_has_to_say_is_printed_and_kept(tmp_path, capsys):
    shutil.copytree(FIXTURES / "sparsify-topk", tmp_path / "layers.3.mlp")
    config = json.loads((tmp_path / "layers.3.mlp/cfg.json").read_text())
    (tmp_path / "layers.3.mlp/cfg.json").write_text(json.dumps(config | {"novelty": False}))
    words = ["import", str(tmp_path / "layers.3.mlp"), "--out", str(tmp_path / "ours")]
    assert main(words) == 0
    assert "novelty = False" in capsys.readouterr().err
    about = load(tmp_path / "ours").about
    assert about.hook == "layers.3.mlp"  # sparsify says it in the folder's name alone
    assert "novelty" in about.notes[0]


WRONG = (1e308, [], {}, None, "x", 10**40, float("nan"), -1, True, [[]], {"a": 1})


def places(value: object, place: tuple = ()) -> list[tuple]:
    """Return the way to every value of a JSON document (of lists: to the first)."""
    if isinstance(value, dict):
        inner = [way for key, item in value.items() for way in places(item, (*place, key))]
    else:
        inner = places(value[0], (*place, 0)) if isinstance(value, list) and value else []
    return [place, *inner]


def altered(value, place: tuple, new: object):
    """Return a JSON document with another value at one place."""
    if not place:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[place[0]] = altered(value[place[0]], place[1:], new)
    return copy


def sealed(top: Path, name: str, content: object) -> None:
    """Write a file below `top` and every manifest that speaks of it, so that all checksums are right."""
    file = top / name
    own = file.name == "manifest.json" and isinstance(content, dict)
    file.write_text(json.dumps(seal(content) if own else content))
    for folder in (p for p in file.parents if p.is_relative_to(top)):
        place = folder / "manifest.json"
        data = json.loads(place.read_text()) if place.is_file() and place != file else {}
        changed = {
            inside: record(folder / inside).to_dict()
            for inside in data.get("files", {})
            if (folder / inside).is_file()
        }
        if changed:
            rest = {key: item for key, item in data.items() if key != "checksum"}
            place.write_text(json.dumps(seal(rest | {"files": changed})))


@pytest.mark.parametrize(
    ("name", "readers"),
    [
        ("manifest.json", (load_run, partial(choose, every=True))),
        ("config.json", (run_subject, partial(choose, every=True), partial(reopen, device="cpu"))),
        ("gamma.json", (run_subject, partial(choose, every=True))),
        ("evaluation/evaluation.json", (read_evaluation, partial(choose, every=True))),
        ("evaluation/manifest.json", (read_evaluation,)),
        ("members/acts/weighted/config.json", (load_run,)),
        ("members/acts/weighted/manifest.json", (load_run,)),
        ("sae/provenance.json", (load,)),
        ("sae/config.json", (load,)),
        ("export/manifest.json", (load,)),
    ],
)
def test_sealed_files_of_another_form_are_bad_input_and_no_accident(run, tmp_path, name, readers):
    """Every place of every file once, with values of wrong types in turn."""
    about = load(member(run, "weighted"))
    Run.of_sae(about.sae, tmp_path / "sae", Provenance.of(member(run, "weighted")))
    save(about.sae, tmp_path / "export", "saelens")
    alone = name.split("/")[0] in ("sae", "export")
    top = tmp_path / name.split("/")[0] if alone else Path(shutil.copytree(run, tmp_path / "run"))
    inside = name.split("/", 1)[1] if alone else name
    kept = {p: p.read_bytes() for p in top.rglob("*.json")}
    good = json.loads((top / inside).read_text())
    good.pop("checksum", None)
    ways = places(good)
    said = []
    for i, way in enumerate(ways[:: max(1, len(ways) // 40)]):
        sealed(top, inside, altered(good, way, WRONG[i % len(WRONG)]))
        for reader in readers:
            with contextlib.suppress(UserError):  # anything else fails the test
                reader(top)
                continue
            said.append(way)
        for file, content in kept.items():
            file.write_bytes(content)
    assert said


def test_bad_requests_end_in_one_line(run, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    assert "3 SAEs fit" in failed(capsys, ["export", str(run), *out])
    assert "nearest: weighted" in failed(capsys, ["export", str(run), "--member", "weigted", *out])
    assert "single SAE" in failed(capsys, ["export", str(member(run, "plain")), "--all", *out])
    assert "no equal" in failed(capsys, ["export", str(run), "--member", "grouped", *out])
    assert "no such run" in failed(capsys, ["export", str(tmp_path / "no"), *out])
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert "this is a model; an SAE or" in failed(capsys, ["compare", str(tmp_path)])
    assert "this is a wsae evaluation" in failed(capsys, ["export", str(run / "evaluation"), *out])
    assert "already" in failed(capsys, ["import", str(member(run, "plain")), *out])
    assert "owner/name" in failed(capsys, ["push", str(run), "name", "--dry-run", *out])
    assert not (tmp_path / "out").exists()


def test_a_folder_for_the_hub_without_network(run, tmp_path, capsys):
    out = tmp_path / "folder"
    found = told(capsys, ["push", str(run), "somebody/saes", "--dry-run", "--out", str(out)])
    assert found["url"] is None
    assert set(found["files"]) == {
        str(p.relative_to(out)) for p in out.rglob("[!.]*") if p.is_file()
    }
    card = (out / "README.md").read_text()
    front = card.split("---")[1]
    assert "library_name: wsae" in front
    for words in ("hub:somebody/saes/acts/plain", "variance", "FVU", "group_topk", "digest of run"):
        assert words in card
    assert str(run.parent) not in "".join(p.read_text() for p in out.rglob("*.json")) + card
    for name in ("plain", "weighted", "grouped"):
        there = SAE.load(out / "acts" / name)
        assert same_bits(there, SAE.load(member(run, name)))
    again = told(capsys, ["push", str(run), "somebody/saes", "--dry-run", "--out", str(out)])
    assert again["files"] == found["files"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").write_text("a")
    words = ["push", str(run), "a/b", "--dry-run", "--out", str(tmp_path / "mine")]
    assert "holds no wsae hub folder" in failed(capsys, words)


def test_a_hostile_name_cannot_leave_its_place_in_the_card(tmp_path):
    from wsae.interop.card import card

    Run.of_sae(make("topk"), tmp_path)
    from wsae.core.artifact import read_manifest

    about = Provenance(model='a/b"\n- evil: true', hook="<script>|x\n# title")
    text = card("me/x", {"": read_manifest(tmp_path, "sae")}, {"": about})
    assert "\n- evil" not in text
    assert "<script>" not in text
    assert "\n# title" not in text


@pytest.mark.parametrize(
    ("cfg", "noun", "form", "gives"),
    [
        ({}, "sparse autoencoder", "saelens", "x_hat = sae(x)           # [batch, d_in]"),
        ({"d_out": 4}, "transcoder", "sparsify", "y_hat = sae(x)           # [batch, d_out]"),
        (
            {"sources": [{"name": "a", "width": 2}, {"name": "b", "width": 2}]},
            *("crosscoder", "crosscoder", "x_hat = sae(x)           # [batch, d_in]"),
        ),
    ],
)
def test_the_card_says_what_it_is_of_and_names_formats_that_have_its_like(
    cfg, noun, form, gives, tmp_path
):
    from wsae.core.artifact import read_manifest
    from wsae.interop.card import card
    from wsae.interop.saes import KINDS, takers

    made = {"d_in": 4, "d_sae": 8, "activation": {"kind": "relu"}, **cfg}
    if noun != "sparse autoencoder":
        made["activation"] = {"kind": "topk" if form == "sparsify" else "batch_topk", "k": 2}
    sae = SAE(SAEConfig.parse(made, where="test"))
    about = Provenance(model="m", hook="h", hook_out="o" if noun == "transcoder" else None)
    sae.save(tmp_path / "sae", about)
    manifest = read_manifest(tmp_path / "sae", "sae")
    text = card("me/x", {"": manifest}, {"": about}, takers(sae, about))
    assert f"A {noun} trained on activations of m at h" in text
    assert ("which gives those of o" in text) == (noun == "transcoder")
    assert gives in text
    assert f"--format {form} --out DIR`" in text
    KINDS[form].pack(sae, about)  # it has an equal there


def test_the_card_names_no_format_that_refuses_the_sae(tmp_path):
    from wsae.interop.card import write_folder

    sources = [{"name": "a", "width": 2}, {"name": "b", "width": 2}]
    made = {"d_in": 4, "d_sae": 8, "activation": {"kind": "topk", "k": 2}, "sources": sources}
    SAE(SAEConfig.parse(made, where="test")).save(tmp_path / "sae")
    write_folder(choose(tmp_path / "sae"), tmp_path / "hub", "me/x")
    text = (tmp_path / "hub" / "README.md").read_text()
    assert "No other tool has its equal." in text
    assert "--format" not in text


def test_addresses_on_the_hub():
    assert hub_place("hub:a/b") == HubPlace("a/b", None, "")
    assert hub_place(Path("hub:a/b@v1/layers.3/plain/")) == HubPlace("a/b", "v1", "layers.3/plain")
    assert hub_place("runs/first") is None
    for bad in ("hub:a", "hub:a/b/../../x", "hub:a/b/*", "hub:a b/c", "hub:a/b@x y"):
        with pytest.raises(UserError, match="hub:"):
            hub_place(bad)


SCRIPT = """
import contextlib, io, json, sys
from wsae.cli.main import main
for words in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""


def elsewhere(commands: list[list[str]], **environment: str) -> list[tuple[int, str, str]]:
    """Run commands in a process of its own: the hub's library reads its address and cache once."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | environment
    env |= {"NO_PROXY": "*", "no_proxy": "*", "HF_HUB_DISABLE_XET": "1"}
    line = [sys.executable, "-c", SCRIPT, json.dumps(commands)]
    done = subprocess.run(line, env=env, capture_output=True, text=True, check=True, timeout=250)
    return [tuple(json.loads(text)) for text in done.stdout.splitlines()]


def test_pushed_and_loaded_through_the_hubs_protocol(run, tmp_path):
    where = {"HF_HOME": str(tmp_path / "cache"), "HF_TOKEN": "hf_secret"}
    repo, out, no = "somebody/saes", str(tmp_path / "out"), str(tmp_path / "no")
    with serving() as hub:
        hub.repos[repo] = {"acts/plain/evil.pt": b"pickle"}
        hub.flipped = {"acts/weighted/sae.safetensors"}
        about = {"id": "public/saes", "private": False, "tags": [], "siblings": []}
        hub.instead = {
            "public": (200, json.dumps(about).encode()),
            "proxied": (200, b"<html>"),
            "locked": (403, b'{"error": "gated"}'),
        }
        pushed, fetched, several, nothing, altered, *odd = elsewhere(
            [
                ["push", str(run), repo, "--private", "--json"],
                ["export", f"hub:{repo}/acts/plain", "--out", out],
                ["export", f"hub:{repo}", "--out", no],
                ["export", "hub:somebody/nothing", "--out", no],
                ["export", f"hub:{repo}/acts/weighted", "--out", no],
                ["export", "hub:proxied/saes", "--out", no],
                ["push", str(run), "proxied/saes"],
                ["push", str(run), "public/saes", "--private"],
                ["export", "hub:locked/saes", "--out", no],
            ],
            **where,
            HF_ENDPOINT=hub.url,
        )
    assert pushed[0] == 0, pushed
    there = hub.repos[repo]
    assert set(there) == {*json.loads(pushed[1])["files"], "acts/plain/evil.pt"}
    asked = hub.created[repo]
    assert asked.get("visibility") == "private" or asked.get("private") is True
    assert hub.tokens == {"Bearer hf_secret", None}  # none: the card is checked without
    assert not any(b"hf_secret" in content for content in there.values())
    assert fetched[0] == 0, fetched
    names = ("config.json", "manifest.json", "provenance.json", "sae.safetensors")
    assert {p for p in hub.fetched if "plain" in p} == {f"acts/plain/{name}" for name in names}
    assert same_bits(load(out).sae, SAE.load(member(run, "plain")))
    assert load(out).about.member == "plain"
    reasons = ("acts/plain, acts/weighted", "not to be had from the hub", "checksum differs",
               "JSONDecodeError", "not sent to the hub (JSONDecodeError", "and public", "403")  # fmt: skip
    for (code, _, error), reason in zip((several, nothing, altered, *odd), reasons, strict=True):
        assert (code, error.count("\n")) == (2, 1), error
        assert reason in error
    later, *refused = elsewhere(
        [
            ["export", f"hub:{repo}/acts/plain", "--out", str(tmp_path / "later")],
            ["export", "hub:a/b", "--out", no],
            ["push", str(run), "a/b"],
        ],
        **where,
        HF_ENDPOINT=hub.url,
        HF_HUB_OFFLINE="1",
    )
    assert later[0] == 0, later  # from the cache, without a hub
    assert same_bits(load(tmp_path / "later").sae, load(out).sae)
    for code, _, error in refused:
        assert (code, error.count("\n")) == (2, 1), error
    assert not Path(no).exists()


def test_weights_that_lie_in_a_folder_below_are_fetched_too(tmp_path):
    """Llama Scope's, of which `hub:` names the folder above."""
    llama(tmp_path / "it")
    files = {p: (tmp_path / "it" / p).read_bytes() for p in (LLAMA_CONFIG, LLAMA_WEIGHTS)}
    with serving() as hub:
        hub.repos["fnlp/scope"] = {f"L0R/{name}": data for name, data in files.items()}
        hub.repos["fnlp/scope"]["L0R/checkpoints/early.safetensors"] = b"not wanted"
        where = {"HF_HOME": str(tmp_path / "cache"), "HF_ENDPOINT": hub.url}
        words = ["import", "hub:fnlp/scope/L0R", "--out", str(tmp_path / "run")]
        ((code, _, error),) = elsewhere([words], **where)
    assert code == 0, error
    assert set(hub.fetched) == {f"L0R/{name}" for name in files}


def test_push_without_a_token_says_so(run, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    words = ["push", str(run), "somebody/saes", "--out", str(tmp_path / "folder")]
    assert "HF_TOKEN" in failed(capsys, words)
    monkeypatch.setenv("HF_TOKEN", "hf_sécret")
    assert "hf_" not in failed(capsys, words).replace("HF_TOKEN", "")


def test_an_altered_run_is_not_exported(run, tmp_path, capsys):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    words = ["export", str(copy), "--member", "plain", "--out", str(tmp_path / "out")]
    names = ("gamma.json", "config.json", "evaluation/evaluation.json")
    inside = ("manifest.json", "config.json", "sae.safetensors")
    for name in (*names, *(f"members/acts/plain/{file}" for file in inside)):
        content = (copy / name).read_bytes()
        flipped = bytearray(content)
        flipped[-3] ^= 1
        (copy / name).write_bytes(bytes(flipped))
        assert Path(name).name in failed(capsys, words)
        (copy / name).write_bytes(content)
    assert main(words) == 0


def test_an_imported_sae_is_evaluated_like_any_other(run, tmp_path, capsys):
    import wsae

    trained = SAE.load(member(run, "weighted"))
    folder = save(trained, tmp_path / "a", "saelens")
    for ours in ("manifest.json", "wsae.safetensors"):
        (folder / ours).unlink()
    assert main(["import", str(folder), "--out", str(tmp_path / "b")]) == 0
    words = ["evaluate", str(tmp_path / "b"), "--draws", "20", "--device", "cpu"]
    assert "--source" in failed(capsys, words)
    scored = told(capsys, [*words, "--source", str(run.parent / "acts.npy")])["hooks"]["acts"][
        "members"
    ]
    record = json.loads((run / "evaluation/evaluation.json").read_text())["hooks"]["acts"][
        "members"
    ]
    for key in ("fvu", "l0", "dead_frac"):  # the same held-out rows as the run's own evaluation
        there = record["weighted"]["metrics"][key]["value"]
        assert scored["sae"]["metrics"][key]["value"] == pytest.approx(there, rel=1e-6)
    x = torch.from_numpy(np.load(run.parent / "acts.npy"))
    cfg = EvalConfig(draws=20, n_latents=0)
    ours, theirs = (
        wsae.evaluate(s, x, cfg)["metrics"] for s in (trained, SAE.load(tmp_path / "b"))
    )
    for key in ("fvu", "l0", "dead_frac"):
        assert ours[key]["value"] == pytest.approx(theirs[key]["value"], rel=1e-6)


def test_a_member_named_like_a_folder_in_a_folder_is_of_its_run(tmp_path):
    rows = np.random.default_rng(0).normal(size=(400, 8)).astype("float32")
    members = (MemberConfig(d_sae=8, activation=TopK(k=2), label="a/b"),)
    cfg = TrainConfig(members=members, tokens=450, batch_size=100)  # four steps
    train_run(cfg, ArraySource(rows, name="acts"), tmp_path / "run")
    place = tmp_path / "run" / "members" / "acts" / "a" / "b"
    about = about_sae(place)
    assert (about.hook, about.member, about.tokens) == ("acts", "a/b", 400)
    assert about == about_member(Run(tmp_path / "run"), "acts", "a/b")
