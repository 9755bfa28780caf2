"""Latents against classes on held-out rows: a world made by hand, controls, comparisons with the plain member."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from wsae.acts.source import ArraySource
from wsae.acts.stream import HeldoutRows
from wsae.cli.main import main
from wsae.core.errors import UserError
from wsae.evals.classes import CLASSES, Labelled, Scored, _within, look, score_classes, score_run
from wsae.evals.config import CONTROLS, ClassesConfig
from wsae.evals.glossary import CLASS_SCORES
from wsae.evals.measure import EvaluatedSaes
from wsae.sae import SAE, SAEConfig, TopK
from wsae.sae.config import GammaConfig
from wsae.train.config import MemberConfig, TrainConfig
from wsae.train.run import train_run

CFG = ClassesConfig(batch_size=300, groups=10, permutations=100, draws=200, minibatch=64)
N_CLASSES = 5


def world(n: int = 2000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows with one dimension per class that is on for it, and as many that know no class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, N_CLASSES, n)
    x = np.zeros((n, 2 * N_CLASSES), dtype=np.float32)
    x[np.arange(n), labels] = rng.uniform(1, 2, n)
    x[np.arange(n), N_CLASSES + rng.integers(0, N_CLASSES, n)] = rng.uniform(1, 2, n)
    return x, labels


def reader(k: int = 2, order: list[int] | None = None) -> SAE:
    """An SAE whose latents are the dimensions, in some order."""
    d = 2 * N_CLASSES
    sae = SAE(SAEConfig(d_in=d, d_sae=d, activation=TopK(k=k)))
    rows = torch.eye(d)[order or list(range(d))]
    with torch.no_grad():
        assert sae.W_enc_t is not None
        sae.W_enc_t.copy_(rows)
        sae.W_dec.copy_(rows)
    return sae


def labelled(heldout: float = 0.5, **fields: object) -> Labelled:
    x, labels = world(**fields)
    return Labelled(ArraySource(x, heldout_fraction=heldout), "acts", labels)


def test_class_latents_score_one_and_blind_latents_zero() -> None:
    found = score_classes(EvaluatedSaes({"plain": reader()}), labelled(), CFG)
    arrays = found.members["plain"].arrays
    for score in ("consistency_ncl", "consistency_top", "consistency_corrected", "selectivity"):
        assert torch.allclose(arrays[score][:N_CLASSES], torch.ones(N_CLASSES).double()), score
    blind = arrays["consistency_corrected"][N_CLASSES:]
    assert blind.abs().max() < 0.06
    assert arrays["consistency_ncl"][N_CLASSES:].min() > 1 / N_CLASSES
    assert arrays["label"][:N_CLASSES].tolist() == list(range(N_CLASSES))
    summary = found.record["members"]["plain"]
    assert summary["coverage"]["alive"] == 1.0
    assert summary["l0"] == pytest.approx(2.0)
    low, high = (summary["over_images"]["consistency_corrected"][edge] for edge in ("low", "high"))
    assert low < summary["scores"]["consistency_corrected"]["value"] < high
    assert high - low < 0.05
    # the information of a class that a fifth of the images have, by hand
    p = float(arrays["density"][0])
    entropy = -(p * math.log2(p) + (1 - p) * math.log2(1 - p))
    assert float(arrays["information"][0]) == pytest.approx(entropy, abs=0.005)


@pytest.mark.parametrize("batch_size", [3, 7, 300])
def test_a_sample_is_an_image_however_many_rows_it_has(batch_size) -> None:
    """Twelve rows of each image: scores are those of one row, by chance too; L0 is of rows."""
    once, cfg = labelled(n=100), CFG.model_copy(update={"batch_size": batch_size})

    class Patches:
        hooks = once.source.hooks

        def heldout(self, size):
            (chunk,) = once.source.heldout(10_000)
            x, seq = (part.repeat_interleave(12, 0) for part in (chunk.x["acts"], chunk.seq))
            for part, number in zip(x.split(size), seq.split(size), strict=True):
                yield HeldoutRows({"acts": part}, number, torch.zeros_like(number))

        def tokens(self):
            return None

    family = EvaluatedSaes({"plain": reader()})
    wanted = score_classes(family, once, CFG)
    found = score_classes(family, Labelled(Patches(), "acts", once.labels), cfg)
    assert found.record["class_totals"] == wanted.record["class_totals"]
    assert (found.record["images"], found.record["rows"]) == (50, 600)
    for name, member in (wanted.members | wanted.controls).items():
        other = (found.members | found.controls)[name]
        assert other.summary["l0"] == member.summary["l0"]
        for score in ("support", "density", *CLASS_SCORES):
            assert torch.allclose(other.arrays[score], member.arrays[score], equal_nan=True)


def test_only_held_out_rows_count() -> None:
    x, labels = world()
    source = ArraySource(x, heldout_fraction=0.25)
    wrong = labels.copy()
    kept = np.ones(len(x), dtype=bool)
    kept[source.heldout_rows] = False
    wrong[kept] = 0  # what the training rows are must not matter
    records = [
        score_classes(
            EvaluatedSaes({"plain": reader()}), Labelled(source, "acts", given), CFG
        ).record
        for given in (labels, wrong)
    ]
    assert records[0] == records[1]
    assert sum(records[0]["class_totals"]) == len(source.heldout_rows)


def test_controls_stand_beside_the_members() -> None:
    found = score_classes(EvaluatedSaes({"plain": reader()}), labelled(), CFG)
    names = {f"control-{name.replace('_', '-')}" for name in CONTROLS}
    assert set(found.controls) == names
    shuffled = found.record["controls"]["control-shuffled"]["scores"]["consistency_corrected"]
    assert shuffled["low"] < 0.03
    assert abs(shuffled["value"]) < 0.05
    plain = found.members["plain"].arrays
    dims = found.controls["control-dimensions"].arrays
    for score in ("consistency_ncl", "support"):
        assert torch.equal(plain[score], dims[score])  # the reader's latents are the dimensions
    random = found.record["controls"]["control-random-sae"]
    assert random["l0"] == pytest.approx(2.0, abs=0.7)
    lines = [line for line in found.record["comparisons"] if line["over"] == "control"]
    assert {line["b"] for line in lines} == names
    assert {line["metric"] for line in lines} == set(CLASS_SCORES)


def test_the_same_latents_in_another_order_do_not_differ_and_better_ones_do() -> None:
    d = 2 * N_CLASSES
    turned = reader(order=list(reversed(range(d))))
    better = reader()
    with torch.no_grad():  # sees only the dimensions that know the class, twice over
        assert better.W_enc_t is not None
        better.W_enc_t[N_CLASSES:] = better.W_enc_t[:N_CLASSES]
        better.W_enc_t[N_CLASSES:] += 0.01 * torch.randn(N_CLASSES, d).sign()
    saes = {"plain": reader(), "turned": turned, "better": better}
    family = EvaluatedSaes(saes, {"turned": "plain", "better": "plain"})
    lines = score_classes(family, labelled(), CFG).record["comparisons"]
    found = {(x["a"], x["over"]): x for x in lines if x["metric"] == "consistency_corrected"}
    for way in ("all", "matched", "images"):
        assert found["turned", way]["difference"] == pytest.approx(0.0, abs=1e-12)
    assert found["turned", "matched"]["n"] == d
    assert found["better", "all"]["low"] > 0
    assert found["better", "images"]["low"] > 0.3


def test_a_run_is_scored_into_a_directory(tmp_path) -> None:
    x, labels = world(600)
    source = ArraySource(x, heldout_fraction=0.4, labels=labels)
    members = tuple(
        MemberConfig(gamma=gamma, d_sae=16, activation=TopK(k=2), lr=1e-2)
        for gamma in (GammaConfig(), GammaConfig(rule="consistency"))
    )
    cfg = TrainConfig(members=members, tokens=3600, batch_size=60)
    train_run(cfg, source, tmp_path / "run")
    record = score_run(tmp_path / "run", source, labels, CFG)
    kept = json.loads((tmp_path / "run/classes" / CLASSES).read_text())
    assert kept == json.loads(json.dumps(record))
    entry = kept["hooks"]["acts"]
    assert set(entry["members"]) == {"plain", "consistency-a1"}
    assert {line["a"] for line in entry["comparisons"]} == {"plain", "consistency-a1"}
    ways = {line["over"] for line in entry["comparisons"] if line["b"] == "plain"}
    assert ways == {"all", "matched", "density", "adjusted", "within", "images"}
    assert score_run(tmp_path / "run", source, labels, CFG) == record  # seeded throughout


def test_bad_input_ends_in_one_line() -> None:
    x, labels = world(200)
    source, family = ArraySource(x, heldout_fraction=0.5), EvaluatedSaes({"plain": reader()})
    with pytest.raises(UserError, match="all of class 3; consistency needs two"):
        look(Labelled(source, "acts", np.full(200, 3)), CFG)
    with pytest.raises(UserError, match="held-out image .* has no class"):
        score_classes(family, Labelled(source, "acts", labels[:20]), CFG)
    with pytest.raises(UserError, match="has no class"):
        score_classes(family, Labelled(source, "acts", np.where(labels == 1, -1, labels)), CFG)
    with pytest.raises(UserError, match="no hook 'other'; they have acts"):
        score_classes(family, Labelled(source, "other", labels), CFG)
    with pytest.raises(UserError, match="no held-out images"):
        score_classes(family, Labelled(ArraySource(x, heldout_fraction=0.0), "acts", labels), CFG)
    narrow = ArraySource(x[:, :4], heldout_fraction=0.5)
    with pytest.raises(UserError, match="takes activations of width 10"):
        score_classes(family, Labelled(narrow, "acts", labels), CFG)


def test_fewer_images_than_strongest_samples_are_counted_not_scored() -> None:
    data = labelled(heldout=0.01)
    found = score_classes(EvaluatedSaes({"plain": reader()}), data, CFG)
    summary = found.record["members"]["plain"]
    assert summary["scores"]["consistency_top"] == {
        "value": None,
        "low": None,
        "high": None,
        "n": 0,
    }
    assert summary["scores"]["consistency_corrected"]["n"] == 0
    assert summary["coverage"]["supported"] == 0.0
    assert summary["ncl"]["n"] > 0
    assert summary["ncl"]["minibatch"] is None


def test_the_docs_have_every_scores_formula():
    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text().replace("\\|", "|")
    for key, entry in CLASS_SCORES.items():
        row = (entry.name, f"`{key}`", entry.formula, entry.direction)
        assert f"| {' | '.join(row)} |" in text, key


def test_evaluate_scores_an_array_against_given_classes(tmp_path, capsys):
    x, labels = world(600)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "labels.npy", labels)
    np.save(tmp_path / "short.npy", labels[:-1])
    words = ["train", str(tmp_path / "x.npy"), "--out", str(tmp_path / "run"), "--k", "2"]
    words += [
        "--labels",
        str(tmp_path / "labels.npy"),
        "--gamma",
        "consistency",
        "--tokens",
        "2000",
    ]
    assert main([*words, "--batch-size", "64", "--d-sae", "16", "--device", "cpu"]) == 0
    evaluate = ["evaluate", str(tmp_path / "run"), "--draws", "20", "--device", "cpu", "--json"]
    capsys.readouterr()
    assert main([*evaluate, "--labels", str(tmp_path / "labels.npy")]) == 0
    found = json.loads(capsys.readouterr().out)["classes"]
    source = ArraySource(tmp_path / "x.npy", labels=labels, name="x")
    (hook,) = found["hooks"]
    wanted = np.bincount(labels[source.heldout_rows]).tolist()
    assert found["hooks"][hook]["class_totals"] == wanted
    assert main(evaluate) == 0
    assert "classes" not in json.loads(capsys.readouterr().out)
    assert main([*evaluate, "--labels", str(tmp_path / "short.npy")]) == 2
    assert "599 labels for 600 rows" in capsys.readouterr().err


def test_a_richer_mix_of_easy_classes_is_no_difference_within_classes():
    """Two members whose latents of a class are equally pure, but one has more of the pure class."""
    rng = np.random.default_rng(0)

    def member(name: str, pure: int, mixed: int, lift: float = 0.0) -> Scored:
        score = np.r_[
            0.9 + 0.02 * rng.standard_normal(pure), 0.3 + 0.02 * rng.standard_normal(mixed)
        ]
        label = np.r_[np.zeros(pure, dtype=np.int64), np.ones(mixed, dtype=np.int64)]
        arrays = {"selectivity": torch.from_numpy(score + lift), "label": torch.from_numpy(label)}
        return Scored(name, arrays, {}, {})

    few, many, better = (
        member("few", 50, 150),
        member("many", 150, 50),
        member("better", 150, 50, 0.1),
    )
    same = _within(many, few, "selectivity", CFG)
    assert same.difference == pytest.approx(0, abs=0.01)
    assert same.low < 0 < same.high
    lifted = _within(better, few, "selectivity", CFG)
    assert lifted.low < 0.1 < lifted.high
    assert lifted.low > 0.08
    share = (150 + 50) / 400
    gaps = [
        a.known("selectivity")[a.arrays["label"] == c].mean() for c in (0, 1) for a in (better, few)
    ]
    wanted = share * (gaps[0] - gaps[1]) + (1 - share) * (gaps[2] - gaps[3])
    assert lifted.difference == pytest.approx(wanted)
