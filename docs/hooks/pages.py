"""What the site adds to docs/: the README as its start, the changelog, one page per how-to, sources that are linked.

The Markdown in the repository reads well on its code host and is the only copy; this hook carries it over when the
site is built. A link that leaves docs/ (../examples/x.py) becomes a page that shows the file.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
LINK = re.compile(r"\]\((?P<path>[^)#\s:]+)?(?P<anchor>#[^)\s]+)?\)")
KNOWN = {
    ROOT / "README.md": "index.md",
    ROOT / "CHANGELOG.md": "changelog.md",
    ROOT / "CONTRIBUTING.md": "contributing.md",
    DOCS / "README.md": "index.md",
}
LANGUAGES = {".py": "python", ".sbatch": "bash", ".toml": "toml", ".yaml": "yaml", ".json": "json"}
FENCE = re.compile(r"^\s*```")
MERMAID = re.compile(r"```mermaid\n.*?```", re.S)
FLOW = "![How data flows](images/data-flow.svg)"
"""Stands in for the architecture's one Mermaid picture, which code hosts draw and the theme fetches a script for."""
slug = slugify(case="lower")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made, not written."""
    made = {
        **{name: links(path, path.read_text()) for path, name in KNOWN.items() if path.is_file()},
        **how_to_pages((DOCS / "how-to.md").read_text()),
        **linked_sources([*(path for path in KNOWN if path.is_file()), *DOCS.rglob("*.md")]),
    }
    for name, text in made.items():
        if old := files.get_file_from_path(name):
            files.remove(old)
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links that leave docs/, or lead into the split how-to, into links of the site."""
    if page.file.abs_src_path:
        markdown = links(Path(page.file.abs_src_path), markdown)
    return to_how_to(MERMAID.sub(FLOW, markdown), page.file.src_uri)


def outside(page: Path, path: str) -> Path | None:
    """Return the file of the repository that a link of `page` means, if it is not one of docs/ itself."""
    target = (page.parent / path).resolve()
    inside = target.is_relative_to(DOCS) and page.is_relative_to(DOCS)
    return None if inside or not target.is_relative_to(ROOT) else target


def site_path(target: Path) -> str:
    """Return where a file of the repository lies in the site."""
    if target in KNOWN:
        return KNOWN[target]
    if target.is_relative_to(DOCS):
        return target.relative_to(DOCS).as_posix()
    name = target.relative_to(ROOT).as_posix()
    if name.startswith("examples/notebooks/"):
        return f"notebooks/{target.stem}.md"
    return f"source/{name}" if target.suffix == ".md" else f"source/{name}.md"


def links(page: Path, text: str) -> str:
    """Rewrite the links of `page` that leave docs/ (or, in the README and notebooks, lead into it)."""
    base = DOCS if page.is_relative_to(DOCS) else ROOT
    deep = len(page.relative_to(base).parts) - 1
    up = "../" * (1 if site_path(page).startswith("notebooks/") else deep)

    def link(found: re.Match[str]) -> str:
        target = outside(page, found["path"]) if found["path"] else None
        return f"]({up}{site_path(target)}{found['anchor'] or ''})" if target else found[0]

    return LINK.sub(link, text)


def linked_sources(pages: list[Path]) -> dict[str, str]:
    """Return a page for every file outside docs/ that some page links to."""
    made: dict[str, str] = {}
    for page in pages:
        for found in LINK.finditer(page.read_text()):
            target = outside(page, found["path"]) if found["path"] else None
            if target and target.is_file() and site_path(target).startswith("source/"):
                made[site_path(target)] = shown(target)
    return made


def shown(path: Path) -> str:
    """Return a page with the text of a file: Markdown as it is, anything else as code."""
    text = path.read_text()
    if path.suffix == ".md":
        return text
    name = path.relative_to(ROOT).as_posix()
    return f"# {path.name}\n\n`{name}`\n\n````{LANGUAGES.get(path.suffix, 'text')}\n{text}````\n"


def sections(text: str) -> list[tuple[str, str]]:
    """Split a page at its second-level headings: ("", what comes before), then (heading, its text)."""
    parts: list[tuple[str, str]] = [("", "")]
    fenced = False
    for line in text.splitlines():
        fenced ^= bool(FENCE.match(line))
        if line.startswith("## ") and not fenced:
            parts.append((line[3:], ""))
        else:
            raised = line[1:] if line.startswith("###") and not fenced else line
            parts[-1] = (parts[-1][0], parts[-1][1] + raised + "\n")
    return parts


def how_to_title(heading: str) -> str:
    """Return a section's short title: what stands before a colon, without code."""
    return re.sub(r" ?`[^`]*`", "", heading.partition(":")[0]).strip()


def how_to_name(heading: str) -> str:
    """Return the page of a section of the how-to: how-to-check-first.md."""
    return f"how-to-{slug(how_to_title(heading), '-')}.md"


def how_to_pages(text: str) -> dict[str, str]:
    """Return one page per section of docs/how-to.md, and the list of them."""
    (_, before), *tasks = sections(text)
    listed = "".join(f"- [{heading}]({how_to_name(heading)})\n" for heading, _ in tasks)
    pages = {how_to_name(heading): f"# {heading}\n{body}" for heading, body in tasks}
    return {"how-to.md": f"{before}\n{listed}", **pages}


def how_to_nav() -> list[dict[str, str]]:
    """Return the navigation of the how-to's pages."""
    tasks = sections((DOCS / "how-to.md").read_text())[1:]
    return [{how_to_title(h): how_to_name(h)} for h, _ in tasks]


def to_how_to(text: str, here: str) -> str:
    """Point links to an anchor of how-to.md (or, on its own pages, to one beside it) at the page that holds it."""
    where = {}
    for heading, body in sections((DOCS / "how-to.md").read_text())[1:]:
        where[slug(heading, "-")] = (how_to_name(heading), "")
        for inner in re.findall(r"^## (.*)$", body, re.M):
            where[slug(inner, "-")] = (how_to_name(heading), f"#{slug(inner, '-')}")

    def link(found: re.Match[str]) -> str:
        path, anchor = found["path"] or "", (found["anchor"] or "").removeprefix("#")
        mine = here.startswith("how-to") and not path
        if anchor in where and (mine or path.endswith("how-to.md")):
            page, rest = where[anchor]
            return f"]({path.removesuffix('how-to.md')}{page}{rest})"
        return found[0]

    return LINK.sub(link, text)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the how-to's pages into the navigation."""
    fill(config.nav, "how-to.md", how_to_nav())
    return config


def fill(nav: list, page: str, more: list[dict[str, str]]) -> None:
    """Put `more` behind the entry `page`, wherever it stands in the navigation."""
    for entry in nav:
        inner = next(iter(entry.values())) if isinstance(entry, dict) else None
        if isinstance(inner, list):
            if page in inner:
                at = inner.index(page) + 1
                inner[at:at] = more
            fill(inner, page, more)
