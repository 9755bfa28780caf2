"""What a format is: one value with how to know it, read it, understand it and write it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from wsae.core.errors import UserError
from wsae.core.files import read_json
from wsae.interop.config import FormatName, Provenance
from wsae.interop.weights import Foreign, Named
from wsae.sae.model import SparseAutoencoder

MAX_JSON = 16 * 2**20
"""Bytes a config file may have."""


class Format(NamedTuple):
    """One library's folder of one SAE.

    `rename` changes names and orientation only; `understand` also folds what our forward pass has no switch for. Every
    function raises UserError in one line for what has no equal on the other side.
    """

    name: FormatName
    files: tuple[str, str]
    """Config and weights."""
    read: Callable[[Path], Foreign]
    rename: Callable[[Foreign, str], Named]
    understand: Callable[[Foreign, str], SparseAutoencoder]
    about: Callable[[Foreign], Provenance]
    pack: Callable[[SparseAutoencoder, Provenance], Foreign]
    write: Callable[[Foreign, Path], None]

    def detect(self, path: Path) -> bool:
        """Whether a folder holds this format's weights."""
        return (path / self.files[1]).is_file()


def read_config(path: Path) -> dict[str, Any]:
    """Return a JSON object; raises UserError when the file is missing, too large, damaged or something else."""
    if path.is_file() and path.stat().st_size > MAX_JSON:
        raise UserError(f"{path}: {path.stat().st_size:,} bytes are no SAE's config")
    data = read_json(path)
    if not isinstance(data, dict):
        raise UserError(f"{path}: a config is a JSON object, this is a {type(data).__name__}")
    return data


def whole(config: dict[str, Any], key: str, where: str) -> int:
    """Return a positive whole number of a config; raises UserError naming key and value."""
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{where}: {key} = {value!r} is not a positive whole number")
    return value


def plain(data: dict[str, Any]) -> dict[str, Any]:
    """Return the entries that are None, words, numbers or truth values (what may be kept of a stranger's config)."""
    return {k: v for k, v in data.items() if v is None or isinstance(v, str | int | float)}


def maybe(data: dict[str, Any], key: str, kind: type[Any]) -> Any:
    """Return an entry of that type, or None."""
    value = data.get(key)
    return value if isinstance(value, kind) and not (kind is int and value is True) else None
