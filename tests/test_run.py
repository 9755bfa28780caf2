"""`wsae.Run`: typed parts, read when asked for, and one line for each part that is missing or damaged."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import wsae
from wsae.acts.source import open_source
from wsae.core.errors import UserError
from wsae.evals.config import EvalConfig
from wsae.evals.run import evaluate_run
from wsae.sae.config import TopK
from wsae.train.config import MemberConfig, TrainConfig
from wsae.train.run import train_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of one small SAE on an array, evaluated."""
    place = tmp_path_factory.mktemp("run")
    np.save(place / "acts.npy", np.random.default_rng(0).normal(size=(300, 6)).astype(np.float32))
    members = (MemberConfig(d_sae=16, activation=TopK(k=4), label="plain"),)
    source = open_source(place / "acts.npy")
    train_run(TrainConfig(members=members, tokens=320, batch_size=64), source, place / "run")
    evaluate_run(place / "run", source, EvalConfig(draws=20, n_latents=0, splice_tokens=0))
    return place / "run"


@pytest.fixture
def copied(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def refused(read) -> str:
    with pytest.raises(UserError) as caught:
        read()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_parts_are_typed_and_are_what_the_files_hold(trained):
    run = wsae.Run(str(trained))
    assert run.finished
    assert run.has("evaluation")
    assert not run.has("interpretation")
    assert run.config.names() == ["plain"]
    assert run.gamma["acts"]["plain"].rule == "none"
    assert run.saes["acts"]["plain"].cfg.d_sae == 16
    assert run.metrics["acts"]["plain"][-1]["step"] == run.config.steps
    written = json.loads((trained / "evaluation" / "evaluation.json").read_text())
    value = run.evaluation.hooks["acts"].members["plain"].metrics["fvu"].value
    assert value == written["hooks"]["acts"]["members"]["plain"]["metrics"]["fvu"]["value"]
    assert run.evaluation_record == written
    assert run.arrays["acts|plain|density"].shape == (16,)
    assert list(run.contexts.get("acts", {}).get("plain", [])) == []
    assert run.digest() == wsae.Run(trained).digest()


def test_what_is_no_run_is_refused(tmp_path):
    assert "no such run directory" in refused(lambda: wsae.Run(tmp_path / "no"))
    assert "has no config.json" in refused(lambda: wsae.Run(tmp_path))


def test_a_part_that_is_not_there_names_the_command_that_makes_it(copied):
    assert "has not been interpreted; run: wsae interpret" in refused(
        lambda: wsae.Run(copied).interpretation
    )
    shutil.rmtree(copied / "evaluation")
    run = wsae.Run(copied)
    for read in (lambda: run.evaluation, lambda: run.contexts, lambda: run.arrays, run.digest):
        assert "has not been evaluated; run: wsae evaluate" in refused(read)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("config.json", lambda run: run.config),
        ("gamma.json", lambda run: run.gamma),
        ("evaluation/evaluation.json", lambda run: run.evaluation),
    ],
)
def test_a_file_of_another_form_is_refused(copied, name, read):
    (copied / name).write_text('{"source": 3, "train": 3, "acts": 3, "hooks": 3}')
    assert name.split("/")[-1] in refused(lambda: read(wsae.Run(copied)))


def test_only_the_last_row_of_metrics_may_be_cut(copied):
    path = copied / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"step": ')
    run = wsae.Run(copied)
    assert run.metrics_cut
    assert run.metrics == wsae.Run(copied).metrics
    path.write_text('{"step": \n' + whole)
    assert "line 1 is not a metrics row" in refused(lambda: wsae.Run(copied).metrics)


def test_a_run_is_opened_without_torch(trained):
    code = f"import sys, wsae; wsae.Run({str(trained)!r}).evaluation; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
