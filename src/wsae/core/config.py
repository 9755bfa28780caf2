"""Frozen, strict, torch-free configuration: a run is reproducible from its `config.json`.

Unknown keys are errors that suggest the nearest known key. Nothing writes to a config after it is built.
"""

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from wsae.core.configfile import read_config
from wsae.core.errors import UserError, nearest

C = TypeVar(
    "C", bound="Config"
)  # not typing.Self: the runtime type checker of the tests rejects it


FLAGS = "flags"
"""Where values come from that flags say: their mistakes name the flag."""
FLAG_OF = {
    "hooks": "hook",
    "members": "member",
    "scores": "score",
    "key_env": "key_variable",
    "max_requests": "budget_requests",
    "max_tokens": "budget_tokens",
    "cache": "answers",
    "shard_rows": "shard_tokens",
    "level": "noise_level",
    "spread": "noise_spread",
    "rank": "noise_rank",
    "floor": "noise_floor",
}
"""Field of a config -> its flag, where another word reads better on a command line."""


class Config(BaseModel):
    """Base of every configuration: frozen, no extra keys, field docstrings are the help text."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        arbitrary_types_allowed=False,
        ser_json_inf_nan="constants",
    )

    @classmethod
    def parse(cls: type[C], data: dict[str, Any], where: str = "config") -> C:
        """Validate `data`; raises UserError with one line that names the key, the value and the fix."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise UserError(_one_line(cls, error, where)) from error

    @classmethod
    def load(cls: type[C], path: Path | str) -> C:
        """Read a JSON or YAML config file; raises UserError when it is missing, neither, or invalid."""
        return cls.parse(read_config(path).data, where=str(path))

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict (the exact content of `config.json`)."""
        return self.model_dump(mode="json")


def _one_line(cls: type[BaseModel], error: ValidationError, where: str) -> str:
    first = error.errors()[0]
    parts = [str(part) for part in first["loc"]]
    place = ".".join(parts)
    if first["type"] == "extra_forbidden":
        return f"{where}: unknown key '{place}'{nearest(parts[-1], _known_keys(cls))}"
    message = first["msg"].removeprefix("Value error, ")
    value = first.get("input")
    shown = "" if isinstance(value, dict) else f" (got {value!r})"
    more = f"; and {error.error_count() - 1} more" if error.error_count() > 1 else ""
    keys = [part for part in parts if part.isidentifier()]  # not a place in a list, or a type
    if where == FLAGS and keys:
        return f"--{FLAG_OF.get(keys[-1], keys[-1]).replace('_', '-')}: {message}{shown}{more}"
    return f"{where}: {place}: {message}{shown}{more}" if place else f"{where}: {message}{more}"


def _known_keys(cls: type[BaseModel]) -> set[str]:
    keys = set(cls.model_fields)
    for field in cls.model_fields.values():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            keys |= _known_keys(kind)
    return keys
