"""Run the notebooks of examples/notebooks and keep what they print: `make notebooks`.

    python examples/build_notebooks.py [NAME ...]

NAME.py is the notebook as it is written, a Python file whose cells begin with `# %%` (code) or `# %% [markdown]`.
Each becomes NAME.ipynb, executed in a fresh kernel. Needs `pip install 'wsae[all,notebooks]'`.
"""

import os
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parent / "notebooks"
LARGEST = 1_000_000
"""Bytes of one notebook."""


class Cell(NamedTuple):
    """One cell: "markdown" or "code", and its text."""

    kind: str
    text: str


def sources() -> list[Path]:
    """Return the notebooks as they are written."""
    return sorted(FOLDER.glob("*.py"))


def cells(path: Path) -> list[Cell]:
    """Return the cells of a notebook's source; what stands before the first marker belongs to none."""
    parts = re.split(r"^# %%( \[markdown\])?\n", path.read_text(), flags=re.M)
    return [
        Cell("markdown", _prose(text)) if marker else Cell("code", text.strip())
        for marker, text in zip(parts[1::2], parts[2::2], strict=True)
    ]


def build(path: Path) -> Path:
    """Execute one notebook and write it beside its source; raises what a cell raises."""
    import nbformat
    from nbclient import NotebookClient

    made = {"markdown": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    book = nbformat.v4.new_notebook()
    book.cells = [made[c.kind](c.text, id=f"cell-{i}") for i, c in enumerate(cells(path))]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    book.metadata["kernelspec"] = kernel
    folder = {"metadata": {"path": str(path.parent)}}
    NotebookClient(book, timeout=None, resources=folder, coalesce_streams=True).execute()
    book.metadata = nbformat.from_dict({"kernelspec": kernel})
    for cell in book.cells:
        cell.metadata.pop("execution", None)  # the hours at which cells ran
        if (
            cell.cell_type == "code"
        ):  # notices differ by machine (the test of the cells makes warnings errors)
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
    text = nbformat.writes(book) + "\n"
    if len(text) > LARGEST:
        raise ValueError(f"{path.stem}.ipynb would have {len(text):,} bytes, over {LARGEST:,}")
    out, temporary = path.with_suffix(".ipynb"), path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(out)
    return out


def main() -> None:
    """Build the notebooks that are named, or all."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    wanted = sys.argv[1:]
    for path in sources():
        if not wanted or path.stem in wanted:
            begun = time.perf_counter()
            print(f"{build(path).name}: {time.perf_counter() - begun:.0f} s", flush=True)


def _prose(text: str) -> str:
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in text.strip().splitlines())


if __name__ == "__main__":
    main()
