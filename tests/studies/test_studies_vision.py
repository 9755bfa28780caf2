"""Figures 4 and 5: plans, presets, verdicts by hand, and the tiny preset from images to pictures."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from halting import HaltingProgress
from safetensors.torch import load_file

from wsae.acts.config import ImagesConfig
from wsae.acts.source import StoreSource
from wsae.cli.main import main
from wsae.core.errors import UserError
from wsae.studies import reproduce_config as presets
from wsae.studies.reproduce_config import VisionChoices, vision_config
from wsae.studies.vision import FigureStudy, announce, figure4, figure5, top_consistency

NONE = VisionChoices()


# --- plans and presets -----------------------------------------------------------------------------------


def test_both_figures_share_families_on_ncl_and_figure_4_has_simclr_too(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(presets, "FASHION", (tmp_path,))
    four, five = (vision_config(name, "small", NONE) for name in ("figure4", "figure5"))
    runs = {(run.backbone, run.hook, run.seed): run for run in four.plan.runs}
    assert set(runs) == {
        (backbone, hook, seed)
        for backbone, hook in (("ncl", "pooler"), ("ncl", "projector"), ("simclr", "pooler"))
        for seed in range(3)
    }
    assert [run for run in four.plan.runs if run.backbone == "ncl"] == list(five.plan.runs)
    labels = {weighting.label for weighting in five.plan.runs[0].weightings}
    powers = {f"consistency-a{a}" for a in ("0.5", "1", "2")}
    assert labels == {"plain", "variance-a1", "top-a1"} | powers
    assert {backbone.name for backbone in five.used()} == {"ncl"}
    assert (four.plan.sae.d_sae, four.plan.sae.k) == (16384, 16)
    top = tuple(np.linspace(0.1, 1, 512))
    training = four.training(0, 48_000, top)
    assert training.names() == [weighting.label for weighting in four.plan.runs[0].weightings]
    assert training.members[-2].gamma.vector == top
    for name in ("ncl", "simclr"):  # what is held out of pretraining is what is scored
        made, harvest = four.backbone(name).pretrain, four.harvest(name, tmp_path)
        assert harvest.heldout_fraction == made.heldout_fraction > 0
        assert harvest.seed == made.seed


def test_the_papers_preset_is_its_setting() -> None:
    cfg = vision_config("figure4", "paper", NONE, device="cuda")
    (backbone,) = cfg.backbones
    assert (backbone.pretrain.method, backbone.pretrain.epochs) == ("ncl", 100)
    assert (backbone.pretrain.projector_hidden, backbone.pretrain.projector_out) == (16384, 2048)
    assert (cfg.plan.sae.d_sae, cfg.plan.sae.k) == (16384, 16)
    said = announce(cfg, 126_689, torchrun_hint=True)
    assert "100 epochs" in said[1]
    assert "torchrun" in said[-1]


def test_without_images_one_line_says_what_to_give(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(presets, "FASHION", (tmp_path / "nothing",))
    with pytest.raises(UserError, match=r"figure4, preset small: .* give --images PATH"):
        vision_config("figure4", "small", NONE)
    cfg = vision_config("figure4", "small", VisionChoices(images="some.npz"))
    assert cfg.images.path == "some.npz"
    assert cfg.backbones[0].pretrain.images == cfg.images


def test_images_without_classes_are_refused(tmp_path) -> None:
    images = np.zeros((20, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "bare.npz", images=images)
    cfg = vision_config("figure4", "tiny", VisionChoices(images=str(tmp_path / "bare.npz")))
    with pytest.raises(UserError, match="have no classes"):
        FigureStudy(cfg, tmp_path / "out").run()


# --- verdicts --------------------------------------------------------------------------------------------


def rows(gain: float, noise: float = 0.001) -> list[dict]:
    """Rows of three seeds in which consistency rises by `gain` for each unit of alpha, and the error by a hundredth."""
    out = []
    alphas = {"plain": 0.0, "consistency-a0.5": 0.5, "consistency-a1": 1.0, "variance-a1": 1.0}
    for seed in range(3):
        for name, alpha in alphas.items():
            value = 0.4 + 0.1 * seed + gain * alpha + noise * (seed - 1) * alpha
            proxy = {"p": "none", "c": "consistency", "v": "variance"}[name[0]]
            row = {"backbone": "ncl", "hook": "pooler", "seed": seed, "member": name}
            scores = ("consistency_ncl", "consistency_top", "consistency_corrected")
            row |= dict.fromkeys(scores, value) | {"fvu": 0.2 * (1 + 0.01 * alpha)}
            out.append(row | {"proxy": proxy, "alpha": alpha, "fvu_weighted": 0.1})
    return out


def test_differences_are_paired_by_seed_and_judged() -> None:
    (panel, *_) = figure4(rows(0.02))
    assert panel.verdict == "reproduced"  # though seeds differ by far more than members
    assert "SAE 50.0 %, WSAE 52.0 %: +2.0 points [+1.8, +2.2] over 3 seeds" in panel.ours
    assert {figure4(rows(gain))[0].verdict for gain in (0.0, 0.004)} == {"not reproduced"}
    assert figure4(rows(-0.02))[0].verdict == "opposite"
    assert figure4(rows(0.02, noise=0.02))[0].verdict == "not reproduced"
    panels = {(p.panel[:2], p.score): p for p in figure5(rows(0.02))}
    assert panels["5a", "consistency_corrected"].verdict == "reproduced"
    assert panels["5a", "consistency_corrected"].series[0].levels == (0.0, 0.5, 1.0)
    assert panels["5b", "consistency_top"].verdict == "reproduced"
    assert panels["5c", "fvu"].verdict == "reproduced"
    assert "alpha 1: +1.0%" in panels["5c", "fvu"].ours
    # half of an alpha of 0.5 is negligible: the whole panel is then only partly so
    assert figure5(rows(0.008))[0].verdict == "partly"


def test_a_score_that_some_seed_lacks_is_not_judged() -> None:
    found = rows(0.02)
    found[0]["consistency_top"] = None
    (panel,) = [p for p in figure4(found) if p.score == "consistency_top"]
    assert panel.verdict == "not reproduced"
    assert "not scored" in panel.ours


# --- end to end ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Figure 5 at its tiny size, in one go."""
    place = tmp_path_factory.mktemp("whole")
    code = main(
        ["reproduce", "figure5", "--preset", "tiny", "--out", str(place), "--device", "cpu"]
    )
    assert code == 0
    return place / "tiny"


