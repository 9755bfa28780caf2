"""`wsae reproduce` from the command line, at its smallest size."""

import json

import pytest

from wsae.cli.main import main
from wsae.studies.figures import all_readings


def run(capsys, *words: str) -> tuple[int, str, str]:
    code = main(["reproduce", *words])
    out, err = capsys.readouterr()
    return code, out, err


def test_figures_share_one_sweep_and_leave_pictures(tmp_path, capsys):
    place = ("--preset", "tiny", "--out", str(tmp_path))
    code, out, _ = run(capsys, "figure3", *place, "--json")
    found = json.loads(out)
    assert code == 0
    assert [panel["panel"] for panel in found["panels"]] == ["3a", "3b", "3c", "3d", "3a", "3b"]
    assert {line["method"] for line in found["panels"][0]["series"]} >= {"SAE", "WSAE"}
    assert all(panel["paper"] and panel["ours"] for panel in found["panels"])
    stamp = (tmp_path / "tiny/sweep/rows.json").stat().st_mtime_ns
    code, out, _ = run(capsys, "figure2", *place)
    assert code == 0
    assert "participation ratio" in " ".join(out.split())
    assert (tmp_path / "tiny/sweep/rows.json").stat().st_mtime_ns == stamp
    for name in ("figure2", "figure3"):
        assert (tmp_path / f"tiny/{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert "<svg" in (tmp_path / f"tiny/{name}.svg").read_text()
        assert json.loads((tmp_path / f"tiny/{name}.json").read_text())["name"] == name


def test_every_reading_separates_weights_from_loss_scale(tmp_path, capsys):
    code, out, err = run(capsys, "readings", "--preset", "tiny", "--out", str(tmp_path), "--json")
    assert code == 0, err
    readings = json.loads(out)["readings"]
    assert [r["label"] for r in readings] == [r.label for r in all_readings()]
    assert len({r["label"] for r in readings}) == 24
    adam = [r for r in readings if r["optimizer"] == "adam" and r["length"] == "short"]
    assert all(abs(r["3a raw, scale alone"]) < 0.02 for r in adam)  # Adam does not feel a scale
    slow = next(r for r in readings if r["label"].startswith("equal importance, sgd, tied, long"))
    assert slow["3c, scale alone"] > 1  # gradient descent does


def test_the_recovery_benchmark_fills_its_tables(tmp_path, capsys):
    code, out, _ = run(capsys, "recovery", "--preset", "tiny", "--out", str(tmp_path), "--json")
    found = json.loads(out)
    assert code == 0
    plain = found["tables"]["mcc_code, plain"]
    assert len(plain["rows"]) == 10
    assert all(len(row) == len(plain["header"]) for row in plain["rows"])
    ruled = found["tables"]["mcc_code, rule minus plain"]
    assert len(ruled["rows"]) == 50
    rows = json.loads((tmp_path / "tiny/recovery/rows.json").read_text())
    assert found["saes"] == len(rows)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("figure9",), "figure9"),
        (("figure3", "--preset", "huge"), "huge"),
        (("figure3", "--presset", "tiny"), "--preset"),
    ],
)
def test_wrong_words_end_with_one_line(words, message, capsys):
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
