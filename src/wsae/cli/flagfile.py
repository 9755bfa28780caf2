"""Flags files: what `--config` reads, in JSON or YAML, and what `--print-config` writes.

A flag on the command line wins over the file, the file over the default.
"""

import json
import textwrap
from pathlib import Path
from typing import Any, TypeVar, get_origin

import tyro
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from wsae.core.config import Config
from wsae.core.configfile import Read, read_config, yaml_value
from wsae.core.errors import UserError, nearest

F = TypeVar("F", bound=Config)
Leaf = tuple[tuple[str, ...], FieldInfo]

NOT_IN_A_FILE = ("config", "print_config", "debug")
"""Flags that only the command line has."""
_WIDTH = 100


def leaves(kind: type[Config], prefix: tuple[str, ...] = ()) -> list[Leaf]:
    """Return every field of `kind` and of the Configs nested in it, with its path."""
    found: list[Leaf] = []
    for name, field in kind.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Config):
            found += leaves(inner, (*prefix, name))
        else:
            found.append(((*prefix, name), field))
    return found


def flag_name(key: str) -> str:
    """Return a field's flag without its dashes; `json` cannot be the name of a pydantic field."""
    return "json" if key == "as_json" else key.replace("_", "-")


def key_of(path: tuple[str, ...]) -> str:
    """Return the key of a field in a flags file."""
    return flag_name(path[-1]).replace("-", "_")


def read_flags(kind: type[Config], path: Path | str) -> dict[tuple[str, ...], Any]:
    """Return path of a field -> value for what the file says; raises UserError naming file, line and key.

    A command whose Flags have `from_record` also takes the `config.json` of its runs.
    """
    read = read_config(path, "flags")
    from_record = getattr(kind, "from_record", None)
    if from_record is not None:
        read = read._replace(data=from_record(read.data, read.path) or read.data)
    known = {key_of(p): (p, f) for p, f in leaves(kind) if p[-1] not in NOT_IN_A_FILE}
    found: dict[tuple[str, ...], Any] = {}
    for key, value in read.data.items():
        if key not in known:
            raise UserError(f"{read.where(key)}: unknown key '{key}'{nearest(key, known)}")
        place, field = known[key]
        found[place] = _checked(read, key, field, value)
    return found


def filled(kind: type[F], values: dict[tuple[str, ...], Any], prefix: tuple[str, ...] = ()) -> F:
    """Return `kind` with these values and else its defaults; what is needed and not there is left open for tyro."""
    made: dict[str, Any] = {}
    for name, field in kind.model_fields.items():
        place, inner = (*prefix, name), field.annotation
        if isinstance(inner, type) and issubclass(inner, Config):
            made[name] = filled(inner, values, place)
        elif place in values:
            made[name] = values[place]
        else:
            default = field.get_default(call_default_factory=True)
            made[name] = tyro.MISSING if field.is_required() else default
    return kind.model_construct(**made)


def _checked(read: Read, key: str, field: FieldInfo, value: Any) -> Any:
    """Return a value as its flag's type."""
    several = get_origin(field.annotation) is tuple
    items = value if isinstance(value, list) else [value]
    given = items if several and value is not None else value
    truth = any(isinstance(item, bool) for item in items) and "bool" not in str(field.annotation)
    try:
        if not truth:
            return TypeAdapter(field.rebuild_annotation()).validate_python(given)
        message = "Input should not be true or false"
    except ValidationError as error:
        message = error.errors()[0]["msg"]
    mend = "; quote it" if "valid string" in message or "path" in message else ""
    raise UserError(f"{read.where(key)}: {key}: {message} (got {value!r}){mend}")


def as_file(flags: Config) -> dict[str, Any]:
    """Return the flags as the object that `--config` reads."""
    values: dict[str, Any] = {}
    data = flags.to_dict()
    for path, _ in leaves(type(flags)):
        if path[-1] not in NOT_IN_A_FILE:
            value: Any = data
            for step in path:
                value = value[step]
            values[key_of(path)] = value
    return values


def as_json(flags: Config) -> str:
    """Return the flags as a JSON file."""
    return json.dumps(as_file(flags), indent=1) + "\n"


def as_yaml(flags: Config, command: str) -> str:
    """Return the flags as a YAML file, each below its help."""
    values = as_file(flags)
    lines = [f"# flags of `{command}`; read them with --config FILE, flags on the command line win"]
    for path, field in leaves(type(flags)):
        key = key_of(path)
        if key in values:
            about = " ".join((field.description or "").split())
            lines += ["", *(f"# {line}" for line in textwrap.wrap(about, _WIDTH - 2))]
            lines.append(f"{key}: {yaml_value(values[key])}")
    return "\n".join(lines) + "\n"
