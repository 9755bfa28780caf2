"""The docs name what exists: code, files, links, commands and their flags; the README's Python runs."""

import importlib
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import pytest
import yaml

from wsae.cli.main import main
from wsae.evals.config import Control
from wsae.sae.config import Kind, Rule
from wsae.train.loggers import LoggerName

ROOT = Path(__file__).parents[2]
REFERENCES = sorted(
    set(re.findall(r"`(wsae[\w.]*:[\w.]+)`", (ROOT / "docs/paper-to-code.md").read_text()))
)
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
SRC = ROOT / "src" / "wsae"


@pytest.mark.parametrize("reference", REFERENCES)
def test_every_reference_to_code_exists(reference: str) -> None:
    module, _, name = reference.partition(":")
    found: object = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    assert found.__doc__, f"{reference} has no docstring"


def test_there_are_references() -> None:
    assert len(REFERENCES) >= 10


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_between_pages_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def blocks(text: str) -> list[str]:
    """Return the code blocks of a page that are no Python: fenced ones and indented ones."""
    fenced = re.compile(r"^```(\w*)\n(.*?)^```", re.S | re.M)
    shell = [code for kind, code in fenced.findall(text) if kind not in ("python", "mermaid")]
    rest = fenced.sub("", text)
    return [*shell, *re.findall(r"(?:^    .*\n)+", rest, re.M)]


START = r"^ *(?:\$ )?(?:(?:\.venv/bin/)?wsae|torchrun .*?-m wsae\.cli) ([a-z].*)"


def commands(page: Path) -> list[list[str]]:
    """Return every `wsae ...` line of a page's code blocks, as words; a backslash joins lines."""
    found = []
    for block in blocks(page.read_text()):
        joined = block.replace("\\\n", " ")
        for line in re.findall(START, joined, re.M):
            words = shlex.split(line, comments=True)
            found.append(words[: words.index(">")] if ">" in words else words)
    return found


COMMANDS = [(page, words) for page in PAGES for words in commands(page)]


def test_commands_are_found_in_every_kind_of_block(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "Text, wsae no-command.\n\n    wsae theory   # why\n    .venv/bin/wsae toy \\\n      --seeds 2\n\n"
        '```sh\n$ wsae theory --only "Theorem 3" > out.txt\n```\n\n```python\nwsae fit\n```\n'
    )
    assert sorted(commands(page)) == [
        ["theory"],
        ["theory", "--only", "Theorem 3"],
        ["toy", "--seeds", "2"],
    ]
    places = {page.name for page, _ in COMMANDS}
    assert {"README.md", "how-to.md", "configuration.md", "distributed.md"} <= places
    assert len(COMMANDS) >= 100


