"""Finished parts of an interpretation, in files named by the hash of what they were made from.

A killed run finds its parts again; another score or control makes only its own.
"""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wsae.core.errors import UserError
from wsae.core.files import digest, read_sealed, seal, write_text

Json = dict[str, Any]


class Parts:
    """A directory of parts."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def get(self, key: Json, make: Callable[[], Json]) -> Json:
        """Return the part made from `key`, from disk or made now; what was made now is read back the same way."""
        path = self.place / f"{digest(key)}.json"
        if not path.is_file():
            write_ascii(path, seal(finite({"key": key, "part": make()})))
        found = read_sealed(path)
        if found.keys() != {"key", "part"} or digest(found["key"]) != path.stem:
            raise UserError(f"{path}: altered, not the part it is named after; remove it")
        return found["part"]

    def clear(self) -> None:
        """Forget all of them."""
        shutil.rmtree(self.place, ignore_errors=True)


def write_ascii(path: Path, value: object) -> None:
    """Write a JSON file atomically: NaN as null, and every text in ASCII, since a model's may not be valid UTF-8."""
    write_text(path, json.dumps(finite(value), indent=1, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """Replace NaN and infinities by null: JSON has neither."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
