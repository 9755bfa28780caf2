"""The study of remedies: its analysis on made-up rows, and the whole of it on a tiny model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wsae.evals.config import CONTROL
from wsae.evals.latents import unit_rows
from wsae.studies.engine import Reproduction
from wsae.studies.reproduce import reproduce
from wsae.studies.tables import (
    Arm,
    _like,
    arm_names,
    holm,
    judged_arms,
    nearest_cosine,
    told_from_random,
)

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
