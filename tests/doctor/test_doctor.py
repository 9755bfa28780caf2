"""The pre-flight's findings against hand numbers, and whole on a tiny model and on data files."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from acts_models import make_bert, make_model, make_text, rewritten

from wsae.acts.config import HarvestConfig, TextConfig
from wsae.acts.harvest import harvest as harvest_store
from wsae.acts.source import ArraySource
from wsae.cli.main import main
from wsae.core.artifact import read_manifest, record, write_manifest
from wsae.core.errors import UserError
from wsae.core.files import read_json, seal, write_json
from wsae.doctor import measure
from wsae.doctor.measure import Check, Memory, check_memory, report
from wsae.doctor.run import DoctorConfig, examine
from wsae.sae import ReLU, TopK
from wsae.sae.config import GammaConfig, GroupTopK
from wsae.train.config import MemberConfig, TrainConfig


def by_name(found: dict) -> dict[str, dict[str, str]]:
    return {check["name"]: check for check in found["checks"]}


def plan(k: int = 2, **member) -> TrainConfig:
    members = (MemberConfig(activation=TopK(k=k), expansion=2, **member),)
    return TrainConfig(members=members, tokens=1000, batch_size=64)


def test_spread_of_a_hand_made_variance():
    found = measure.spread(torch.tensor([1.0, 1.0, 2.0, 4.0], dtype=torch.float64))
    assert found.top_dim == 3
    assert found.top_share == 0.5
    assert found.largest_over_median == 4.0
    assert found.effective == pytest.approx(1 / (1 / 64 + 1 / 64 + 4 / 64 + 16 / 64))


def test_spread_of_constant_dimensions_does_not_divide_by_zero():
    found = measure.spread(torch.zeros(4, dtype=torch.float64))
    assert found.top_share == 0
    assert math.isinf(found.largest_over_median)


def test_weighted_loss_of_an_outlier_dimension_is_the_variance_cubed():
    variance = torch.ones(100, dtype=torch.float64)
    variance[7] = 10.0
    plain, weighted = measure.check_outliers("h", variance, [GammaConfig(rule="variance")])
    assert (plain.status, weighted.status) == ("ok", "warn")
    assert f"{100 * 1000 / 1099:.3g} %" in weighted.value  # 10^3 of 10^3 + 99
    tamed = measure.check_outliers("h", variance, [GammaConfig(rule="variance", robust="rank")])
    assert tamed[1].status == "ok"


def test_a_sink_at_the_first_position_is_fine_while_the_mask_drops_it():
    x = torch.ones(2, 5, 3)
    x[:, 0] *= 30
    kept = torch.ones(2, 5, dtype=torch.bool)
    kept[:, 0] = False
    assert measure.check_sinks("h", x, kept).status == "ok"
    assert "30 x" in measure.check_sinks("h", x, kept).value
    assert measure.check_sinks("h", x, torch.ones_like(kept)).status == "warn"


def test_nan_is_found_with_its_place():
    x = torch.zeros(4, 3)
    x[2, 1] = float("nan")
    found = measure.check_finite("h", x)
    assert found.status == "fail"
    assert "row 2, dimension 1" in found.value


def test_rounding_costs_what_rounding_costs():
    x = 1000 + torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
    bf16, fp16 = measure.check_rounding("h", x, "bfloat16")
    error = (x.bfloat16().double() - x.double()).square().mean(0)
    share = error.sum() / x.double().var(0, correction=0).sum()
    assert share > 0.5  # bfloat16 steps by 4 just below 1024
    assert f"fvu {float(share):.2g}" in bf16.value
    assert (bf16.status, fp16.status) == ("warn", "ok")


@pytest.mark.parametrize(("storage", "status"), [("float16", "fail"), ("float32", "ok")])
def test_values_beyond_float16_fail_only_where_float16_is_wanted(storage, status):
    x = torch.tensor([[7e4, 0.0], [1.0, 2.0]])
    assert measure.check_rounding("h", x, storage)[1].status == status


def test_group_k_that_does_not_divide_names_the_nearest_that_does():
    found = measure.check_member("h", 16, MemberConfig(d_sae=100, activation=GroupTopK(k=30)))
    assert found.status == "fail"
    assert "90 or 120" in found.value


@pytest.mark.parametrize(
    ("d_sae", "k", "status"), [(64, 4, "ok"), (64, 65, "fail"), (64, 16, "warn"), (8, 2, "warn")]
)
def test_shapes_that_cannot_or_should_not_be(d_sae, k, status):
    assert (
        measure.check_member("h", 16, MemberConfig(d_sae=d_sae, activation=TopK(k=k))).status
        == status
    )


def test_text_is_compared_with_what_is_wanted():
    assert measure.check_text(0, 10, whole=True).status == "fail"
    assert measure.check_text(5, 10, whole=True).status == "warn"
    assert measure.check_text(5, 10, whole=False).status == "ok"
    assert measure.check_text(15, 10, whole=True).status == "ok"


def test_memory_is_compared_with_what_is_free():
    need = Memory(held=500, libraries=0, weights=100, optimiser=200, rows=0, step=200)
    assert need.total == 1000
    for free, status in ((2000.0, "ok"), (1100.0, "warn"), (900.0, "fail")):
        found = check_memory(need, free)
        assert found.status == status
        assert bool(found.advice) == (status != "ok")
    assert "rows" not in found.value  # what is nothing is not named


def test_a_stores_size_is_rows_times_widths():
    cfg = HarvestConfig(tokens=1000, heldout_tokens=100, store_dtype="bfloat16")
    assert measure.store_bytes(cfg, [10, 30]) == 1100 * (40 * 2 + 16)
    assert measure.check_disk(100, 50.0).status == "fail"


def test_a_step_takes_about_as_long_as_it_takes():
    x = torch.randn(512, 32, generator=torch.Generator().manual_seed(0))
    per_step = measure.seconds_per_step(x, plan(), "cpu", budget_s=0.1)
    assert 1e-5 < per_step < 1.0
    assert "training" in measure.check_time(plan(), per_step, None).value


def test_a_forecast_refuses_nothing_that_training_takes():
    """A first batch of one row, fewer steps than are timed; of rows that training refuses it tells no time."""
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    relu = MemberConfig(activation=ReLU(), d_sae=8, l1=0.1, p_end=0.5, anneal_from=0.9)
    cfg = TrainConfig(members=(relu,), tokens=1, batch_size=1)
    assert "of training" in measure.forecast(cfg, ArraySource(x), "cpu", 0.01)
    x[:] = torch.nan
    assert "of training" not in measure.forecast(cfg, ArraySource(x), "cpu", 0.01)


def test_the_machine_has_memory_and_disk(tmp_path):
    assert measure.free_memory("cpu") > 1e6
    assert measure.free_disk(str(tmp_path / "not" / "yet")) > 1e6
    assert "torch" in measure.check_versions().value


def test_a_report_counts_its_findings():
    found = report("x", [Check("a", "ok", ""), Check("b", "warn", ""), Check("c", "fail", "")])
    assert (found["failed"], found["warnings"]) == (1, 1)
    assert json.loads(json.dumps(found)) == found


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("doctor")
    make_text(place / "text.jsonl")
    return make_model(place / "model", bos=True)


def harvest(llama: Path, *hooks: str) -> HarvestConfig:
    text = {"path": str(llama.parent / "text.jsonl")}
    return HarvestConfig(model=str(llama), text=text, hooks=hooks, seq_len=32, tokens=200)  # pyright: ignore


def test_a_tiny_model_is_examined_whole(llama):
    cfg = DoctorConfig(
        train=plan(), harvest=harvest(llama, "layers.1", "layers.2.mlp"), probe_seconds=0.1
    )
    found = by_name(examine(cfg))
    for name in ("versions", "device", "begin-of-text token", "text", "memory", "time", "disk"):
        assert name in found, name
    assert "<s>" in found["begin-of-text token"]["value"]
    for hook in ("layers.1", "layers.2.mlp"):
        assert found[f"width of {hook}"]["value"] == "16"
        assert found[f"values at {hook}"]["status"] == "ok"
    assert {check["status"] for check in found.values()} <= {"ok", "warn"}


def test_weights_that_are_not_in_the_files_are_a_warning_where_no_hook_needs_them(tmp_path):
    path = rewritten(
        make_model(tmp_path / "m"), lambda x: {k: v for k, v in x.items() if "layers.2" not in k}
    )
    make_text(tmp_path / "text.jsonl")
    cfg = DoctorConfig(train=plan(), harvest=harvest(path, "layers.1"), probe_seconds=0.1)
    assert by_name(examine(cfg))["weights"]["status"] == "warn"
    cfg = DoctorConfig(train=plan(), harvest=harvest(path, "layers.2"), probe_seconds=0.1)
    failed = by_name(examine(cfg))["hooks"]
    assert failed["status"] == "fail"
    assert "depends on weights" in failed["value"]


def test_a_hook_the_model_lacks_fails_and_names_the_nearest(llama):
    found = examine(DoctorConfig(train=plan(), harvest=harvest(llama, "layer.1")))
    assert found["failed"] == 1
    assert "layers.1" in by_name(found)["hooks"]["value"]


def test_another_width_than_expected_fails(llama):
    found = examine(
        DoctorConfig(train=plan(), harvest=harvest(llama, "layers.1"), d_in=99, probe_seconds=0.1)
    )
    assert by_name(found)["width of layers.1"]["status"] == "fail"


def test_a_model_that_is_not_there_is_bad_input(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        examine(DoctorConfig(train=plan(), harvest=HarvestConfig(model=str(tmp_path / "gone"))))


def test_what_a_text_or_a_store_leaves_out_or_repeats_is_told(llama, tmp_path):
    lines = (llama.parent / "text.jsonl").read_text().splitlines()
    text = tmp_path / "a.jsonl"
    text.write_text("\n".join(['{"text": null}', *lines, *lines]))
    cfg = harvest(llama, "layers.1").model_copy(
        update={"text": TextConfig(path=str(text)), "heldout_tokens": 50, "tokens": 100_000}
    )
    live = examine(DoctorConfig(train=plan(), harvest=cfg, probe_seconds=0.1))
    path = harvest_store(cfg, tmp_path / "s").path
    stored = examine(DoctorConfig(train=plan(), data=str(path), probe_seconds=0.1))
    for found in (live, stored):
        lines_told = [check["value"] for check in found["checks"] if check["name"] == "text"]
        assert "records left out: 1 null" in lines_told
        assert any("held-out documents are training documents" in line for line in lines_told)
    older = read_manifest(path, "store")
    write_json(path / "tokens.json", dict.fromkeys(read_json(path / "tokens.json"), "\ufffd"))
    del older.info["text"]
    files = {n: r for n, r in older.files.items() if n != "tokens.json"} | {
        "tokens.json": record(path / "tokens.json")
    }
    write_manifest(path, "store", older.config, files, older.inputs, older.info)
    old = by_name(examine(DoctorConfig(train=plan(), data=str(path), probe_seconds=0.1)))
    assert "older wsae" in old["text"]["value"]
    assert old["token texts"]["value"] == "1e+02 % read as U+FFFD"


def test_an_array_is_examined_and_its_nan_found(tmp_path):
    x = np.random.default_rng(0).standard_normal((500, 12)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    cfg = DoctorConfig(train=plan(), data=str(tmp_path / "x.npy"), probe_seconds=0.1)
    found = by_name(examine(cfg))
    assert found["data"]["value"].startswith("450 training rows")
    assert found["width of x"]["value"] == "12"
    assert found["time"]["status"] == "ok"
    x[17, 3] = np.inf
    np.save(tmp_path / "x.npy", x)
    bad = by_name(examine(cfg))["data"]
    assert bad["status"] == "fail"
    assert "row 17, dimension 3" in bad["value"]


def test_whitening_on_too_few_rows_fails_beforehand(tmp_path):
    x = np.random.default_rng(0).standard_normal((70, 64)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    train = plan(gamma=GammaConfig(rule="whiten"))
    found = examine(DoctorConfig(train=train, data=str(tmp_path / "x.npy"), probe_seconds=0.1))
    check = by_name(found)["covariance for whiten at x"]
    assert check["status"] == "fail"
    assert "at least 65 rows" in check["advice"]


def test_fewer_rows_than_a_batch_is_a_warning(tmp_path):
    np.save(
        tmp_path / "x.npy", np.random.default_rng(0).standard_normal((50, 12)).astype(np.float32)
    )
    found = examine(DoctorConfig(train=plan(), data=str(tmp_path / "x.npy"), probe_seconds=0.1))
    assert by_name(found)["data"]["status"] == "warn"


def test_the_command_prints_every_finding_and_exits_1_on_a_failure(llama, capsys):
    words = ["doctor", str(llama), "--hook", "layers.1", "--text", str(llama.parent / "text.jsonl")]
    words += ["--seq-len", "32", "--expansion", "2", "--batch-size", "64", "--device", "cpu"]
    assert main([*words, "--k", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["failed"] == 0
    assert main([*words, "--k", "5", "--activation", "group_topk"]) == 1
    text = capsys.readouterr().out
    assert "30 or 35" in text
    assert "this run would not work as planned" in text


@pytest.fixture(scope="module")
def bidirectional(llama, tmp_path_factory) -> Path:
    """A model that sees later tokens, its store, and a short run with its evaluation."""
    place = tmp_path_factory.mktemp("bidirectional")
    make_bert(place / "model")
    text = str(llama.parent / "text.jsonl")
    words = [
        "harvest",
        str(place / "model"),
        "--text",
        text,
        "--hook",
        "layer.1",
        "--seq-len",
        "32",
    ]
    words += ["--tokens", "400", "--heldout-tokens", "100", "--device", "cpu"]
    assert main([*words, "--out", str(place / "acts")]) == 0
    words = ["train", str(place / "acts"), "--k", "4", "--expansion", "2", "--batch-size", "100"]
    assert main([*words, "--tokens", "400", "--out", str(place / "run"), "--device", "cpu"]) == 0
    assert main(["evaluate", str(place / "run"), "--device", "cpu"]) == 0
    return place


def check_up(path: Path) -> dict[str, dict[str, str]]:
    return by_name(examine(DoctorConfig(train=plan(), data=str(path), probe_seconds=0.1)))


def test_next_token_cross_entropy_of_a_model_that_sees_that_token_is_not_measured(
    bidirectional, capsys
):
    measured = json.loads((bidirectional / "run/evaluation/evaluation.json").read_text())
    metrics = measured["hooks"]["layer.1"]["members"]["plain"]["metrics"]
    assert not [name for name in metrics if name.startswith("ce_")]
    assert {"kl", "fvu"} <= set(metrics)
    assert measured["causal"] is False
    assert main(["evaluate", str(bidirectional / "run"), "--device", "cpu"]) == 0
    assert "next-token cross-entropy is not measured" in capsys.readouterr().out


def test_a_run_is_examined_with_its_steps_its_data_and_its_evaluation(bidirectional):
    found = check_up(bidirectional / "run")
    assert found["steps"]["status"] == "warn"
    assert found["steps"]["value"] == "4 of 100 rows"
    assert found["rows against the model at layer.1"]["status"] == "ok"
    assert found["later tokens"]["status"] == "warn"
    assert found["evaluation"]["status"] == "ok"
    place = bidirectional / "run/evaluation/evaluation.json"
    text = place.read_text()
    older = json.loads(text)  # as older versions wrote it
    older["hooks"]["layer.1"]["members"]["plain"]["metrics"]["ce_clean"] = {"value": 1.0}
    place.write_text(json.dumps(older))
    altered = check_up(bidirectional / "run")["evaluation"]
    assert (altered["status"], "evaluation.json" in altered["value"]) == ("fail", True)
    manifest = place.with_name("manifest.json")
    whole = manifest.read_text()
    told = {key: value for key, value in json.loads(whole).items() if key != "checksum"}
    told["files"][place.name] = record(place).to_dict()
    manifest.write_text(json.dumps(seal(told)))
    assert "cross-entropy" in check_up(bidirectional / "run")["evaluation"]["value"]
    place.write_text(text)
    manifest.write_text(whole)


def test_a_models_probe_is_told(bidirectional, llama):
    text = {"path": str(llama.parent / "text.jsonl")}
    model = str(bidirectional / "model")
    planned = HarvestConfig(model=model, text=text, hooks=("layer.0",), seq_len=32, tokens=200)  # pyright: ignore
    cfg = DoctorConfig(train=plan(), harvest=planned, probe_seconds=0.1)
    found = by_name(examine(cfg))
    assert "[batch, sequence, width]" in found["rows of layer.0"]["value"]
    assert found["later tokens"]["status"] == "warn"
    assert found["positions"]["value"] == "32 in its table, sequences of 32"
    long = planned.model_copy(update={"seq_len": 33})
    failed = by_name(examine(cfg.model_copy(update={"harvest": long})))["hooks"]
    assert failed["status"] == "fail"
    assert "--seq-len 32 or less" in failed["value"]


def test_a_store_whose_model_has_other_weights_now_fails(llama, tmp_path, capsys):
    model = make_model(tmp_path / "model")
    cfg = HarvestConfig(
        model=str(model),
        text={"path": str(llama.parent / "text.jsonl")},  # pyright: ignore
        hooks=("layers.1",),
        seq_len=32,
        tokens=300,
        heldout_tokens=100,
    )
    made = harvest_store(cfg, tmp_path / "acts")
    found = check_up(tmp_path / "acts")
    assert found["rows against the model at layers.1"]["status"] == "ok"
    assert found["made by"]["status"] == found["token texts"]["status"] == "ok"
    assert "documents in both halves" not in found  # counted while harvesting
    torch.manual_seed(9)
    made_anew = transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(model))
    made_anew.save_pretrained(model)
    fails = check_up(tmp_path / "acts")["rows against the model at layers.1"]
    assert fails["status"] == "fail"
    assert fails["value"].startswith("100 of 100 differ")
    words = ["doctor", str(tmp_path / "acts"), "--k", "4", "--expansion", "2", "--batch-size", "64"]
    assert main([*words, "--device", "cpu"]) == 1
    assert "do not build on it as it is" in capsys.readouterr().out
    (model / "config.json").rename(model / "config.json.away")
    gone = check_up(tmp_path / "acts")["rows against the model"]
    assert gone["status"] == "warn"
    assert "not compared" in gone["value"]
    assert made.n_rows["train"] == 300


def test_an_older_store_with_repeated_documents_and_broken_characters_is_told(llama, tmp_path):
    words = (llama.parent / "text.jsonl").read_text().splitlines()
    text = "\n".join(words * 3)  # every document three times
    (tmp_path / "text.jsonl").write_text(text)
    cfg = HarvestConfig(
        model=str(llama),
        text={"path": str(tmp_path / "text.jsonl")},  # pyright: ignore
        hooks=("layers.1",),
        seq_len=32,
        tokens=5000,
        heldout_tokens=200,
    )
    made = harvest_store(cfg, tmp_path / "acts")
    names = json.loads((made.path / "tokens.json").read_text())
    some = str(int(made.tokens("heldout").ids[0, 3]))
    (made.path / "tokens.json").write_text(json.dumps(names | {some: "\ufffd"}))
    manifest = made.manifest
    info = {
        key: value for key, value in made.info.items() if key not in ("probe", "causal", "text")
    }
    files = {name: entry for name, entry in manifest.files.items() if name != "tokens.json"}
    write_manifest(
        made.path,
        "store",
        manifest.config,
        {**files, "tokens.json": record(made.path / "tokens.json")},
        inputs=manifest.inputs,
        info=info,
    )
    found = check_up(made.path)
    assert found["made by"]["status"] == "warn"
    assert found["rows against the model at layers.1"]["status"] == "ok"
    assert found["documents in both halves"]["status"] == "warn"
    assert found["token texts"]["status"] == "warn"
