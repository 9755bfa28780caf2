"""Sealed files that hold what wsae never writes: the report and the index are made, or refused in one line."""

import json
from pathlib import Path

import numpy as np
import pytest
import report_fixture
import torch
from report_fixture import write_interpretation, write_run
from report_text import Shape
from report_wrong import WRONG, every_spoiled

from wsae.core.artifact import write_manifest
from wsae.core.errors import UserError
from wsae.core.files import write_json
from wsae.core.tensors import load_tensors, save_tensors
from wsae.report.html import write_report
from wsae.report.rundata import finite
from wsae.sae import SAE
from wsae.sae.config import SAEConfig
from wsae.serve.build import ensure_index
from wsae.serve.config import IndexConfig
from wsae.serve.index import Index

HOOK, D_SAE = "layers.9", 16
SHAPE = Shape(hooks=(HOOK,), d_in=8, d_sae=D_SAE, latents=2, contexts=1, window=3, steps=2)
CFG = IndexConfig(neighbours=2, logits=0)
EVERY = 19
"""Of the places of a file, which share is tried; the wrong values take turns."""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small run with every part."""
    monkeypatch.setattr(report_fixture, "MEMBERS", {"plain": 0.0, "variance-a1": 1.0})
    path = write_interpretation(write_run(tmp_path / "run", SHAPE), latents=2)
    place = path / "interpretation" / "contexts.json"
    contexts = json.loads(place.read_text())
    for entry in contexts[HOOK]["plain"]:
        entry["latent"] %= D_SAE
    place.write_text(json.dumps(contexts))
    seal(path, "interpretation")
    write_classes(path / "classes")
    return path


def write_classes(place: Path) -> None:
    metric = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 3}
    member = {
        "scores": {"consistency_top": metric},
        "coverage": {"latents": D_SAE, "alive": 0.9, "supported": 0.5, "top": 0.3},
        "density": {"0.5": 0.1},
    }
    names = {"a": "variance-a1", "b": "plain", "metric": "consistency_top", "over": "matched"}
    compared = {**names, "difference": 0.1, "low": 0.05, "high": 0.2, "n": 10, "unit": "latent"}
    hook = {
        "config": {"min_support": 5},
        "members": {"plain": member, "variance-a1": member},
        "controls": {"control-random": member},
        "comparisons": [compared],
    }
    told = {"name": "C", "formula": "f", "direction": "higher is better"}
    write_json(
        place / "classes.json", {"hooks": {HOOK: hook}, "glossary": {"consistency_top": told}}
    )
    arrays = {f"{HOOK}|plain|consistency_top": torch.rand(D_SAE)}
    save_tensors(place / "arrays.safetensors", arrays)
    seal(place.parent, "classes")


def seal(run: Path, part: str) -> None:
    if not part:
        write_manifest(run, "run", {}, ["config.json", "gamma.json", "metrics.jsonl"])
        return
    names = [path.name for path in (run / part).iterdir() if path.name != "manifest.json"]
    write_manifest(run / part, part, {}, names)


def tried(run: Path, what: str) -> int:
    """Make the report and the index; return how many were refused. Anything but a UserError of one line fails."""
    refused = 0
    for make in (write_report, lambda run: Index(ensure_index(run, None, CFG)[0])):
        try:
            make(run)
        except UserError as error:
            refused += 1
            if str(run) not in str(error) or len(str(error)) > 700:
                raise AssertionError(f"{what}: names no file: {error}") from error
        except Exception as error:
            raise AssertionError(f"{what}: {error!r}") from error
    return refused


FILES = [
    ("evaluation", "evaluation.json"), ("evaluation", "contexts.json"), ("interpretation", "interpretation.json"),
    ("interpretation", "contexts.json"), ("classes", "classes.json"), ("", "config.json"), ("", "gamma.json"),
    ("", "metrics.jsonl"),
]  # fmt: skip


@pytest.mark.parametrize(("part", "name"), FILES)
def test_a_wrong_value_anywhere_is_lived_with_or_refused_in_one_line(
    run: Path, part: str, name: str
):
    place, lines = run / part / name, name.endswith("jsonl")
    text = place.read_text()
    value = [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)
    assert tried(run, "as it is written") == 0

    def write(spoiled: object) -> None:
        rows = spoiled if lines and isinstance(spoiled, list) else [spoiled]
        place.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
        seal(run, part)

    refused = sum(tried(run, what) for what in every_spoiled(value, EVERY, write))
    for whole in WRONG[::2]:
        write(whole)
        refused += tried(run, f"whole = {whole!r:.40}")
    assert refused > 3


WRONG_ARRAYS = {
    "two dimensions": lambda x: x[:, None],
    "none": lambda x: x[:0],
    "short": lambda x: x[:-1],
    "long": lambda x: np.concatenate([x, x]),
    "one number": lambda x: x[0],
    "far": lambda x: x.astype(float) * 0 + 1e300,
    "below": lambda x: x * 0 - 5,
    "nan": lambda x: x * np.nan,
    "infinite": lambda x: x * 0 + np.inf,
    "true": lambda x: x > 0,
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG_ARRAYS)
def test_a_wrong_array_is_lived_with_or_refused_in_one_line(run: Path, wrong: str):
    for part in ("evaluation", "classes"):
        place = run / part / "arrays.safetensors"
        kept = {name: tensor.clone() for name, tensor in load_tensors(place).items()}
        shown = [name for name in kept if not name.startswith(f"{HOOK}|plain") or part == "classes"]
        for name in shown[len(wrong) % 2 :: 2] or shown:
            tensor = kept[name]
            array = np.ascontiguousarray(WRONG_ARRAYS[wrong](tensor.numpy()))
            save_tensors(place, {**kept, name: torch.from_numpy(array)})
            seal(run, part)
            tried(run, f"{name}: {wrong}")
        save_tensors(place, kept)
        seal(run, part)
    assert tried(run, "as it was") == 0


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda value: value.update(hooks=1e308), r"\(hooks should be a valid dictionary\)"),
        (lambda value: value.update(glossary=3), r"\(glossary should be a valid dictionary\)"),
        (lambda value: value["hooks"][HOOK].update(comparisons=[1]), r"comparisons.0"),
        (lambda value: value.update(heldout_tokens=[]), "heldout_tokens"),
    ],
)
def test_the_place_and_the_value_are_named(run: Path, change, told: str):
    place = run / "evaluation" / "evaluation.json"
    value = json.loads(place.read_text())
    change(value)
    place.write_text(json.dumps(value))
    seal(run, "evaluation")
    with pytest.raises(
        UserError, match=rf"evaluation\.json: not of the form .*{told}.*; make it again"
    ):
        write_report(run)


def test_a_single_sae_that_was_not_measured_is_told_what_to_do(tmp_path: Path):
    shape = {"d_in": 4, "d_sae": 8, "activation": {"kind": "topk", "k": 2}}
    SAE(SAEConfig.parse(shape)).save(tmp_path / "sae")
    for make in (write_report, lambda path: ensure_index(path, None, CFG)):
        with pytest.raises(
            UserError, match=r"not been evaluated; run: wsae evaluate \S+/sae --source"
        ):
            make(tmp_path / "sae")


def test_a_number_of_400_digits_is_none():
    assert finite(10**400) is None
    assert finite(10**300) == 1e300
