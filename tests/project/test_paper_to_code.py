"""docs/paper-to-code.md is complete: everything the paper numbers has an entry, and every entry leads to code."""

import re
from pathlib import Path

import pytest

from wsae.cli import table
from wsae.theory.claims import checks, title

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "paper-to-code.md").read_text()
PAPER = {
    "Eq.": range(1, 40),
    "Theorem": range(1, 6),
    "Example": range(1, 3),
    "Figure": range(1, 6),
    "Table": range(1, 4),
    "Section": ("3", "4.1", "4.2", "4.3.1", "4.3.2", "5.1", "5.2.1", "5.2.2", "6"),
    "Appendix": ("A", "A.1", "A.2", "A.3", "B.1", "B.2", "B.3", "B.4"),
}
"""What the paper numbers. Sections 1 and 2 (introduction, related work) have nothing to implement."""
EVERYTHING = [f"{kind} {number}" for kind, numbers in PAPER.items() for number in numbers]
_WORDS = {"Fig.": "Figure", "Figures": "Figure", "Tables": "Table", "Sections": "Section"}
_NUMBER = r"(?:[AB](?:\.\d)?\b|\d+(?:\.\d+)*)"
_MENTION = re.compile(
    rf"\b(Eq\.|Theorem|Example|Fig\.|Figures?|Tables?|Sections?|Appendix) ({_NUMBER}(?:(?:, | and | to ){_NUMBER})*)"
)


def rows(page: str) -> list[tuple[str, str]]:
    """Return (paper, code) of every row of the page's table."""
    lines = [line.strip("| ").split(" | ", 1) for line in page.splitlines() if line[:2] == "| "]
    return [(paper, code) for paper, code in lines][1:]


def mentioned(text: str) -> set[str]:
    """Return what a text names: "Eq. 6, 7 and 10" is three equations, "Tables 1 to 3" three tables."""
    found = set()
    for word, numbers in _MENTION.findall(text):
        kind = _WORDS.get(word, word)
        for part in re.split(r", | and ", numbers):
            first, _, last = part.partition(" to ")
            span = range(int(first), int(last) + 1) if last else (first,)
            found |= {f"{kind} {number}" for number in span}
    return found


def covered(page: str) -> set[str]:
    return set().union(*(mentioned(paper) for paper, _ in rows(page)))


@pytest.mark.parametrize("what", EVERYTHING)
def test_everything_the_paper_numbers_has_an_entry(what):
    assert what in covered(PAGE)


def test_the_page_names_nothing_that_the_paper_does_not_have():
    assert covered(PAGE) <= {*EVERYTHING, "Section 5.2"}


def test_every_source_of_the_ledger_has_an_entry():
    sources = {
        title(check).split(":")[0] for check in checks() if not title(check).startswith("Ours")
    }
    assert len(sources) >= 20
    assert sources <= covered(PAGE)


@pytest.mark.parametrize(("paper", "code"), rows(PAGE))
def test_every_entry_leads_to_code(paper, code):
    commands = re.findall(r"`wsae ([a-z]+)[^`]*`", code)
    assert commands or re.search(r"`wsae\.[\w.]+:[\w.]+`", code), f"{paper}: no code"
    assert all(table.find(name) for name in commands), f"{paper}: {commands}"


def test_a_missing_entry_is_noticed():
    without = "\n".join(line for line in PAGE.splitlines() if "Example 2" not in line)
    assert {"Example 2", "Eq. 9"} <= covered(PAGE) - covered(without)


def test_how_mentions_are_read():
    assert mentioned("Eq. 6, 7 and 10; Fig. 2, Tables 1 to 3 (Section 5.2.1, Appendix B.1)") == {
        *("Eq. 6", "Eq. 7", "Eq. 10", "Figure 2", "Table 1", "Table 2", "Table 3"),
        *("Section 5.2.1", "Appendix B.1"),
    }
