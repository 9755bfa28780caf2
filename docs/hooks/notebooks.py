"""Notebooks as pages: the text as it is, code as code, and the outputs that are stored in the file."""

import base64
import json
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pages import links

NOTEBOOKS = Path(__file__).resolve().parents[2] / "examples" / "notebooks"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page per notebook, its pictures, and the notebook itself to download."""
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        text, pictures = rendered(path)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
        files.append(File.generated(config, f"notebooks/{path.name}", abs_src_path=str(path)))
        for name, data in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=data))
    return files


def rendered(path: Path) -> tuple[str, dict[str, bytes]]:
    """Return a notebook as Markdown, and its pictures by file name."""
    pictures: dict[str, bytes] = {}
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(links(path, source))
        elif source.strip():
            parts.append(f"```python\n{source}\n```")
            shown = [output(o, path.stem, pictures) for o in cell["outputs"]]
            if any(shown):
                parts.append(
                    '<div class="output" markdown>\n\n'
                    + "\n\n".join(filter(None, shown))
                    + "\n\n</div>"
                )
        if len(parts) == 1:
            parts.append(f"[Download this notebook]({path.name})")
    return "\n\n".join(parts) + "\n", pictures


def output(out: dict[str, Any], stem: str, pictures: dict[str, bytes]) -> str:
    """Return one output as Markdown; a picture is put into `pictures`. Raises ValueError for an error."""
    if out["output_type"] == "error":
        raise ValueError(f"{stem}.ipynb holds an error: {out['ename']}: {out['evalue']}")
    if out["output_type"] == "stream":
        return block("".join(out["text"])) if out["name"] == "stdout" else ""
    data = out["data"]
    if "image/png" in data:
        name = f"{stem}-{len(pictures) + 1}.png"
        pictures[name] = base64.b64decode("".join(data["image/png"]))
        return f"![output {len(pictures)}]({name})"
    return block("".join(data["text/plain"]))


def block(text: str) -> str:
    """Return text as a code block that nothing in it can end."""
    return f"`````text\n{text.rstrip()}\n`````" if text.strip() else ""
