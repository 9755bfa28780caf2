"""Metrics as JSON lines: appended and flushed, cut back to a checkpoint's length on resume."""

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from wsae.core.artifact import METRICS_FILE
from wsae.core.errors import UserError
from wsae.core.files import flush, growing, parse_json, read_lines, refusals, sha256_file


class JsonLines:
    """A file of JSON objects, one a line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, row: dict[str, Any]) -> None:
        """Append one row, or none of it: a full disk is a UserError."""
        with refusals(self.path), growing(self.path) as file:
            size = os.fstat(file.fileno()).st_size
            line = json.dumps(row).encode() + b"\n"
            try:
                while line:
                    line = line[file.write(line) :]
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(size)
                raise

    def size(self) -> int:
        """Return the file's length in bytes."""
        return self.path.stat().st_size if self.path.exists() else 0

    def mark(self) -> dict[str, Any]:
        """Flush the rows to disk; return what a checkpoint keeps of them, for `back_to`."""
        if not self.path.exists():
            return {"metrics_bytes": 0, "metrics_sha256": hashlib.sha256().hexdigest()}
        with refusals(self.path):
            flush(self.path)
        return {"metrics_bytes": self.size(), "metrics_sha256": sha256_file(self.path)}

    def back_to(self, mark: dict[str, Any] | None) -> None:
        """Drop the rows since a mark (none: all); raises UserError when those before are not what they were."""
        size = 0 if mark is None else int(mark["metrics_bytes"])
        self.cut(size)
        expected = None if mark is None else mark.get("metrics_sha256")
        if size and expected is not None and sha256_file(self.path) != expected:
            raise UserError(f"{self.path}: altered since its checkpoint; use another --out")

    def cut(self, size: int) -> None:
        """Drop everything past `size` bytes; raises UserError when the file is already shorter."""
        if self.size() < size:
            raise UserError(
                f"{self.path}: {self.size()} bytes where {size} were written (cut or altered)"
            )
        if self.path.exists():
            with refusals(self.path), growing(self.path) as file:
                file.truncate(size)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the rows; raises UserError naming the first damaged line."""
    rows = []
    for number, line in enumerate(read_lines(path), 1):
        try:
            row = parse_json(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: line {number} is damaged, not JSON ({error})") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}: line {number} is damaged, not a JSON object")
        rows.append(row)
    return rows


# Rows of `metrics.jsonl` as the scalars of one step, named as loggers show them.

_KEYS = ("step", "hook", "member")


def scalars(rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Return name -> value of one step's rows: `member/metric`, with several hooks `hook/member/metric`."""
    rows = list(rows)
    several = len({row.get("hook") for row in rows}) > 1
    found: dict[str, float] = {}
    for row in rows:
        place = [row["hook"]] if several else []
        place += [row["member"]] if "member" in row else []
        for key, value in row.items():
            if key not in _KEYS and isinstance(value, int | float):
                found["/".join([*place, key])] = float(value)
    return found


def steps_of(run: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield step and scalars of all rows that the run has so far; raises UserError for a damaged line."""
    path = run / METRICS_FILE
    rows = read_json_lines(path) if path.exists() else []
    for step, of_step in itertools.groupby(rows, key=lambda row: int(row["step"])):
        yield step, scalars(of_step)
