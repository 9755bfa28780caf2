"""The command line's pages, made from what `wsae COMMAND --help` prints: they cannot say anything else."""

import contextlib
import io
import os
import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from wsae.cli.main import main
from wsae.cli.table import COMMANDS

BOX = re.compile(r"^╭─ (?P<name>.*?) ─*╮$")
WIDE = "100"
"""Columns: wide enough for the longest flag, too narrow for two groups side by side."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put a page per command into the navigation, behind cli/index.md."""
    put(config.nav)
    return config


def put(nav: list) -> None:
    """Replace the entry `cli/index.md` by itself and a page for every command."""
    for entry in nav:
        inner = next(iter(entry.values())) if isinstance(entry, dict) else None
        if isinstance(inner, list):
            if "cli/index.md" in inner:
                inner += [{f"wsae {c.name}": f"cli/{c.name}.md"} for c in COMMANDS]
            put(inner)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the overview and a page per command."""
    rows = "".join(f"| [`wsae {c.name}`]({c.name}.md) | {c.summary} |\n" for c in COMMANDS)
    pages = {
        "cli/index.md": f"# The command line\n\n| command | does |\n|---|---|\n{rows}\n{common()}",
        **{f"cli/{c.name}.md": command_page(c.name) for c in COMMANDS},
    }
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def help_of(*words: str) -> str:
    """Return what `wsae WORDS --help` prints."""
    text = io.TextIOWrapper(
        io.BytesIO(), encoding="utf-8"
    )  # boxes are drawn where they can be shown
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = WIDE
    try:
        with contextlib.redirect_stdout(text):
            code = main([*words, "--help"])
    finally:
        os.environ.pop("COLUMNS")
        if columns is not None:
            os.environ["COLUMNS"] = columns
    if code != 0:
        raise RuntimeError(f"wsae {' '.join(words)} --help ends with {code}")
    text.seek(0)
    return text.read()


def common() -> str:
    """Return the part of `wsae --help` that is true of every command."""
    text = help_of()
    start, end = text.index("Every command takes:"), text.index("Examples, in the order")
    return f"```text\n{text[start:end].strip()}\n```\n"


def command_page(name: str) -> str:
    """Return a command's page: usage, words, examples, and a list of flags per group."""
    lines = help_of(name).splitlines()
    boxes = [(i, box["name"]) for i, line in enumerate(lines) if (box := BOX.match(line))]
    head = "\n".join(lines[: boxes[0][0]])
    usage, _, rest = head.partition("\n\n")
    about, _, examples = rest.partition("Examples:\n")
    parts = [f"# wsae {name}\n", f"```text\n{usage.strip()}\n```\n", plain(about)]
    if examples.strip():
        shown = "\n".join(line.strip() for line in examples.strip().splitlines())
        parts.append(f"```text\n{shown}\n```\n")
    for start, title in boxes:
        end = next(i for i in range(start, len(lines)) if lines[i].startswith("╰"))
        inner = [line[2:-2].rstrip() for line in lines[start + 1 : end]]
        parts.append(f"## {title.capitalize()}\n\n{flag_list(inner)}")
    return "\n".join(parts)


def flag_list(lines: list[str]) -> str:
    """Return the flags of one box as a definition list, behind the box's own words (above a rule)."""
    rule = next((i for i, line in enumerate(lines) if line and not line.strip("─")), -1)
    words, flags = " ".join(lines[: max(rule, 0)]), []
    for line in filter(None, lines[rule + 1 :]):
        flag, _, text = line.partition("  ")
        if flag:  # others go on where the line before stopped
            flags.append([flag, text.strip()])
        else:
            flags[-1][1] = f"{flags[-1][1]} {text.strip()}".strip()
    rows = [f"`{flag}`\n:   {plain(text).strip()}\n" for flag, text in flags]
    return "\n".join([plain(words)] * bool(words) + rows)


def plain(text: str) -> str:
    """Return text of the help with Markdown's own characters made harmless, outside its backquotes."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([\\*_<>|\[\]])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts) + "\n"
