"""The package's own code, parsed once in a process for all tests that read it."""

import ast
import functools
from pathlib import Path


@functools.cache
def parsed(folder: Path) -> dict[Path, ast.Module]:
    """Return every Python file below a folder, in order, and its tree."""
    return {path: ast.parse(path.read_text()) for path in sorted(folder.rglob("*.py"))}
