"""`wsae theory`: the ledger's contract, its verdicts, the filter, and what --out writes."""

import contextlib
import io
import json
from pathlib import Path

import pytest

from wsae.cli.main import main
from wsae.theory.claims import checks, ledger, title
from wsae.theory.record import Claim

VERDICTS = [
    ("Section 3", "holds if"),
    ("Eq. 5", "ill-posed"),
    ("Theorem 1", "counterexample"),
    ("Section 4.1", "holds if"),
    ("Section 4.1", "holds"),
    ("Example 1", "holds"),
    ("Section 4.1", "holds"),
    ("Example 2", "holds"),
    ("Theorem 2", "holds if"),
    ("Theorem 2", "counterexample"),
    ("Section 4.2", "holds if"),
    ("Theorem 3", "counterexample"),
    ("Theorem 3", "counterexample"),
    ("Theorem 4", "holds"),
    ("Section 4.3.1", "holds if"),
    ("Theorem 5", "holds"),
    ("Eq. 14", "holds if"),
    ("Section 4.3.2", "counterexample"),
    ("Section 4.3.2", "counterexample"),
    ("Section 4.3.2", "holds if"),
    ("Section 4.3.2", "counterexample"),
    ("Section 4.3.2", "counterexample"),
    ("Section 5.1", "holds if"),
    ("Section 5.1", "holds if"),
    ("Section 5.1", "counterexample"),
    ("Section 5.1", "counterexample"),
    ("Section 5.2.1", "holds if"),
    ("Table 1", "holds if"),
    ("Appendix A", "counterexample"),
    ("Appendix A", "counterexample"),
    ("Eq. 15", "holds"),
    ("Theorem 1", "counterexample"),
    ("Eq. 18", "counterexample"),
    ("Eq. 19", "holds if"),
    ("Eq. 25", "counterexample"),
    ("Eq. 26", "counterexample"),
    ("Eq. 31", "counterexample"),
    ("Appendix A.2", "counterexample"),
    ("Appendix A.2", "holds if"),
    ("Eq. 35", "counterexample"),
    *((f"Ours {number}", "holds") for number in range(1, 11)),
]


@pytest.fixture(scope="module")
def claims() -> list[dict]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["theory", "--json"]) == 0
    return json.loads(out.getvalue())


def test_json_is_a_list_of_claims_in_the_papers_order(claims):
    assert len(claims) == len(checks())
    assert [(claim["source"], claim["verdict"]) for claim in claims] == VERDICTS


def test_every_claim_says_what_it_must(claims):
    for claim in claims:
        assert set(claim) == {
            "claim", "source", "verdict", "slip", "condition", "evidence", "instances", "numbers",
        }  # fmt: skip
        assert claim["verdict"] in ("holds", "holds if", "counterexample", "ill-posed")
        assert claim["verdict"] == "counterexample" or not claim["slip"]
        assert claim["evidence"]
        assert claim["instances"] >= 1
        assert claim["verdict"] == "holds" or claim["condition"], (
            f"{claim['source']}: what saves it?"
        )
        assert all(isinstance(number, float) for number in claim["numbers"].values())


def test_the_title_of_a_check_begins_with_its_claims_source(claims):
    for check, claim in zip(checks(), claims, strict=True):
        assert title(check).startswith(f"{claim['source']}: "), check.__name__


def numbers(claims: list[dict], source: str, which: int = 0) -> dict[str, float]:
    return [c["numbers"] for c in claims if c["source"] == source][which]


def test_the_numbers_of_the_triangle_are_those_found_by_hand(claims):
    """Theorem 1: L = 3/32 at W_p^T, 3/40 at sqrt(6/5) W_p^T; Theorem 2: scaling alone reaches 4S / (1 + 3S)."""
    dense = numbers(claims, "Theorem 1")
    assert (dense["triangle_closed_form"], dense["triangle_scaled"]) == (3 / 32, 3 / 40)
    assert dense["lower_triangle"] == pytest.approx(0.2)
    assert dense["digons_worst_loss"] < 1e-20
    sparse = numbers(claims, "Theorem 2")
    for S in (0.5, 0.9, 0.99, 0.999):
        assert sparse[f"triangle_ratio_S{S:g}"] == pytest.approx(4 * S / (1 + 3 * S), abs=2e-6)
    assert sparse["tetrahedron_spare_ratio_S0.999"] < 0.75


