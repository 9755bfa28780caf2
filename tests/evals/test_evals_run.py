"""A whole run evaluated: files, comparisons, contexts, splicing, and comparison across runs."""

import json
import shutil

import numpy as np
import pytest
import torch
from acts_models import make_kind, make_model, make_text
from hypothesis import given
from hypothesis import strategies as st

from wsae.acts.config import HarvestConfig, TextConfig
from wsae.acts.harvest import harvest
from wsae.acts.language import load_language
from wsae.acts.loading import PREDICTS_NOTHING
from wsae.acts.source import ArraySource, StoreSource
from wsae.core.artifact import read_manifest
from wsae.core.errors import UserError
from wsae.core.files import read_json
from wsae.core.tensors import load_tensors
from wsae.evals.compare import compare, fronts
from wsae.evals.config import CONTROL, EvalConfig
from wsae.evals.glossary import COMPARED, HEADINGS, MATCHING, METRICS
from wsae.evals.run import evaluate_families, evaluate_run, find_twins, run_subject
from wsae.sae import TopK
from wsae.sae.config import GammaConfig
from wsae.train.config import MemberConfig, TrainConfig
from wsae.train.run import train_run

CFG = EvalConfig(
    draws=200,
    n_latents=6,
    n_contexts=3,
    window_tokens=8,
    splice_tokens=400,
    batch_size=64,
    dense_threshold=0.05,
)
MEMBERS = tuple(
    MemberConfig(gamma=gamma, d_sae=48, activation=TopK(k=4), lr=1e-2)
    for gamma in (
        GammaConfig(),
        GammaConfig(rule="variance"),
        GammaConfig(rule="variance", alpha=0.5),
    )
)
HOOK = "layers.1"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A store and a trained, evaluated run of a tiny language model."""
    root = tmp_path_factory.mktemp("evals")
    model = make_model(root / "model")
    text = make_text(root / "text.jsonl", 150)
    cfg = HarvestConfig(
        model=str(model),
        text=TextConfig(path=str(text)),
        hooks=(HOOK,),
        seq_len=32,
        tokens=2000,
        heldout_tokens=400,
        heldout_fraction=0.3,
    )
    harvest(cfg, root / "store")
    source = StoreSource(root / "store")
    train_run(TrainConfig(members=MEMBERS, tokens=20_000, batch_size=256), source, root / "run")
    language = load_language(str(model))
    record = evaluate_run(root / "run", source, CFG, language)
    return root, source, language, record


def test_the_directory_is_whole_and_says_what_was_measured(world):
    root, source, _, record = world
    path = root / "run" / "evaluation"
    manifest = read_manifest(path, "evaluation")
    assert set(manifest.files) == {"evaluation.json", "arrays.safetensors", "contexts.json"}
    assert read_json(path / "evaluation.json") == record
    assert json.dumps(record, allow_nan=False), "JSON has no NaN"
    assert record["heldout_tokens"] == sum(len(c.seq) for c in source.heldout(100))
    assert list(record["hooks"]) == [HOOK]
    assert set(record["hooks"][HOOK]["members"]) == {
        "plain",
        "variance-a1",
        "variance-a0.5",
        CONTROL,
    }


def test_every_metric_emitted_is_in_the_glossary_and_the_other_way_round(world):
    record = world[3]["hooks"][HOOK]
    emitted = {m for entry in record["members"].values() for m in entry["metrics"]}
    assert emitted == set(METRICS)
    statistics = {key for entry in record["matching"].values() for key in entry}
    assert statistics == set(MATCHING) | {"with", "method"}
    assert {line["metric"] for line in record["comparisons"] if line["b"] == "plain"} == set(
        COMPARED
    )
    assert set(world[3]["glossary"]) == set(METRICS) | set(MATCHING)


def test_each_weighted_member_is_compared_once_per_metric_with_its_twin(world):
    record = world[3]["hooks"][HOOK]
    members = record["members"]
    lines = [line for line in record["comparisons"] if line["b"] == "plain"]
    keys = [(line["a"], line["metric"]) for line in lines]
    assert len(keys) == len(set(keys)) == 2 * len(COMPARED)
    for line in lines:
        if line["metric"] in ("fvu", "l0", "kl", "ce_delta", "ce_loss_recovered_mean", "dead_frac"):
            a, b = (members[line[side]]["metrics"][line["metric"]]["value"] for side in "ab")
            assert line["difference"] == pytest.approx(a - b), line["metric"]
        if line["low"] is None:
            assert "recovered" in line["metric"], "an ablation need not hurt an untrained model"
        else:
            assert line["low"] <= line["difference"] <= line["high"]
        assert line["unit"] == (
            "latent"
            if line["metric"]
            in (
                "dead_frac",
                "dense_frac",
                "density_mean",
                "latent_variance_mean",
                "decoder_cosine_max_mean",
            )
            else "sequence"
        )
        assert line["paired"] == (line["metric"] not in ("dead_frac", "dense_frac"))


def test_weighted_fvu_is_compared_under_the_weighted_members_own_gamma(world):
    root, _, _, record = world
    arrays = load_tensors(root / "run" / "evaluation" / "arrays.safetensors")
    line = next(
        line
        for line in record["hooks"][HOOK]["comparisons"]
        if line["a"] == "variance-a1" and line["metric"] == "fvu_weighted"
    )
    ratios = [
        float(
            arrays[f"{HOOK}|{m}|seq_sse@variance-a1"].sum()
            / arrays[f"{HOOK}|{m}|seq_var@variance-a1"].sum()
        )
        for m in ("variance-a1", "plain")
    ]
    assert line["difference"] == pytest.approx(ratios[0] - ratios[1])
    own = record["hooks"][HOOK]["members"]["variance-a1"]["metrics"]["fvu_weighted"]["value"]
    assert ratios[0] == pytest.approx(own)


def test_arrays_have_the_promised_names_and_shapes(world):
    root, _, _, _ = world
    arrays = load_tensors(root / "run" / "evaluation" / "arrays.safetensors")
    for member in ("plain", "variance-a1"):
        shapes = {
            "density": 48, "variance": 48, "decoder_max_cosine": 48,
            "ev_per_dim": 16, "gamma": 16, "input_variance": 16,
        }  # fmt: skip
        for name, size in shapes.items():
            assert arrays[f"{HOOK}|{member}|{name}"].shape == (size,)
    index = arrays[f"{HOOK}|variance-a1|match_index"]
    assert index.shape == arrays[f"{HOOK}|variance-a1|match_cosine"].shape == (48,)
    assert index.dtype == torch.int64


def test_splicing_used_the_models_own_activations(world):
    """Loss recovered recomputed from the arrays, and cross-entropy of the clean model from the model itself."""
    root, source, language, record = world
    arrays = load_tensors(root / "run" / "evaluation" / "arrays.safetensors")
    get = {
        k: arrays[f"{HOOK}|plain|splice_{k}"]
        for k in ("seq", "targets", "ce", "ce_clean", "ce_zero", "kl")
    }
    metrics = record["hooks"][HOOK]["members"]["plain"]["metrics"]
    assert {*metrics} == {*METRICS} == {key for keys in HEADINGS.values() for key in keys}
    zero, clean, sae = (float(get[k].sum()) for k in ("ce_zero", "ce_clean", "ce"))
    if zero > clean:
        assert metrics["ce_loss_recovered_zero"]["value"] == pytest.approx(
            (zero - sae) / (zero - clean)
        )
    assert metrics["kl"]["value"] == pytest.approx(float(get["kl"].sum() / get["targets"].sum()))
    tokens = source.tokens()
    number = int(get["seq"][0])
    ids = tokens.ids[number].long()
    kept = torch.cat([c.pos[c.seq == number] for c in source.heldout(64)])
    stop = min(int(tokens.lengths[number]), int(kept.max()) + 2)
    with torch.no_grad():
        log_p = language.model(input_ids=ids[None, :stop]).logits[0].log_softmax(-1)
    scored = [t for t in range(stop - 1) if int(ids[t + 1]) > 2]
    assert float(get["targets"][0]) == len(scored)
    by_hand = -sum(float(log_p[t, ids[t + 1]]) for t in scored)
    assert float(get["ce_clean"][0]) == pytest.approx(by_hand, rel=1e-4)


def test_contexts_are_the_strongest_places_of_each_latent_with_its_tokens(world):
    root, source, _, _ = world
    contexts = read_json(root / "run" / "evaluation" / "contexts.json")[HOOK]
    assert set(contexts) == {"plain", "variance-a1", "variance-a0.5"}
    sae = run_subject(root / "run")[HOOK].saes["variance-a1"]
    chunks = list(source.heldout(10_000))
    z, seq, pos = sae.encode(chunks[0].x[HOOK]).detach(), chunks[0].seq, chunks[0].pos
    tokens = source.tokens()
    shown_in_plain = {entry["latent"] for entry in contexts["plain"]}
    assert len(contexts["variance-a1"]) == 6
    for entry in contexts["variance-a1"]:
        acts = z[:, entry["latent"]]
        assert entry["max"] == pytest.approx(float(acts.max()), rel=1e-5)
        assert entry["density"] == pytest.approx(float((acts != 0).double().mean()))
        assert entry["variance"] == pytest.approx(float(acts.double().var(correction=0)), rel=1e-4)
        assert entry["match"]["member"] == "plain"
        assert entry["match"]["latent"] in shown_in_plain, (
            "the twin's latent can be looked at beside it"
        )
        numbers = [c["seq"] for c in entry["contexts"]]
        assert len(numbers) == len(set(numbers)) <= 3
        peaks = [c["acts"][c["peak"]] for c in entry["contexts"]]
        assert peaks == sorted(peaks, reverse=True)
        assert peaks[0] == pytest.approx(float(acts.max()), rel=1e-3)
        for context in entry["contexts"]:
            assert len(context["tokens"]) == len(context["acts"]) <= 8
            value = context["acts"][context["peak"]]
            at = int(pos[(seq == context["seq"]) & (acts - value).abs().lt(1e-3 * value)][0])
            ids = tokens.ids[context["seq"], at - context["peak"] :][: len(context["tokens"])]
            assert context["tokens"] == tokens.decode(ids)


def test_comparing_one_run_repeats_the_lines_of_its_evaluation(world):
    root, _, _, record = world
    found = compare([root / "run"], EvalConfig(draws=CFG.draws))  # what is dense is the run's own
    lines = [line for line in record["hooks"][HOOK]["comparisons"] if line["b"] == "plain"]
    assert found["hooks"][HOOK] == lines


@given(
    points=st.lists(
        st.tuples(st.integers(1, 6), st.integers(0, 6), st.sampled_from((4, 8)), st.booleans()),
        min_size=1,
        max_size=8,
    )
)
def test_the_front_is_what_nobody_beats(points):
    """Walking from the sparsest member on, the front are the strict records of fit (and who ties with one)."""
    members = {}
    for number, (l0, fvu, k, weighted) in enumerate(points):
        gamma = GammaConfig(rule="variance" if weighted else "none")
        config = MemberConfig(gamma=gamma, activation=TopK(k=k)).to_dict()
        values = {"l0": l0, "fvu": fvu, "ce_loss_recovered_zero": -fvu}
        metrics = {
            name: {"value": value, "low": None, "high": None} for name, value in values.items()
        }
        members[str(number)] = {"config": config, "metrics": metrics}
    found = fronts(members)
    if len({k for _, _, k, _ in points}) < 2:
        assert found == {}  # they differ in their weights alone
        return
    expected, best = set(), float("inf")
    for l0, fvu in sorted({(l0, fvu) for l0, fvu, _, _ in points}):
        if fvu < best:
            expected.add((l0, fvu))
            best = fvu
    for metric, sign in (("fvu", 1), ("ce_loss_recovered_zero", -1)):
        drawn = found[metric]
        assert len(drawn) == len(points)
        assert [point["l0"] for point in drawn] == sorted(l0 for l0, *_ in points)
        for point in drawn:
            l0, fvu, k, weighted = points[int(point["member"])]
            assert point["front"] == ((l0, fvu) in expected)
            assert point["value"] == sign * fvu
            assert (point["group"], point["label"]) == (
                "topk" + ", variance-a1" * weighted,
                f"k{k}",
            )


def test_a_run_compared_with_its_copy_differs_by_nothing(world):
    root, _, _, _ = world
    shutil.copytree(root / "run", root / "copy", dirs_exist_ok=True)
    found = compare([root / "run", root / "copy"], CFG)["hooks"][HOOK]
    across = [
        line for line in found if line["a"].startswith("copy:") and line["b"].startswith("run:")
    ]
    assert {line["metric"] for line in across} == set(COMPARED)
    assert all(line["difference"] == 0 for line in across)
    by_latent = [line for line in across if line["unit"] == "latent"]
    assert not any(line["paired"] for line in by_latent), "latents of two runs are not matched"


def test_runs_on_different_data_are_not_compared(world):
    root, source, _, _ = world
    x = torch.randn(600, 16, generator=torch.Generator().manual_seed(0))
    other = ArraySource(x.numpy(), name=HOOK)
    train_run(TrainConfig(members=MEMBERS, tokens=2000, batch_size=100), other, root / "other")
    with pytest.raises(UserError, match="has not been evaluated; run: wsae evaluate"):
        compare([root / "run", root / "other"])
    record = evaluate_run(root / "other", other, EvalConfig(draws=50))
    assert "ce_delta" not in record["hooks"][HOOK]["members"]["plain"]["metrics"]
    contexts = read_json(root / "other" / "evaluation" / "contexts.json")[HOOK]["plain"]
    assert contexts
    assert all(entry["contexts"] == [] for entry in contexts)
    with pytest.raises(UserError, match="different held-out data at layers.1"):
        compare([root / "run", root / "other"])


def test_evaluating_twice_gives_the_same_bytes(world):
    root, source, language, _ = world
    before = read_manifest(root / "run" / "evaluation", "evaluation").files
    evaluate_run(root / "run", source, CFG, language)
    assert read_manifest(root / "run" / "evaluation", "evaluation").files == before


def test_the_control_is_a_floor(world):
    members = world[3]["hooks"][HOOK]["members"]
    control = members[CONTROL]["metrics"]
    assert members["plain"]["metrics"]["fvu"]["value"] < control["fvu"]["value"]
    assert abs(control["l0"]["value"] - members["plain"]["metrics"]["l0"]["value"]) < 1


def test_the_twin_differs_in_gamma_alone():
    def member(rule, k, **rest):
        gamma = GammaConfig(rule=rule)
        return MemberConfig(gamma=gamma, d_sae=48, activation=TopK(k=k), **rest)

    wide = TrainConfig(
        members=(
            member("none", 4),
            member("none", 8),
            member("variance", 4),
            member("variance", 8),
        ),
        tokens=100,
    )
    names = wide.names()
    assert find_twins(wide) == {names[2]: names[0], names[3]: names[1]}
    odd = TrainConfig(members=(member("none", 4), member("variance", 2)), tokens=100)
    assert find_twins(odd) == {odd.names()[1]: odd.names()[0]}
    assert find_twins(TrainConfig(members=(member("variance", 2),), tokens=100)) == {}


def test_an_unfinished_run_or_the_wrong_data_is_refused(world, tmp_path):
    root, source, language, _ = world
    with pytest.raises(UserError, match="no such"):
        evaluate_run(tmp_path / "nowhere", source)
    subject = run_subject(root / "run")
    narrow = ArraySource(np.zeros((50, 7), dtype=np.float32), name=HOOK)
    with pytest.raises(UserError, match="width 16, but the data have width 7"):
        evaluate_families(subject, narrow, CFG, language)
    assert (root / "run" / "evaluation" / "manifest.json").exists(), (
        "a refusal leaves the old result"
    )


def test_a_model_that_predicts_nothing_is_measured_without_cross_entropy(world, tmp_path):
    root, source, _, _ = world
    encoder = load_language(str(make_kind(tmp_path / "bert", "bert")))
    cfg = CFG.model_copy(update={"n_latents": 0})
    record = evaluate_families(run_subject(root / "run"), source, cfg, encoder).record
    assert record["notes"] == [PREDICTS_NOTHING]
    metrics = record["hooks"][HOOK]["members"]["plain"]["metrics"]
    assert "fvu" in metrics
    assert not any("ce" in name.split("_") for name in metrics)
