"""What a format is: one value with how to know it, read it, understand it and write it; and how configs are read.

Every key of another tool's config is used, known to change nothing, or refused by name (`check_keys`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from wsae.core.errors import UserError, nearest
from wsae.core.files import read_json
from wsae.interop.config import FormatName, Provenance, SourceName
from wsae.interop.weights import Foreign, Named
from wsae.sae.model import SparseAutoencoder

THROUGH_SAELENS = (
    "open it in SAELens 6 (SAE.from_pretrained), save it (save_model) and import that folder"
)
"""How to bring what SAELens reads and wsae does not."""
MAX_JSON = 16 * 2**20
"""Bytes a config file may have."""


@dataclass(frozen=True)
class Reader:
    """One kind of folder (or file) that holds one SAE.

    `rename` changes names and orientation only; `understand` also folds what our forward pass has no switch for. Every
    function raises UserError in one line for what has no equal here.
    """

    name: SourceName
    files: tuple[str, ...]
    """The config's name first, then those of the weights, of which one is enough."""
    read: Callable[[Path], Foreign]
    rename: Callable[[Foreign, str], Named]
    understand: Callable[[Foreign, str], SparseAutoencoder]
    about: Callable[[Foreign], Provenance]

    def detect(self, path: Path) -> bool:
        """Whether a folder holds this format's weights."""
        return any((path / name).is_file() for name in self.files[1:])


@dataclass(frozen=True)
class Format(Reader):
    """One library's folder of one SAE, which can be written too: `pack` refuses what has no equal there."""

    name: FormatName
    pack: Callable[[SparseAutoencoder, Provenance], Foreign]
    write: Callable[[Foreign, Path], None]


class Switch(NamedTuple):
    """A key of a config that changes what an SAE computes: the values that do not, and what the others mean."""

    off: tuple[object, ...]
    otherwise: str


class Keys(NamedTuple):
    """What is known about the keys of one tool's config; `harmless` ones describe training, data or bookkeeping."""

    used: frozenset[str]
    harmless: frozenset[str]
    switches: dict[str, Switch]


_OFF = (None, False, 0, "", "none", [], {})


def check_keys(config: dict[str, Any], keys: Keys, where: str) -> tuple[str, ...]:
    """Return notes on unknown keys that are off; raises UserError naming a key that may change the SAE's function."""
    unknown = []
    for key, value in config.items():
        switch = keys.switches.get(key)
        if switch is not None and value not in switch.off:
            raise UserError(f"{where}: {key} = {_brief(value)}: {switch.otherwise}")
        if switch is not None or key in keys.used or key in keys.harmless:
            continue
        if value not in _OFF:
            known = [*keys.used, *keys.switches]
            raise UserError(
                f"{where}: {key} = {_brief(value)} is a key that wsae does not know{nearest(key, known)}, and it may "
                "change what the SAE computes; if it does not, take it out of a copy of the config and import that"
            )
        unknown.append(f"{key} = {_brief(value)}")
    return (f"unknown keys that are off: {', '.join(unknown)}",) if unknown else ()


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_config(path: Path) -> dict[str, Any]:
    """Return a JSON object; raises UserError when the file is missing, too large, damaged or something else."""
    if path.is_file() and path.stat().st_size > MAX_JSON:
        raise UserError(f"{path}: {path.stat().st_size:,} bytes are no SAE's config")
    if not path.exists():
        raise UserError(
            f"{path}: no such file, and weights alone do not say what the SAE computes; if SAELens reads this release, "
            f"{THROUGH_SAELENS}"
        )
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


def truth(config: dict[str, Any], key: str, default: bool, where: str) -> bool:
    """Return a truth value of a config, `default` where it is not there; raises UserError for anything else."""
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise UserError(f"{where}: {key} = {_brief(value)} is not true or false")
    return value


def plain(data: dict[str, Any]) -> dict[str, Any]:
    """Return the entries that are None, words, numbers or truth values (what may be kept of a stranger's config)."""
    return {k: v for k, v in data.items() if v is None or isinstance(v, str | int | float)}


def maybe(data: dict[str, Any], key: str, kind: type[Any]) -> Any:
    """Return an entry of that type, or None."""
    value = data.get(key)
    return value if isinstance(value, kind) and not (kind is int and value is True) else None
