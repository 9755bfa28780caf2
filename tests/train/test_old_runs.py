"""What an earlier release wrote still opens: a store, a run with its evaluation, and a checkpoint to go on from.

tests/fixtures/before-fold was written at commit 226b2c3 by `wsae harvest`, `train` and `evaluate` on a tiny model, the
`cut` run by Ctrl-C after 12 of 20 steps. Never write it anew: a change that it does not survive needs a reader.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

import wsae
from wsae.acts.source import StoreSource
from wsae.cli.main import main
from wsae.evals.config import CONTROL
from wsae.train.loop import checkpoints

OLD = Path(__file__).parents[1] / "fixtures" / "before-fold"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return shutil.copytree(OLD, tmp_path / "old")


def test_an_old_store_gives_its_rows(old: Path) -> None:
    stream = StoreSource(old / "store").stream(64, seed=0)
    (hook,) = stream.next()
    assert hook == "layers.1"
    assert stream.next()[hook].shape == (64, 16)


def test_an_old_run_opens_and_is_evaluated_and_reported_again(
    old: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = wsae.Run(old / "run")
    assert set(run.saes["layers.1"]) == {"plain", "variance-a1"}
    assert [member.gamma.rule for member in run.config.members] == ["none", "variance"]
    told = json.loads((old / "run" / "evaluation" / "evaluation.json").read_text())
    assert main(["report", str(old / "run"), "--out", str(old / "report.html")]) == 0
    shutil.rmtree(old / "run" / "evaluation")
    words = ["--draws", "20", "--n-latents", "4", "--splice-tokens", "0"]
    store = ["--source", str(old / "store")]
    assert main(["evaluate", str(old / "run"), *store, *words]) == 0, capsys.readouterr().err
    again = json.loads((old / "run" / "evaluation" / "evaluation.json").read_text())
    for hook, members in told["hooks"].items():
        for name, before in members["members"].items():
            after = again["hooks"][hook]["members"][name]
            if name == CONTROL:  # it had rows of norm 1, not the scale at which it errs least
                assert after["metrics"]["fvu"]["value"] < before["metrics"]["fvu"]["value"]
                continue
            assert after["metrics"]["fvu"]["value"] == pytest.approx(
                before["metrics"]["fvu"]["value"], rel=1e-4
            )


def test_an_old_checkpoint_goes_on_to_the_end_of_the_run_that_was_not_cut(
    old: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(checkpoints(old / "cut")) == 1
    size = ["--d-sae", "24", "--k", "4", "--batch-size", "64", "--tokens", "1280", "--alpha", "1"]
    words = ["train", str(old / "store"), "--out", str(old / "cut"), *size, "--resume"]
    assert main([*words, "--penalty-warmup", "0.5"]) == 2  # its release had no such setting
    assert "penalty_warmup is None there, 0.5 here" in capsys.readouterr().err
    assert main(words) == 0, capsys.readouterr().err
    assert json.loads((old / "cut" / "config.json").read_text())["train"]["max_grad_norm"] is None
    whole, cut = wsae.Run(old / "run").saes["layers.1"], wsae.Run(old / "cut").saes["layers.1"]
    for name, sae in whole.items():
        for key, tensor in sae.tensors().items():
            torch.testing.assert_close(cut[name].tensors()[key], tensor, rtol=1e-3, atol=1e-4)
