"""Frozen, strict, torch-free configuration: a run is reproducible from its `config.json`.

Unknown keys are errors that suggest the nearest known key. Nothing writes to a config after it is built. Its file is
JSON, or a YAML without surprises, read by the rules of version 1.2: `no`, `on` and dates are words, `010` is ten,
`1e-3` is a number. Tags, anchors and aliases, and keys given twice are refused; depth and size are bounded.
"""

import functools
import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from wsae.core.errors import UserError, nearest
from wsae.core.files import CONFIG_BYTES, GivenTwice, parse_json, read_bytes

MOST_BYTES, MOST_DEPTH = 1 << 18, 50
_PREFIX = "tag:yaml.org,2002:"
_PLAIN = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    "float": r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
}
"""What a plain word may be but text: kind -> pattern."""
_SPECIAL = r"~|null|true|false|yes|no|on|off|y|n|[.]?(?:inf|nan)|[.][0-9].*|[.]+"
"""Words that some YAML takes for something else than text."""


class Read(NamedTuple):
    """What a config file holds."""

    data: dict[str, Any]
    lines: dict[str, int]
    """Line of each key of the outermost object."""
    path: Path

    def where(self, key: str) -> str:
        """Return `file:line` of a key."""
        return f"{self.path}:{self.lines[key]}" if key in self.lines else str(self.path)


def read_config(path: Path | str, what: str = "config") -> Read:
    """Read a JSON or YAML file that holds an object; raises UserError naming file, line and mistake.

    A file is JSON when its name says so, or when it says nothing and begins like JSON.
    """
    path = Path(path)
    text = _text(path, what)
    if is_json(path, text):
        data, lines = _json(path, text, what)
    else:
        data, lines = _yaml(path, text, what)
    if not isinstance(data, dict):
        kind = "JSON object" if is_json(path, text) else "YAML mapping"
        raise UserError(f"{path}: a {what} file is a {kind}, this is a {type(data).__name__}")
    return Read(data, lines, path)


def is_json(path: Path, text: str) -> bool:
    """Return whether a file's text is to be read as JSON."""
    if path.suffix in (".json", ".yaml", ".yml"):
        return path.suffix == ".json"
    return text.lstrip().startswith(("{", "["))


def _text(path: Path, what: str) -> str:
    data = read_bytes(path, CONFIG_BYTES, f" as a {what} file")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a {what} file ({error})") from error
    most = CONFIG_BYTES if is_json(path, text[:4096]) else MOST_BYTES
    if len(data) > most:
        raise UserError(f"{path}: larger than the {most:,} bytes that a {what} file may have")
    return text


def _json(path: Path, text: str, what: str) -> tuple[Any, dict[str, int]]:
    try:
        data = parse_json(text)
    except GivenTwice as error:
        raise UserError(f"{path}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON, as a {what} file of this name is ({error})") from error
    lines: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), 1) if isinstance(data, dict) else ():
        # every string is matched whole, whatever follows: what is inside one is not looked at again
        for found in re.finditer(r'"((?:[^"\\]|\\.)*)"(\s*:)?', line):
            if found[2]:
                lines.setdefault(found[1], number)
    return data, lines


def _yaml(path: Path, text: str, what: str) -> tuple[Any, dict[str, int]]:
    import yaml

    loader = _loader()
    try:
        reading = loader(text)
        node = reading.get_single_node()
        data = None if node is None else reading.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"{place}: {error.problem or error}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: not a {what} file ({' '.join(str(error).split())})") from error
    lines = {}
    if isinstance(node, yaml.MappingNode):
        lines = {key.value: key.start_mark.line + 1 for key, _ in node.value}
    return data, lines


@functools.cache
def _loader() -> Any:
    """Return the YAML loader; made when it is needed, since `wsae --help` imports no YAML."""
    import yaml
    from yaml.composer import ComposerError
    from yaml.constructor import ConstructorError

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.peek_event()
            mark = event.start_mark
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise ComposerError(None, None, "anchors and aliases are not read here", mark)
            if getattr(event, "tag", None):
                raise ComposerError(None, None, "tags (!...) are not read here", mark)
            if self.depth >= MOST_DEPTH:
                raise ComposerError(None, None, f"nested deeper than {MOST_DEPTH}", mark)
            self.depth += 1
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            found: dict[str, Any] = {}
            for key, value in node.value:
                text = key.tag == f"{_PREFIX}str"
                if not text or key.value in found:
                    twice = f"key '{key.value}' is given twice"
                    wrong = twice if text else f"a key is text, not {key.value!r}"
                    raise ConstructorError(None, None, wrong, key.start_mark)
                found[key.value] = self.construct_object(value, deep=deep)
            return found

    for kind, pattern in _PLAIN.items():
        Loader.add_implicit_resolver(f"{_PREFIX}{kind}", re.compile(f"(?:{pattern})$"), None)
    base = {"0o": 8, "0x": 16}
    Loader.add_constructor(
        f"{_PREFIX}int", lambda _, node: int(node.value, base.get(node.value[:2], 10))
    )
    Loader.add_constructor(
        f"{_PREFIX}float", lambda _, node: float(re.sub(r"\.(?=[in])", "", node.value.lower()))
    )
    return Loader


def yaml_value(value: Any) -> str:
    """Return a scalar, a list or an object of plain keys as YAML of one line that reads back as the same value."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(yaml_value(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {yaml_value(item)}' for key, item in value.items())}}}"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    if isinstance(value, int | float):
        return repr(value)
    text = str(value)
    plain = re.fullmatch(r"[A-Za-z_./][A-Za-z0-9_./-]*", text)
    if plain and not re.fullmatch(_SPECIAL, text, re.IGNORECASE):
        return text  # nothing in it means anything to YAML, of any version
    import yaml

    return yaml.safe_dump(text, default_style='"', width=math.inf, allow_unicode=True).rstrip("\n")


# not typing.Self: the runtime type checker of the tests rejects it
C = TypeVar("C", bound="Config")


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
