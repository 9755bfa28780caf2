"""The report's sentences: no claim beyond what an interval shows, for either sign, and numbers a reader can compare."""

import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_fixture import CONTROL, edit_evaluation, write_run

from wsae.report.rundata import finite, read_run
from wsae.report.view import clause, interval, judge, judgements, number, verdict


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture
def editable(run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(run, tmp_path / "run")


@pytest.mark.parametrize(
    ("difference", "low", "high", "metric", "outcome"),
    [
        (0.04, 0.03, 0.05, "fvu", "worse"),
        (-0.04, -0.05, -0.03, "fvu", "better"),
        (0.04, 0.03, 0.05, "ce_loss_recovered_zero", "better"),
        (-0.04, -0.05, -0.03, "ce_loss_recovered_zero", "worse"),
        (0.04, -0.01, 0.09, "fvu", "none"),
        (0.0, 0.0, 0.0, "fvu", "none"),
        (0.04, 0.0, 0.09, "fvu", "none"),
        (2.0, 1.0, 3.0, "l0", "higher"),
        (-2.0, -3.0, -1.0, "l0", "lower"),
        (0.04, None, 0.05, "fvu", "unknown"),
        (0.04, float("nan"), 0.05, "fvu", "unknown"),
    ],
)
def test_outcome_follows_sign_direction_and_interval(
    difference, low, high, metric, outcome
) -> None:
    line = {
        "a": "w",
        "b": "plain",
        "metric": metric,
        "difference": difference,
        "low": low,
        "high": high,
    }
    judged = judge(line, {})
    assert judged is not None
    assert judged.outcome == outcome


def test_glossary_overrules_the_builtin_direction() -> None:
    line = {"a": "w", "b": "plain", "metric": "fvu", "difference": 1.0, "low": 0.5, "high": 1.5}
    for said, outcome in (
        ("higher is better", "better"),
        ("neither direction is better", "higher"),
    ):
        judged = judge(line, {"fvu": {"direction": said}})
        assert judged is not None
        assert judged.outcome == outcome


@given(st.floats(-1, 1), st.floats(0, 1), st.floats(0, 1))
def test_verdict_claims_a_change_only_when_the_interval_excludes_zero(
    d: float, below: float, above: float
) -> None:
    line = {
        "a": "w",
        "b": "plain",
        "metric": "fvu",
        "difference": d,
        "low": d - below,
        "high": d + above,
    }
    judged = judge(line, {})
    assert judged is not None
    covers = d - below <= 0 <= d + above
    assert (judged.outcome == "none") == covers
    same = d == below == above == 0
    assert ("no difference" in judged.mark) == (covers and not same)
    assert (judged.mark == "= the same") == same


def test_verdict_names_data_member_and_each_change(run: Path) -> None:
    data = read_run(run)
    said = verdict(data, "layers.9").replace("\u00a0", " ")
    assert said.startswith(
        "On held-out text (50,000 tokens in 200 sequences), variance weighting (α = 1) raised plain FVU"
    )
    assert "from 0.210 to 0.251 (worse: +0.041 [+0.035, +0.047])" in said
    assert "lowered weighted FVU (better: −0.090 [−0.099, −0.081])" in said, (
        "two gammas: no 'from ... to'"
    )
    assert (
        "showed no difference in CE loss recovered (zero) (−0.0010 [−0.0040, +0.0020] covers 0)"
        in said
    )


def test_verdict_turns_with_the_sign(editable: Path) -> None:
    def flip(value: dict) -> None:
        for line in value["hooks"]["layers.9"]["comparisons"]:
            line["difference"], line["low"], line["high"] = (
                -line["difference"],
                -line["high"],
                -line["low"],
            )

    edit_evaluation(editable, flip)
    said = verdict(read_run(editable), "layers.9")
    assert "lowered plain FVU (better" in said
    assert "raised weighted FVU (worse" in said
    assert "from" not in said, "the values no longer agree with the difference"


def test_unpaired_and_missing_intervals_are_said(run: Path) -> None:
    data = read_run(run)
    line = {
        "a": "variance-a1",
        "b": "plain",
        "metric": "dead_frac",
        "difference": 0.1,
        "n": 9,
        "unit": "latent",
        "paired": False,
    }
    judged = judge(line, {})
    assert judged is not None
    assert judged.how == "unpaired bootstrap over 9 latents"
    assert "no interval was computed" in clause(data, "layers.9", judged)


def test_several_plain_twins_each_judge_their_own_member(editable: Path) -> None:
    def second_twin(value: dict) -> None:
        found = value["hooks"]["layers.9"]
        found["members"]["none-k64"] = found["members"]["plain"]
        for line in found["comparisons"]:
            if line["a"] == "variance-a0.5":
                line["b"] = "none-k64"

    edit_evaluation(editable, second_twin)
    data = read_run(editable)
    assert data.members("layers.9")[:2] == ["plain", "none-k64"]
    assert data.members("layers.9")[-1] == CONTROL
    twins = {member: judged.line.b for (member, _), judged in judgements(data, "layers.9").items()}
    assert twins == {"variance-a1": "plain", "variance-a0.5": "none-k64"}


@pytest.mark.parametrize(
    ("value", "low", "high", "text"),
    [
        (0.2134, 0.2040, 0.2222, "0.213 [0.204, 0.222]"),
        (-0.5, -0.81, -0.19, "−0.50 [−0.81, −0.19]"),
        (32.0, 32.0, 32.0, "32.0 [32.0, 32.0]"),
        (1234.0, 1000.0, 1500.0, "1,234 [1,000, 1,500]"),
        (0.2134, None, None, "0.213"),
    ],
)
def test_interval_shows_two_digits_of_its_width(value, low, high, text) -> None:
    assert interval(value, low, high).replace("\u00a0", " ") == text


def test_number_formats() -> None:
    cases = {
        0.0: "0",
        0.2134: "0.213",
        12.3: "12.3",
        1234.4: "1,234",
        3.2e-4: "3.20e−04",
        -1.5: "−1.50",
    }
    assert {value: number(value) for value in cases} == cases
    assert number(None) == "–"
    assert finite(float("nan")) is None
    assert finite(True) is None
