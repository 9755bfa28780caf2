"""The rules gap and whiten end to end: arrays to trained SAEs, runs on disk, resumption and evaluation."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train import config, files_of, weighted, world
from torch import Tensor

import wsae
from wsae.acts.source import ArraySource, MatrixRows
from wsae.cli.main import main
from wsae.core.errors import UserError
from wsae.evals.compare import ComparedMember, across_runs, member_metrics
from wsae.evals.config import EvalConfig
from wsae.evals.measure import EvaluatedSaes, measure
from wsae.sae.config import GammaConfig
from wsae.sae.gamma import gamma_from_covariance
from wsae.train import run as rows_behind
from wsae.train.config import TrainConfig
from wsae.train.family import make_family
from wsae.train.loop import Recorder, Stopped
from wsae.train.run import covariances, load_run, train_run
from wsae.train.state import make_batch, metrics_row
from wsae.train.step import train_step

QUICK = {"tokens": 4_000, "batch_size": 200, "seed": 3}


def exact(x: Tensor) -> Tensor:
    return torch.from_numpy(np.cov(x.double().numpy().T, bias=True))


@pytest.mark.parametrize("rule", ["gap", "whiten"])
def test_fit_weighs_by_the_covariance_of_its_rows(rule: str) -> None:
    x = world(1000)
    sae = wsae.fit(x, k=4, d_sae=32, gamma=rule, **QUICK)
    expected = gamma_from_covariance(GammaConfig.parse({"rule": rule}), exact(x))
    torch.testing.assert_close(sae.gamma, expected.float(), rtol=1e-4, atol=1e-6)
    assert sae.gamma.ndim == (1 if rule == "gap" else 2)


def test_a_loud_dimension_is_turned_down_by_both_rules() -> None:
    members = [wsae.Member(gamma=rule, k=4, d_sae=32) for rule in ("gap", "whiten")]
    found = wsae.fit_family(world(1000), members, **QUICK)
    for sae in found.saes:
        cost = sae.gamma if sae.gamma.ndim == 1 else sae.gamma.norm(dim=0)
        assert int(cost.argmin()) == 5


def test_a_run_on_disk_records_saves_and_equals_fit(tmp_path: Path) -> None:
    members = [weighted("none"), weighted("gap"), weighted("whiten", gamma={"rule": "whiten"})]
    cfg = config(*members, **QUICK)
    source = ArraySource(world())
    train_run(cfg, source, tmp_path / "run")
    saes = load_run(tmp_path / "run").saes["acts"]
    fitted = wsae.fit_family(source, members, **{**QUICK, "log_every": 10})
    for name, sae in zip(fitted.names, fitted.saes, strict=True):
        for key, tensor in sae.tensors().items():
            assert torch.equal(tensor, saes[name].tensors()[key]), (name, key)
    record = json.loads((tmp_path / "run" / "gamma.json").read_text())["acts"]
    assert record["gap-a1"]["covariance_rows"] == record["whiten-a1"]["covariance_rows"] == 3600
    assert record["whiten-a1"]["ridge"] == 0.01
    assert "covariance_rows" not in record["plain"]
    assert "ridge" not in record["plain"]


def test_a_member_beside_whiten_is_the_same_to_the_bit_as_alone() -> None:
    x = world(1000)
    both = wsae.fit_family(x, [weighted("variance"), weighted("whiten")], **QUICK)
    alone = wsae.fit_family(x, [weighted("variance")], **QUICK)
    for key, tensor in alone.saes[0].tensors().items():
        assert torch.equal(tensor, both.saes[0].tensors()[key])


def test_a_stopped_run_with_a_matrix_resumes_bit_for_bit(tmp_path: Path, monkeypatch) -> None:
    cfg = config(weighted("whiten"), weighted("gap"), **QUICK)
    source = ArraySource(world())
    train_run(cfg, source, tmp_path / "whole")
    normal = Recorder.on_step

    def halting(recorder: Recorder, done: int) -> None:
        recorder.stop = done == 7
        normal(recorder, done)

    monkeypatch.setattr(Recorder, "on_step", halting)
    with pytest.raises(Stopped, match="step 7 of 20"):
        train_run(cfg, source, tmp_path / "cut")
    monkeypatch.setattr(Recorder, "on_step", normal)
    train_run(cfg, source, tmp_path / "cut", resume=True)
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


def test_training_metrics_of_a_matrix_are_its_own_weighted_fvu() -> None:
    x = world(1000)
    source = ArraySource(x, heldout_fraction=0.0)
    cfg = config(weighted("whiten"), batch_size=1000, tokens=1000)
    stats = source.stats()
    family = make_family(cfg, stats, "cpu", covariances(cfg, source, stats))
    (member,) = family.members["acts"]
    with torch.no_grad():  # before the step: its metrics are of the weights it starts from
        y, sae = x.double() / member.scale, member.sae
        gamma = sae.gamma.double()
        error = (y - sae(y.float()).double()) @ gamma.T
        spread = (y - y.mean(0)) @ gamma.T
    train_step(member, make_batch(x, member), 0, cfg)
    expected = float(error.square().sum() / spread.square().sum())
    assert metrics_row(member)["fvu_weighted"] == pytest.approx(expected, rel=1e-4)


def test_evaluation_weighs_by_the_whole_matrix() -> None:
    x = world(600)
    fitted = wsae.fit_family(x, [weighted("none"), weighted("whiten"), weighted("gap")], **QUICK)
    saes = dict(zip(fitted.names, fitted.saes, strict=True))
    cfg = EvalConfig(draws=10, n_latents=0, random_control=False)
    arrays = measure(MatrixRows(x), {"acts": EvaluatedSaes(saes)}, cfg)["acts"].arrays
    for name, sae in saes.items():
        y = x.double()
        error, spread = y - sae(x).double().detach(), y - y.mean(0)
        for other in saes:
            gamma = saes[other].gamma.double()
            matrix = gamma if gamma.ndim == 2 else gamma.diag()
            assert float(arrays[name][f"seq_sse@{other}"].sum()) == pytest.approx(
                float((error @ matrix.T).square().sum()), rel=1e-6
            )
        numpy = {key: value.numpy() for key, value in arrays[name].items()}
        matrix = sae.gamma.double() if sae.gamma.ndim == 2 else sae.gamma.double().diag()
        expected = (error @ matrix.T).square().sum() / (spread @ matrix.T).square().sum()
        assert member_metrics(name, numpy, cfg)["fvu_weighted"]["value"] == pytest.approx(
            float(expected), rel=1e-6
        )
    assert arrays["whiten-a1"]["gamma"].shape == (16,)
    turned = {key: value.numpy() for key, value in arrays["whiten-a1"].items()}
    other = {**turned, "gamma_matrix": turned["gamma_matrix"][::-1]}  # same cost per dimension
    mine, theirs = ComparedMember("a", "whiten-a1", turned), ComparedMember("b", "whiten-a1", other)
    assert "seq_sse@whiten-a1" in across_runs(mine, mine).arrays
    assert "seq_sse@whiten-a1" not in across_runs(theirs, mine).arrays


def test_rows_behind_the_covariance_are_bounded_and_of_one_epoch(monkeypatch) -> None:
    source = ArraySource(world(1003), heldout_fraction=0.0)
    stats = source.stats()
    idle = weighted("gap", gamma={"rule": "gap", "alpha": 0.0})
    assert covariances(config(weighted("variance"), idle), source, stats) == {}
    cfg = config(weighted("gap"), **QUICK)
    assert covariances(cfg, source, stats)["acts"].n == 1003
    monkeypatch.setattr(rows_behind, "_BATCH", 64)
    assert covariances(cfg, source, stats)["acts"].n == 1003 // 16 * 16
    monkeypatch.setattr(rows_behind, "MAX_ROWS", 130)
    found = covariances(cfg, source, stats)["acts"]
    assert found.n == 43 * 3

    class Short(ArraySource):
        """Knows its length only when the text ends, as a live model does: after 450 rows."""

        n_rows = None

        def stream(self, batch_size, seed, state=None):  # noqa: ANN001, ANN202
            return ArraySource(world(450), 0.0).stream(batch_size, seed, state)

    monkeypatch.undo()
    short = Short(world(1003), heldout_fraction=0.0)
    assert covariances(cfg, short, stats)["acts"].n == 400, "rows are not counted twice"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"gamma": "gap"}, "gamma rule gap: dimension 3 has variance 0"),
        ({"gamma": "whiten"}, "gamma rule whiten: dimension 3 has variance 0"),
        ({"gamma": "gap", "alpha": 0.0}, None),
        ({"gamma": "variance", "ridge": 0.1}, "a ridge belongs to the rule 'whiten'"),
    ],
)
def test_a_constant_dimension_is_named(options: dict[str, object], says: str | None) -> None:
    x = world(400)
    x[:, 3] = 7.0
    if says is None:
        assert torch.equal(wsae.fit(x, k=4, d_sae=32, **QUICK, **options).gamma, torch.ones(16))
        return
    with pytest.raises(UserError, match=says):
        wsae.fit(x, k=4, d_sae=32, **QUICK, **options)


def test_fewer_rows_than_dimensions_cannot_set_these_weights() -> None:
    with pytest.raises(UserError, match="16 rows cannot give the covariance of 16 dimensions"):
        wsae.fit(world(16), k=4, d_sae=32, gamma="gap", tokens=160, batch_size=16)
    cfg = TrainConfig.parse({"members": (weighted("gap"),), "tokens": 100})
    with pytest.raises(UserError, match="gamma rule gap needs the covariance"):
        make_family(cfg, ArraySource(world(500)).stats())


def test_the_command_line_trains_both_rules(tmp_path: Path, capsys) -> None:
    np.save(tmp_path / "x.npy", world(600).numpy())
    words = ["train", str(tmp_path / "x.npy"), "--d-sae", "32", "--k", "4", "--batch-size", "100"]
    for rule, more, name in (("gap", [], "gap-a1"), ("whiten", ["--ridge", "0.1"], "whiten-a1-ridge0.1")):  # fmt: skip
        out = tmp_path / rule
        assert main([*words, "--out", str(out), "--gamma", rule, *more]) == 0
        assert name in json.loads((out / "gamma.json").read_text())["x"]
        assert main(["evaluate", str(out), "--json"]) == 0
        capsys.readouterr()
    assert main([*words, "--out", str(tmp_path / "no"), "--gamma", "gap", "--ridge", "1"]) == 2
    assert "a ridge belongs to the rule 'whiten'" in capsys.readouterr().err
