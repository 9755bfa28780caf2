"""Metrics as JSON lines: appended and flushed, cut back to a checkpoint's length on resume."""

import json
from pathlib import Path
from typing import Any

from wsae.core.artifact import as_user_error
from wsae.core.errors import UserError


class JsonLines:
    """A file of JSON objects, one a line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, row: dict[str, Any]) -> None:
        """Append one row."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise as_user_error(error, self.path) from error

    def size(self) -> int:
        """Return the file's length in bytes."""
        return self.path.stat().st_size if self.path.exists() else 0

    def cut(self, size: int) -> None:
        """Drop everything past `size` bytes; raises UserError when the file is already shorter."""
        if self.size() < size:
            raise UserError(
                f"{self.path}: {self.size()} bytes where {size} were written (cut or altered)"
            )
        if self.path.exists():
            with self.path.open("rb+") as file:
                file.truncate(size)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the rows; raises UserError naming the first damaged line."""
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise UserError(f"{path}: line {number} is damaged, not JSON ({error})") from error
    return rows