def test_figure_5_has_its_panels_tables_and_pictures(whole) -> None:
    found = json.loads((whole / "figure5.json").read_text())
    assert {panel["panel"][:2] for panel in found["panels"]} == {"5a", "5b", "5c"}
    for panel in found["panels"]:
        assert panel["paper"]
        assert panel["ours"]
        for series in panel["series"]:
            assert all(np.isfinite(series["mean"]))
            assert series["n"] == 2
    for part in "abc":
        assert (whole / f"figure5/figure5{part}.png").read_bytes()[:4] == b"\x89PNG"
    assert "| plain |" in (whole / "figure5/tables.md").read_text()
    rows = json.loads((whole / "figure5/rows.json").read_text())
    members = [row for row in rows if row["proxy"] != "control"]
    assert {row["hook"] for row in members} == {"pooler", "projector"}
    assert all(0 < row["fvu"] < 1 for row in members)
    assert all(row["differences"] for row in members if row["member"] != "plain")
    shuffled = [row for row in rows if row["member"] == "control-shuffled"]
    for plain, control in zip((r for r in rows if r["member"] == "plain"), shuffled, strict=True):
        assert plain["consistency_corrected"] > control["consistency_corrected"]


def test_figure_4_uses_what_figure_5_trained(whole, capsys) -> None:
    stamps = {path: path.stat().st_mtime_ns for path in whole.rglob("vision/**/manifest.json")}
    words = ["--preset", "tiny", "--out", str(whole.parent), "--device", "cpu"]
    assert main(["reproduce", "figure4", *words]) == 0
    out = capsys.readouterr().out
    assert "WSAE notably above SAE" in " ".join(out.split())
    assert (whole / "figure4/figure4.png").exists()
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_gamma_comes_from_training_images_and_scores_from_the_others(whole) -> None:
    source = StoreSource(whole / "vision/store/ncl", ("pooler",))
    train, heldout = (set(source.store.places(split)[0].tolist()) for split in ("train", "heldout"))
    assert train
    assert heldout
    assert not train & heldout
    labels = presets_labels()
    x = source.store.rows("train", np.arange(source.n_rows))["pooler"].numpy()
    y = labels[source.store.places("train")[0].numpy()]
    beta = top_consistency(source, labels, 10, whole / "again.json")
    for i in range(x.shape[1]):
        strongest = np.argsort(-x[:, i], kind="stable")[:10]
        wanted = np.bincount(y[strongest]).max() / 10 if (x[:, i] > 0).sum() >= 10 else 0.0
        assert beta[i] == pytest.approx(wanted)
    run = whole / "vision/runs/ncl/pooler/seed-0"
    gamma = load_file(run / "members/pooler/top-a1/sae.safetensors")["gamma"].double()
    proxy = torch.tensor(beta, dtype=torch.float64)
    assert torch.allclose(gamma, proxy / proxy.square().mean().sqrt(), atol=1e-6)
    classes = json.loads((run / "classes/classes.json").read_text())["hooks"]["pooler"]
    assert classes["images"] == len(heldout)
    assert classes["class_totals"] == np.bincount(labels[sorted(heldout)]).tolist()


def presets_labels() -> np.ndarray:
    from wsae.acts.images.sets import open_images

    labels = open_images(ImagesConfig()).labels
    assert labels is not None
    return labels


def test_a_killed_figure_goes_on_and_ends_as_an_unbroken_one(whole, tmp_path) -> None:
    given = VisionChoices(pretrained=(whole / "vision/pretrain/ncl",))
    cfg = vision_config("figure5", "tiny", given)
    two = cfg.plan.model_copy(update={"runs": cfg.plan.runs[:2]})
    cfg = cfg.model_copy(update={"plan": two})
    with pytest.raises(KeyboardInterrupt):
        FigureStudy(cfg, tmp_path / "vision", HaltingProgress()).run()
    said: list[str] = []
    FigureStudy(cfg, tmp_path / "vision", say=said.append).run()
    assert said[0].startswith("train 2 of 2")
    made = tmp_path / "vision/runs"
    weights, scores = sorted(made.rglob("sae.safetensors")), sorted(made.rglob("classes.json"))
    assert (len(weights), len(scores)) == (10, 2)
    for path in (*weights, *scores):
        twin = whole / "vision/runs" / path.relative_to(made)
        assert path.read_bytes() == twin.read_bytes(), path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("table1", "--images", "x.npz"), "table1: takes no --images"),
        (("figure4", "--judge", "x", "--endpoint", "http://y"), "figure4: takes no --model"),
        (("figure4", "--pretrained", "nowhere"), "nowhere: no such directory"),
    ],
)
def test_wrong_words_end_with_one_line(words, message, tmp_path, capsys) -> None:
    code = main(["reproduce", *words, "--out", str(tmp_path)])
    err = capsys.readouterr().err
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
