"""The docs site: it builds strictly, loads nothing from elsewhere, and says what the code says."""

import html
import importlib
import io
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import wsae
from wsae.cli.table import COMMANDS
from wsae.core.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
LOADS = {
    "script": ("src",),
    "img": ("src", "srcset"),
    "iframe": ("src",),
    "source": ("src", "srcset"),
    "video": ("src", "poster"),
    "audio": ("src",),
    "embed": ("src",),
    "object": ("data",),
    "link": ("href",),
    "use": ("href", "xlink:href"),
}
"""What a browser fetches without being asked."""


class Loads(HTMLParser):
    """Collects the addresses a page makes a browser fetch, and its links and anchors."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag, attrs):
        found = {name: value or "" for name, value in attrs}
        idle = tag == "link" and found.get("rel") in ("canonical", "prev", "next")
        if not idle:
            self.loads += [found[name] for name in LOADS.get(tag, ()) if name in found]
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if "id" in found:
            self.anchors.add(found["id"])


def read(page: Path) -> Loads:
    found = Loads()
    found.feed(page.read_text())
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built as `make check` builds it."""
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Loads]:
    return {page: read(page) for page in sorted(site.rglob("*.html"))}


def words(page: Path) -> str:
    """What a reader sees."""
    return html.unescape(re.sub(r"<[^>]+>", "", page.read_text()))


def test_nothing_is_loaded_from_elsewhere(site, pages):
    assert len(pages) > 40
    for page, found in pages.items():
        foreign = [a for a in found.loads if re.match(r"(?:[a-z]+:)?//", a)]
        assert not foreign, f"{page.relative_to(site)} loads {foreign}"
        assert 'class="mermaid"' not in page.read_text(), "the theme fetches mermaid"
    sheets = list(site.rglob("*.css"))
    assert sheets
    for sheet in sheets:
        for address in re.findall(
            r"url\(['\"]?([^)'\"]+)|@import ['\"]([^'\"]+)", sheet.read_text()
        ):
            assert not re.match(r"(?:https?:)?//", "".join(address)), sheet


def test_the_check_for_foreign_loads_can_see_one():
    found = Loads()
    found.feed('<script src="https://a.b/c.js"></script><link rel="stylesheet" href="//d/e.css">')
    assert found.loads == ["https://a.b/c.js", "//d/e.css"]


def test_every_link_of_every_page_leads_somewhere(site, pages):
    assert sum(len(found.links) for found in pages.values()) > 1000
    for page, found in pages.items():
        for link in found.links:
            target, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:", target) or page.name == "404.html":
                continue
            other = (page.parent / target).resolve() if target else page
            other = other / "index.html" if other.is_dir() else other
            assert other.exists(), f"{page.relative_to(site)} links to {link}"
            if anchor and other in pages:
                assert anchor in pages[other].anchors, f"{page.relative_to(site)} links to {link}"


def test_no_page_shows_raw_markdown(site, pages):
    """A table or a list that Python-Markdown did not see would stand there as text."""
    for page in pages:
        prose = re.sub(r"<(pre|code|script|style|td)\b.*?</\1>", "", page.read_text(), flags=re.S)
        for line in html.unescape(re.sub(r"<[^>]+>", "", prose)).splitlines():
            assert not re.match(r"\s*\|.*\|\s*$|\s*- \S|```|#{1,4} \w", line), (
                f"{page.relative_to(site)}: {line.strip()[:80]}"
            )


def test_the_start_is_the_readme(site):
    text = words(site / "index.html")
    headings = re.findall(r"^## (.*)$", (ROOT / "README.md").read_text(), re.M)
    assert len(headings) >= 3
    assert all(heading in text for heading in headings)
    assert "build .venv from pinned versions" in text


def test_the_picture_of_the_data_flow_says_what_its_mermaid_text_says(site):
    text = (DOCS / "architecture.md").read_text()
    (mermaid,) = re.findall(r"```mermaid\n(.*?)```", text, re.S)
    labels = re.findall(r"\w\[\(?([^\]\[()]+)\)?\]", mermaid)
    arrows = re.findall(r"--> ", mermaid)
    drawn = (DOCS / "images" / "data-flow.svg").read_text()
    assert set(labels) == set(re.findall(r"<text[^>]*>([^<]+)</text>", drawn))
    ends = re.findall(r'marker-(?:start|end)="', drawn)
    assert len(arrows) == len(ends) >= 10
    assert "images/data-flow.svg" in read(site / "architecture.html").loads
    assert "flowchart" not in words(site / "architecture.html")


