"""The docs name what exists: every code reference in paper-to-code is importable, every linked file is there."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import yaml

from wsae.cli.main import main

ROOT = Path(__file__).parents[2]
REFERENCES = sorted(
    set(re.findall(r"`(wsae[\w.]*:[\w.]+)`", (ROOT / "docs/paper-to-code.md").read_text()))
)
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("reference", REFERENCES)
def test_every_reference_to_code_exists(reference: str) -> None:
    module, _, name = reference.partition(":")
    found: object = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    assert found.__doc__, f"{reference} has no docstring"


def test_there_are_references() -> None:
    assert len(REFERENCES) >= 10


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_link_between_pages_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def commands() -> list[tuple[str, list[str]]]:
    """Every `wsae ...` line of the pages' indented blocks, as words."""
    found = []
    for page in PAGES:
        for line in re.findall(r"^    (?:\.venv/bin/)?(wsae [a-z][^\n#]*)", page.read_text(), re.M):
            found.append((f"{page.name}: {line.strip()}", shlex.split(line)[1:]))
    return found


@pytest.mark.parametrize("words", [pytest.param(w, id=name) for name, w in commands()])
def test_every_command_in_the_docs_is_understood(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--print-config"]) == 0, capsys.readouterr().err


def test_the_docs_hold_commands() -> None:
    assert len(commands()) >= 15


def test_the_python_of_the_readme_runs_and_finds_what_it_says(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    exec(code, {})
    said = re.search(r"about (0\.\d+)", code)
    assert said
    assert float(capsys.readouterr().out) == pytest.approx(float(said[1]), abs=0.03)


def test_workflows_call_targets_that_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    files = [*(ROOT / ".github").rglob("*.yml"), ROOT / ".pre-commit-config.yaml"]
    assert len(files) >= 5
    for file in files:
        assert yaml.safe_load(file.read_text())
        assert set(re.findall(r"run: make ([a-z-]+)", file.read_text())) <= targets, file.name
