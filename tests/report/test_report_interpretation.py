"""What the page says about interpretability: scores with intervals beside their controls, nothing left unsaid."""

import json
import shutil
from pathlib import Path

import pytest
from report_fixture import (
    EXPLANATION,
    INTERPRET_CONTROLS,
    NEW_LATENT,
    SCORES,
    write_interpretation,
    write_run,
)

from wsae.core.artifact import write_manifest
from wsae.core.errors import UserError
from wsae.core.files import write_json
from wsae.report.charts import pack_contexts
from wsae.report.html import write_report
from wsae.report.rundata import read_run
from wsae.report.view import ScoresForm, scores_form

HOOK = "layers.9"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_interpretation(write_run(tmp_path_factory.mktemp("seen") / "run"))


def seen(run: Path) -> ScoresForm:
    data = read_run(run)
    view = scores_form(data, HOOK, data.interpretation)
    assert view is not None
    return view


def test_every_score_stands_beside_its_controls_with_an_interval(run: Path) -> None:
    view = seen(run)
    names = [column.name for column in view.columns]
    assert names == ["plain", "variance-a1", "variance-a0.5", *INTERPRET_CONTROLS]
    assert [row.key for row in view.rows] == list(SCORES)
    for row in view.rows:
        for name, cell in zip(names, row.cells, strict=True):
            shift = INTERPRET_CONTROLS.get(name, 0.01 * names.index(name))
            assert float(cell.value) == pytest.approx(SCORES[row.key] + shift, abs=1e-3)
            assert cell.bounds.startswith("[")


def test_a_weighted_member_is_compared_over_matched_latents_and_the_other_ways_are_told(
    run: Path,
) -> None:
    view = seen(run)
    plain, weighted, *_ = view.rows[0].cells
    assert plain.judged is None
    assert plain.also == []
    assert weighted.judged is not None
    assert weighted.judged.text.startswith("+0.05")
    assert weighted.judged.outcome == "better"
    assert [line.split(":")[0] for line in weighted.also] == [
        "all latents",
        "latents of the same density",
    ]


def test_what_was_skipped_failed_or_not_asked_is_counted_on_the_page(run: Path) -> None:
    view = seen(run)
    facts = {name: cells[0] for name, cells in view.facts}
    assert facts["latents scored"] == "40 of 50 (10 skipped: few windows)"
    assert facts["Detection: answers"] == "400 requested = 390 parsed + 7 failed + 3 not asked"
    assert "Embedding detection: answers" not in facts, "nobody was asked"


def test_hostile_text_of_models_and_settings_is_escaped(run: Path, tmp_path: Path) -> None:
    text = write_report(run, tmp_path / "r.html").read_text(encoding="utf-8")
    assert "</td><script>" not in text
    assert "&lt;/td&gt;&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "judge of detection &lt;i&gt;" in text
    assert text.count("<script") == 2
    assert EXPLANATION not in text


def test_latents_of_evaluation_and_interpretation_are_listed_once(run: Path) -> None:
    contexts = read_run(run).contexts[HOOK]
    for latents in contexts.values():
        numbers = [entry["latent"] for entry in latents]
        assert len(numbers) == len(set(numbers))
    by_latent = {entry["latent"]: entry for entry in contexts["plain"]}
    assert by_latent[NEW_LATENT]["scores"].keys() == SCORES.keys()
    assert sum("scores" in entry for entry in contexts["plain"]) == 7
    packed = pack_contexts(read_run(run))
    assert packed["scores"] == ["Embedding detection", "Surprisal detection", "Detection"]


def test_the_page_shows_scores_of_a_run_that_was_not_evaluated(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(copy / "evaluation")
    text = write_report(copy).read_text(encoding="utf-8")
    assert "Are the latents interpretable?" in text
    assert 'id="browser"' in text


def test_a_run_without_interpretation_says_nothing_about_it(tmp_path: Path) -> None:
    text = write_report(write_run(tmp_path / "run")).read_text(encoding="utf-8")
    assert "interpretable" not in text


def test_an_altered_interpretation_is_refused(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    path = copy / "interpretation" / "interpretation.json"
    path.write_text(path.read_text().replace("40", "41", 1))
    with pytest.raises(UserError, match="checksum"):
        write_report(copy)


def test_missing_numbers_do_not_break_the_page(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    place = copy / "interpretation"
    record = json.loads((place / "interpretation.json").read_text())
    entry = record["hooks"][HOOK]["members"]["plain"]
    entry["summary"]["embedding"] = {"value": None, "low": None, "high": None}
    del entry["summary"]["detection"]
    entry["latents"] = []
    entry["counts"] = {}
    record["hooks"][HOOK]["comparisons"][0]["difference"] = None
    write_json(place / "interpretation.json", json.loads(json.dumps(record).replace("\\ud800", "")))
    write_manifest(place, "interpretation", {}, ["interpretation.json", "contexts.json"])
    text = write_report(copy).read_text(encoding="utf-8")
    assert "0 of 0" in text