@pytest.mark.parametrize(
    "words",
    [pytest.param(words, id=f"{page.stem}: {shlex.join(words)}") for page, words in COMMANDS],
)
def test_every_command_in_the_docs_is_understood(
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flags.yaml").write_text("source: acts.npy\nout: runs/first\nk: 64\n")
    (tmp_path / "runs/first").mkdir(parents=True)
    written = ROOT / "tests/fixtures/before-fold/run/config.json"
    (tmp_path / "runs/first/config.json").write_text(written.read_text())
    code, said = main([*words, "--print-config"]), capsys.readouterr().err
    of_a_run = "runs/first/config.json" in words  # is read, and cannot be printed as flags
    assert code == 0 or (of_a_run and "give it to --config as it is" in said), said


NAMES = r"(?:`(?![\w.]+\.(?:py|h)`)[\w.]+`(?: \([^)]*\))?(?:, | and | or )?)+"
FILES = r"`[\w/.-]+\.(?:py|h)`(?:(?:, | and | or )`[\w/.-]+\.(?:py|h)`)*"


def placed(text: str) -> list[tuple[str, str]]:
    """Return each name that a text places in a file: `a.py` (`name`, `Other`); `name` and `Other` of `a.py`."""
    after = re.findall(r"(`[\w/.-]+\.py`) \(((?:`\w+`(?:, | or )?)+)[^)]*\)", text)
    before = [
        (files, names) for names, files in re.findall(rf"({NAMES}) (?:of|in) ({FILES})", text)
    ]
    return [
        (path, name.rpartition(".")[2])
        for files, names in after + before
        for path in re.findall(r"`([^`]+)`", files)
        for name in re.findall(r"`([\w.]+)`", names)
    ]


def test_every_file_and_name_of_the_architecture_exists() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    paths = set(re.findall(r"`([\w/.-]+\.(?:py|h)|[\w/-]+/)`", text)) - {"cli/NAME.py", "config.py"}
    where = {p: next((t / p for t in (SRC, ROOT) if (t / p).exists()), None) for p in paths}
    assert len(paths) >= 40
    assert not [path for path, file in where.items() if file is None]
    names = placed(text)
    assert len(names) >= 80
    for path, name in names:
        file = where[path]
        assert file is not None
        assert re.search(rf"\b{name}\b", file.read_text()), f"{path} has no {name}"


def test_a_name_is_placed_before_or_after_its_file() -> None:
    text = "its sums in `a.py` (`x`, `Y` or so), `z` and `w.u` (why) of `b/c.py` and `d.h`; `e.py`"
    assert placed(text) == [
        *(("a.py", "x"), ("a.py", "Y")),
        *(("b/c.py", "z"), ("b/c.py", "u"), ("d.h", "z"), ("d.h", "u")),
    ]


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("kinds.md", get_args(Kind)),
        ("gamma.md", get_args(Rule)),
        ("how-to.md", [name for name in get_args(Control) if name not in ("neurons", "pca")]),
        ("configuration.md", get_args(LoggerName)),
    ],
)
def test_every_choice_has_a_row_on_its_page(page: str, names: Sequence[str]) -> None:
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / page).read_text(), re.M)
    assert not {*names} - {*rows}


def test_every_package_has_a_line_in_the_map() -> None:
    (table,) = re.findall(
        r"## The map\n(.*?)\n## ", (ROOT / "docs/architecture.md").read_text(), re.S
    )
    named = set(re.findall(r"`([\w.]+)`", "".join(re.findall(r"^\| (`.*?) \|", table, re.M))))
    there = {path.parent.name for path in SRC.glob("*/__init__.py")}
    there |= {path.name for path in SRC.glob("[!_]*.py")}
    assert named == there


def test_the_python_of_the_readme_runs_and_finds_what_it_says(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    exec(code, {})
    said = re.search(r"prints about (0\.\d+)", text)
    assert said
    assert float(capsys.readouterr().out) == pytest.approx(float(said[1]), abs=0.03)


def test_workflows_call_what_exists_and_pin_the_versions_of_actions() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    files = [*(ROOT / ".github").rglob("*.yml"), ROOT / ".pre-commit-config.yaml"]
    assert len(files) >= 5
    called: list[str] = []
    for file in files:
        assert yaml.safe_load(file.read_text())
        called += re.findall(r"run: make ([a-z-]+)", file.read_text())
        for action in re.findall(r"uses: (\S+)", file.read_text()):
            assert re.search(r"@v\d[\d.]*$", action), f"{file.name}: {action}"
    assert called
    assert set(called) <= targets


def test_the_matrix_of_pythons_is_the_one_that_the_package_admits() -> None:
    check = yaml.safe_load((ROOT / ".github/workflows/check.yml").read_text())
    pythons = check["jobs"]["test"]["strategy"]["matrix"]["python"]
    said = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
    assert pythons == said


def test_contributing_names_targets_that_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = re.findall(r"\bmake ([a-z-]+)", (ROOT / "CONTRIBUTING.md").read_text())
    assert {"test", "fast", "check", "coverage"} <= set(named) <= targets


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 450
    for line in text.splitlines():
        assert len(line) <= 100 or line.startswith(("|", "![")), line


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda p: p.name
)
def test_no_line_of_prose_is_long(page: Path) -> None:
    """Tables, pictures and code are as long as they are."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    for line in prose.splitlines():
        assert len(line) <= 120 or line.startswith(("|", "![", "    ")), line