def test_every_section_of_the_how_to_is_a_page(site):
    headings = re.findall(r"^## (.*)$", (DOCS / "how-to.md").read_text(), re.M)
    assert len(headings) >= 10
    titles = [
        re.search(r"<h1[^>]*>(.*?)</h1>", p.read_text(), re.S) for p in site.glob("how-to-*.html")
    ]
    found = {re.sub(r"<[^>]+>|¶", "", html.unescape(title[1])).strip() for title in titles if title}
    assert found == {heading.replace("`", "") for heading in headings}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.name)
def test_a_commands_page_has_its_flags_and_examples(site, command, monkeypatch):
    from wsae.cli.main import main

    shown = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", shown)
    assert main([command.name, "--help"]) == 0
    shown.seek(0)
    flags = set(re.findall(r"^│ (--[a-z0-9-]+)", shown.read(), re.M))
    text = words(site / "cli" / f"{command.name}.html")
    assert len(flags) >= 5
    missing = {flag for flag in flags if not re.search(re.escape(flag) + r"(?![\w-])", text)}
    assert not missing
    for example in command.examples:
        assert " ".join(example.split()) in " ".join(text.split())


def test_the_python_reference_documents_every_exported_name(site):
    anchors = set().union(*(read(page).anchors for page in (site / "api").glob("*.html")))
    ends = {anchor.rpartition(".")[2] for anchor in anchors if anchor.startswith("wsae.")}
    assert set(wsae.__all__) - {"UserError", "__version__", "SparseAutoencoder"} <= ends
    assert wsae.SparseAutoencoder is wsae.SAE  # the name of earlier releases
    assert issubclass(wsae.UserError, UserError)  # named on the reference's first page


def test_every_name_of_the_python_reference_exists_and_says_what_it_is(site):
    anchors = set().union(*(read(page).anchors for page in (site / "api").glob("*.html")))
    named = [anchor for anchor in anchors if re.fullmatch(r"wsae(\.\w+)+", anchor)]
    assert len(named) >= 50
    for anchor in named:
        exists(anchor)


def exists(dotted: str) -> object:
    """Return what a dotted name means; fields of classes that have no value of their own count too."""
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            fields = {**getattr(found, "__annotations__", {}), **getattr(found, "model_fields", {})}
            found = getattr(found, name) if hasattr(found, name) else fields[name]
        return found
    raise AssertionError(dotted)


def test_a_name_that_is_not_there_is_noticed():
    with pytest.raises(KeyError):
        exists("wsae.api.nothing_of_the_kind")


def test_notebooks_are_pages_with_their_pictures(site):
    notebooks = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
    assert len(notebooks) == 5
    for path in notebooks:
        page = site / "notebooks" / f"{path.stem}.html"
        cells = json.loads(path.read_text())["cells"]
        outputs = [o for c in cells for o in c.get("outputs", [])]
        pictures = sum("image/png" in o.get("data", {}) for o in outputs)
        shown = [a for a in read(page).loads if re.fullmatch(rf"{path.stem}-\d+\.png", a)]
        assert len(shown) == pictures >= 1
        for name in shown:
            assert (page.parent / name).read_bytes().startswith(b"\x89PNG")
        printed = [
            "".join(o["text"]).splitlines()[0].strip() for o in outputs if o.get("name") == "stdout"
        ]
        text = " ".join(words(page).split())
        assert printed
        for line in printed:
            assert " ".join(line.split()) in text


def test_every_page_of_the_folder_is_listed():
    listed = (ROOT / "mkdocs.yml").read_text()
    pages = list(DOCS.glob("*.md"))
    assert len(pages) >= 15
    for page in pages:
        assert re.search(rf"[ :]{re.escape(page.name)}\n", listed), f"mkdocs.yml lacks {page.name}"


def test_every_command_that_a_page_names_in_a_line_exists():
    for page in (DOCS / "paper-to-code.md", DOCS / "faq.md"):
        names = re.findall(r"`wsae ([a-z]+)", page.read_text())
        assert names, page.name
        for name in names:
            assert name in {command.name for command in COMMANDS}, f"{page.name}: wsae {name}"


def test_every_python_name_of_the_faq_exists():
    names = re.findall(r"`(wsae(?:\.\w+)+)", (DOCS / "faq.md").read_text())
    assert len(names) >= 3
    for name in names:
        exists(name)


def test_every_answer_of_the_faq_is_short_and_names_something_to_use():
    parts = re.split(r"^### (.*)$", (DOCS / "faq.md").read_text(), flags=re.M)[1:]
    answers = dict(zip(parts[::2], parts[1::2], strict=True))
    assert len(answers) >= 20
    for question, answer in answers.items():
        assert len(answer.split()) < 220, question
        assert re.search(r"`[^`]+`|^    wsae |\]\([^)]+\)", answer, re.M), question