def test_shrinkage_falls_for_simplices_and_rises_for_polygons(claims):
    found = numbers(claims, "Section 4.1")
    assert found["falls_at_every_S"] == 1
    assert found["simplex_2_S0"] == pytest.approx(
        1 / 3, abs=1e-3
    )  # E[max(x - y, 0)] / E[x] = 1/6 / 1/2
    assert found["polygon_3_S0.5"] < found["polygon_5_S0.5"] < found["polygon_7_S0.5"]


def test_uniqueness_fails_where_the_notes_say(claims):
    exact, searched = numbers(claims, "Theorem 3"), numbers(claims, "Theorem 3", 1)
    assert exact["mirrored_simplices_worst"] == 0
    assert exact["turned_digons_worst_loss"] < 1e-25
    assert exact["identity_3_latents_per_feature"] == 2
    unique = {name for name in ("I_2", "digon", "Example 1") if searched[f"others_{name}"] == 0}
    assert unique == {"I_2", "digon", "Example 1"}
    assert (searched["nullity_two digons"], searched["nullity_three digons"]) == (1, 3)
    assert (
        searched["larger_l1"] == searched["larger_two_sparse_loss"] == searched["isolated_others"]
    )


def test_eq_26_counts_n_twice(claims):
    found = numbers(claims, "Eq. 26")
    for n in (2, 3, 4, 5):
        assert found[f"paper_over_exact_n{n}"] == pytest.approx(n)


def test_the_verdicts_do_not_hang_on_the_seed(claims):
    for words in ("Section 4.1", "Section 4.2", "arbitrary x", "Eq. 15", "Eq. 26", "Appendix A.2"):
        for found in ledger(1, words):
            assert [found.source, found.verdict] in [[c["source"], c["verdict"]] for c in claims]


def test_a_ledger_repeats_itself():
    assert ledger(3, "Appendix A.2") == ledger(3, "Appendix A.2")
    assert all(isinstance(claim, Claim) for claim in ledger(3, "Eq. 19"))


@pytest.mark.parametrize(
    ("words", "source"), [("Theorem 3", "Theorem 3"), ("feature VANISHING", "Section 4.1")]
)
def test_only_looks_at_sources_and_words(words, source):
    assert {title(check).split(":")[0] for check in checks(words)} == {source}


def test_only_without_a_match_says_what_there_is(capsys):
    assert main(["theory", "--only", "Theorem 99"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("wsae: error: --only 'Theorem 99': no claim matches")
    assert "Theorem 3" in said
    assert said.count("\n") == 1


def test_out_writes_the_ledger_and_the_pictures(tmp_path: Path, capsys):
    place = tmp_path / "deep" / "theory"
    assert main(["theory", "--only", "Example", "--out", str(place)]) == 0
    said = capsys.readouterr().out
    assert "2 claims: 2 hold, 0 hold under a condition, 0 have a counterexample" in said
    record = json.loads((place / "ledger.json").read_text())
    assert [claim["source"] for claim in record["claims"]] == ["Example 1", "Example 2"]
    names = ("landscape", "shrinkage", "limit", "rotation", "mirror")
    for name in names:
        assert (place / f"theory-{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert "<svg" in (place / f"theory-{name}.svg").read_text()[:1000]
        assert str(place / f"theory-{name}.svg") in said


def test_without_out_nothing_is_written(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["theory", "--only", "Eq. 19"]) == 0
    said = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert "Eq. 19" in said
    assert "Holds if: p = 2 or 3." in said
