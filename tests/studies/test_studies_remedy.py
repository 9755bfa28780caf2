"""The study of remedies: its analysis on made-up rows, the whole of it on a tiny model, and on a few images."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from remedy_arms import SHOWN, Arms, ArmsConfig
from remedy_images import ARMS, ImageRemedy, ImageRemedyConfig, over_images
from wsae.acts.config import HarvestConfig, ImageHarvestConfig, ImagesConfig, TextConfig
from wsae.acts.harvest import harvest
from wsae.acts.images.harvest import harvest_images
from wsae.acts.images.sets import open_images
from wsae.acts.text import documents
from wsae.cli.main import main
from wsae.core.files import read_json
from wsae.evals.config import CONTROL, ClassesConfig, EvalConfig, ProbeConfig
from wsae.evals.latents import unit_rows
from wsae.studies.engine import Reproduction, reproduce_study
from wsae.studies.reproduce import reproduce
from wsae.studies.tables import (
    Arm,
    _like,
    arm_names,
    holm,
    judged_arms,
    nearest_cosine,
    tiny_model,
    told_from_random,
)
from wsae.vision.config import preset
from wsae.vision.pretrain import pretrain

HOOKS = tuple(f"layers.{i}" for i in range(6))
OFFSETS = np.array([0.3, -0.3, 0.2, -0.2, 0.1, -0.1])
"""What sets the blocks apart; a multiple of it has mean 0."""


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_rejects_exactly_what_stepping_down_rejects(p: list[float]) -> None:
    level, rejected = 0.05, set()
    for place, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        if p[i] * (len(p) - place) >= level:
            break
        rejected.add(i)
    corrected = holm(p)
    assert {i for i, value in enumerate(corrected) if value < level} == rejected
    assert all(own <= value <= 1 for own, value in zip(p, corrected, strict=True))


def rows(**arms: dict[str, float]) -> list[dict]:
    """Rows of six blocks, two seeds at the first three: an arm is plain plus a gain that differs by block."""
    out = []
    for place, hook in enumerate(HOOKS):
        for seed in (0, 1) if place < 3 else (0,):
            plain = {"probe_1": 80.0 + seed, "probe_16": 90.0, "fvu": 0.2, "dead_frac": 2.0}
            here = {"plain": plain, CONTROL: plain | {"probe_1": 70.0}}
            for name, arm in arms.items():
                jitter = OFFSETS[place] * arm.get("jitter", 1.0)
                here[name] = {
                    "probe_1": plain["probe_1"] + arm["gain"] + jitter,
                    "probe_16": 90.0 + arm["gain"] + jitter,
                    "fvu": 0.2 * arm.get("ratio", 1.0),
                    "dead_frac": 2.0 + arm.get("dead", 0.0),
                }
            for name, values in here.items():
                tasks = [values["probe_1"] / 100 + 0.01 * i for i in (-1, 0, 1)]
                about = {"hook": hook, "seed": seed, "member": name, "probe_1_by_task": tasks}
                out.append(about | values)
    return out


def judge(**arms: dict[str, float]) -> dict[str, Arm]:
    return {arm.name: arm for arm in judged_arms(rows(**arms), HOOKS)}


def test_an_arm_helps_only_where_its_gain_is_sure_and_cheap() -> None:
    found = judge(
        sure={"gain": 2.0},
        dear={"gain": 2.0, "ratio": 1.2},
        deadly={"gain": 2.0, "dead": 1.5},
        unsure={"gain": 0.1, "jitter": 10.0},
        bad={"gain": -2.0},
    )
    assert {name: arm.verdict for name, arm in found.items()} == {
        "sure": "helps",
        "dear": "better probes at a price",
        "deadly": "better probes at a price",
        "unsure": "no difference shown",
        "bad": "hurts",
    }
    mean = found["sure"].differences["probe_1"]
    assert (mean.value, mean.n) == (pytest.approx(2.0), 6)  # blocks, not runs
    s = OFFSETS.std(ddof=1)
    assert mean.high - mean.value == pytest.approx(2.5706 * s / 6**0.5, rel=1e-4)
    assert found["sure"].detectable == pytest.approx((2.5706 + 0.9195) * s / 6**0.5, rel=1e-3)
    assert found["dear"].fvu_ratio == pytest.approx(1.2)


def test_a_gain_that_is_sure_alone_may_not_be_among_many() -> None:
    weak = {"gain": 0.45, "jitter": 1.5}
    alone = judge(weak=weak)["weak"]
    many = judge(weak=weak, **{f"other{i}": {"gain": 0.0} for i in range(20)})["weak"]
    assert alone.p == pytest.approx(many.p)
    assert (alone.verdict, many.verdict) == ("helps", "no difference shown")


def test_the_measure_is_told_from_random_over_the_tasks() -> None:
    found = rows(arm={"gain": 0.0})
    assert arm_names(found) == ["arm"]
    told = told_from_random(found, HOOKS[0])
    assert told.value == pytest.approx(10.0)
    assert told.sure


def test_agreement_is_above_chance_for_the_same_directions_alone() -> None:
    g = torch.Generator().manual_seed(0)
    spread = torch.logspace(0, 2, 12)
    a = unit_rows(torch.randn(60, 12, generator=g) * spread)
    turned = a[torch.randperm(60, generator=g)]
    assert nearest_cosine(a, turned) == pytest.approx(1.0, abs=1e-5)
    other = unit_rows(torch.randn(60, 12, generator=g) * spread)
    chance = nearest_cosine(_like(a, 0), _like(other, 1))
    assert nearest_cosine(a, other) == pytest.approx(chance, abs=0.05)
    assert nearest_cosine(a, turned) - chance > 0.05


def test_the_whole_study_on_a_tiny_model(tmp_path: Path) -> None:
    result = reproduce("remedy", Reproduction("tiny", tmp_path))
    arms = {arm["name"] for arm in result["arms"]}
    assert arms == {"residual-a1", "whiten-input-p0.5", "gap-a1"}
    assert set(result["told_from_random"]) == {"layers.0", "layers.1"}
    assert {row["hook"] for row in result["agreement"]} == {"layers.1"}
    text = (tmp_path / "remedy" / "tables.md").read_text()
    assert "Every arm against its plain twin" in text
    assert all(Path(file).is_file() for file in result["files"])
    again = reproduce("remedy", Reproduction("tiny", tmp_path))  # nothing is run twice
    assert again["arms"] == result["arms"]


def test_arms_are_measured_beside_plain_over_several_stores(tmp_path: Path) -> None:
    made, text = ("layers.0", "layers.1"), tmp_path / "text.jsonl"
    read = sorted((d.text for d in itertools.islice(documents(TextConfig()), 24)), key=len)
    labelled = [{"text": t, "source": "short" if i < 12 else "long"} for i, t in enumerate(read)]
    text.write_text("".join(json.dumps(row) + "\n" for row in labelled))
    few = {"tokens": 2048, "heldout_tokens": 4096, "seq_len": 64, "heldout_fraction": 0.6}
    model = str(tiny_model(tmp_path / "model"))
    harvest(HarvestConfig(model=model, hooks=made, **few), tmp_path / "store")
    cfg = ArmsConfig(
        store=tmp_path / "store",
        arms=("plain", "residual-map", "half"),
        tested=("residual-map", "half"),
        passes=1,
        measures=("rules", "ce", "documents"),
        text=text,
        probing=ProbeConfig(k=(1, 16), least=2, draws=20, ablated=(20,), documents=12),
        splicing=EvalConfig(splice_tokens=256, n_latents=0, draws=20),
    )
    first, second = tmp_path / "first", tmp_path / "second"
    for out, hook, beside in ((first, made[0], ()), (second, made[1], (first,))):
        here = cfg.model_copy(update={"hooks": (hook,), "beside": beside})
        found, _ = reproduce_study(Arms(here, out / "runs"), out)
    rows = [row for out in (first, second) for row in read_json(out / "rows.json")]
    value = {(row["hook"], row["member"], key): row[key] for row in rows for key in row}
    for key in ("fvu", "ce_delta", "probe_1", "documents_probe_1", "documents_tpp_20"):
        title, _, form = SHOWN[key]
        shown = found["tables"][f"{title}, less plain"]["rows"]
        table = {name: cells for name, *cells in shown}
        gaps = [[value[h, arm, key] - value[h, "plain", key] for h in made] for arm in cfg.tested]
        p = [float(stats.ttest_1samp(own, 0)[1]) for own in gaps]
        for arm, own, corrected in zip(cfg.tested, gaps, holm(p), strict=True):
            mean, sure, *each = table[arm]
            assert mean.startswith(f"{np.mean(own):+{form}}")
            assert sure == f"{corrected:.2g}"
            assert each == [f"{gap:+{form}}" for gap in reversed(own)]  # its own hooks first


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place, digits = tmp_path_factory.mktemp("images"), ImagesConfig(path="digits")
    cfg = preset("tiny", images=digits, epochs=1, limit=900, method="ncl")
    model = str(pretrain(cfg, open_images(digits), place / "ncl").path)
    harvest = {"model": model, "images": digits, "hooks": ("pooler", "projector"), "limit": 900}
    return harvest_images(ImageHarvestConfig(**harvest), place / "store").path


@pytest.mark.parametrize("name", ["remedy", "table1"])
def test_a_store_of_images_is_refused_at_the_start(name, store, tmp_path, capsys) -> None:
    assert main(["reproduce", name, "--store", str(store), "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"--store {store}: {name} is about tokens, and these rows are of images" in line


def test_the_whole_study_on_a_few_images(store: Path, tmp_path: Path) -> None:
    few = {"draws": 50, "permutations": 10, "min_support": 3, "n_top": 3}
    cfg = ImageRemedyConfig(
        store=store,
        seeds=(3, 5),
        d_sae=16,
        k=2,
        passes=2,
        batch_size=128,
        evaluation=EvalConfig(splice_tokens=0, n_latents=0, assignment_max=0, draws=50),
        classes=ClassesConfig(groups=0, assignment_max=1, minibatch=0, **few),
        probing=ProbeConfig(k=(1, 16), least=3, draws=50, ablated=()),
    )
    said: list[str] = []
    result, _ = reproduce_study(ImageRemedy(cfg, tmp_path / "runs", say=said.append), tmp_path)
    arms = [arm for found in result["arms"].values() for arm in found]
    tests = 2 * (len(ARMS) - 1)  # at two hooks, those too that constant dimensions leave out
    assert 0 < tests - len(arms) <= 2
    least = min(arms, key=lambda arm: arm["p"])
    assert least["corrected"] == pytest.approx(min(1.0, tests * least["p"]))
    assert "Agreement of two seeds" in (tmp_path / "tables.md").read_text()
    study, again = ImageRemedy(cfg, tmp_path / "runs", say=said.append), len(said)
    rows = [row for run in study.runs() for row in study.rows(run)]
    for hook in ("pooler", "projector"):
        for arm in result["arms"][hook]:
            gap = over_images(rows, hook, arm["name"], cfg.probing)
            assert 100 * gap.difference == pytest.approx(arm["differences"]["probe_1"][0])
            assert gap.low <= gap.difference <= gap.high
    study.run()
    assert len(said) == again  # nothing is run twice
