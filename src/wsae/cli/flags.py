"""Flags: a command's frozen Config read from the command line and, under it, from a JSON file.

Parsing is tyro's; what goes wrong becomes a UserError of one line.
"""

import contextlib
import difflib
import io
import itertools
import re
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar, runtime_checkable

import tyro
from pydantic.fields import FieldInfo

from wsae.core.artifact import read_json
from wsae.core.config import Config
from wsae.core.errors import UserError, nearest

F = TypeVar("F", bound=Config)

Count = Annotated[int, tyro.conf.arg(metavar="N")]
Number = Annotated[float, tyro.conf.arg(metavar="X")]
Name = Annotated[str, tyro.conf.arg(metavar="NAME")]
Place = Annotated[Path, tyro.conf.arg(metavar="PATH")]
# the same where None stands for "as the help says", so that the default need not be shown
MaybeCount = Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="")]
MaybeNumber = Annotated[float | None, tyro.conf.arg(metavar="X", help_behavior_hint="")]
MaybeName = Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")]
MaybePlace = Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")]
Switch = Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help_behavior_hint="")]

_RULE = re.compile(r"[─-]{5,}")
_PARSING = re.compile(r"Error parsing (--\S+?):")
_CHOICE = re.compile(
    r"invalid choice '(?P<value>.*)' for argument '(?P<flag>.*?)'. Expected one of \((?P<choices>.*)\)"
)
_PLAINER = (
    ("Unrecognized options:", "too many words, left over:"),
    ("Missing value for argument", "no value for"),
)


class Common(Config):
    """Flags of every command."""

    seed: Count = 0
    """One seed decides everything random."""
    device: Name = "auto"
    """cpu, cuda, cuda:1, mps; auto: the fastest one here."""
    as_json: Annotated[
        bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(name="json", help_behavior_hint="")
    ] = False
    """Print the result as JSON on stdout, and nothing else there."""
    config: MaybePlace = None
    """Read flags from a JSON file; those on the command line win."""
    print_config: Switch = False
    """Print the flags as such a file and stop."""
    debug: Switch = False
    """Show the traceback of an error."""


CommonFlags = tyro.conf.OmitArgPrefixes[Common]


@runtime_checkable
class HasCommon(Protocol):
    """A command's flags end with `common: CommonFlags = Common()`."""

    @property
    def common(self) -> Common:
        """Flags of every command."""
        ...


def parse(kind: type[F], prog: str, words: list[str], about: str) -> F:
    """Return `kind` filled from `words`; raises UserError with one line, or SystemExit(0) after --help."""
    if "--help" not in words and "-h" not in words:
        check_known(kind, words)
        words = with_config_file(kind, words)
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            return tyro.cli(kind, prog=prog, args=words, description=about)
    except SystemExit as end:
        if end.code == 0:
            raise
        raise UserError(
            f"{explain(kind, words, plain(stderr.getvalue()))}; see {prog} --help"
        ) from None


def check_known(kind: type[Config], words: list[str]) -> None:
    """Raise UserError for the first flag that does not exist, with the nearest that do."""
    known = set(flag_names(kind))
    for word in words:
        if word.startswith("--") and word != "--":
            flag = word.split("=", 1)[0].replace("_", "-")
            if flag not in known:
                close = difflib.get_close_matches(flag, known, n=3, cutoff=0.6)
                mend = f" (nearest: {', '.join(close)})" if close else "; see --help"
                raise UserError(f"unknown flag {flag}{mend}")


def flag_names(kind: type[Config]) -> dict[str, tuple[str, ...]]:
    """Return flag -> path of the field it fills, the negative forms of switches included."""
    flags: dict[str, tuple[str, ...]] = {}
    for path, field in leaves(kind):
        if is_positional(field):
            continue
        name = flag_name(path[-1])
        flags[f"--{name}"] = path
        if field.annotation is bool and not is_switch(field):
            flags[f"--no-{name}"] = path
    return flags


def leaves(
    kind: type[Config], prefix: tuple[str, ...] = ()
) -> list[tuple[tuple[str, ...], FieldInfo]]:
    """Return every field of `kind` and of the Configs nested in it, with its path."""
    found: list[tuple[tuple[str, ...], FieldInfo]] = []
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


def is_switch(field: FieldInfo) -> bool:
    """Whether the flag has no --no- form."""
    return tyro.conf.FlagCreatePairsOff in field.metadata


def is_positional(field: FieldInfo) -> bool:
    """Whether the field is given by place, not by flag."""
    return tyro.conf.Positional in field.metadata


def with_config_file(kind: type[Config], words: list[str]) -> list[str]:
    """Return `words` with the flags of `--config FILE` added where the command line is silent."""
    path = _value_of("--config", words)
    if path is None:
        return words
    by_key = {key_of(path): (path, field) for path, field in leaves(kind)}
    given = {flag_names(kind).get(w.split("=", 1)[0].replace("_", "-")) for w in words}
    placed = bool(words) and not words[0].startswith("-")
    before: list[str] = []
    added: list[str] = []
    for key, value in _read_object(Path(path)).items():
        if key not in by_key:
            raise UserError(f"{path}: unknown key '{key}'{nearest(key, by_key)}")
        place, field = by_key[key]
        if is_positional(field):
            before += [] if placed else _words_of(value)
        elif place not in given:
            added += _flag_words(key, value, is_switch(field))
    return [*before, *words, *added]


def as_file(flags: Config) -> dict[str, Any]:
    """Return the flags as the JSON object that `--config` reads."""
    values: dict[str, Any] = {}
    data = flags.to_dict()
    for path, _ in leaves(type(flags)):
        if path[-1] not in ("config", "print_config", "debug"):
            value: Any = data
            for step in path:
                value = value[step]
            values[key_of(path)] = value
    return values


def key_of(path: tuple[str, ...]) -> str:
    """Return the key of a field in a flags file."""
    return flag_name(path[-1]).replace("-", "_")


def _read_object(path: Path) -> dict[str, Any]:
    data = read_json(path)
    if not isinstance(data, dict):
        raise UserError(f"{path}: a flags file is a JSON object, this is a {type(data).__name__}")
    return data


def _value_of(flag: str, words: list[str]) -> str | None:
    for here, following in itertools.pairwise([*words, ""]):
        if here == flag:
            return following
        if here.startswith(f"{flag}="):
            return here.removeprefix(f"{flag}=")
    return None


def _flag_words(key: str, value: Any, switch: bool) -> list[str]:
    name = key.replace("_", "-")
    if value is None or value == []:
        return []
    if isinstance(value, bool):
        off = [] if switch else [f"--no-{name}"]
        return [f"--{name}"] if value else off
    return [f"--{name}", *_words_of(value)]


def _words_of(value: Any) -> list[str]:
    if isinstance(value, list):
        return [str(item) for item in value]
    return [] if value is None else [str(value)]


def plain(boxed: str) -> str:
    """Return the message of tyro's box as one line: the first part below the title, between two rules."""
    lines = [line.strip("│| ") for line in boxed.splitlines()]
    parts: list[list[str]] = [[]]
    for line in lines:
        if _RULE.fullmatch(line):
            parts.append([])
        elif not line.startswith(("╭", "╰")):
            parts[-1].append(line)
    drawn = any(line.startswith("╭") for line in lines)  # else the title is a part of its own
    body = parts[0] if drawn or len(parts) < 2 else parts[1]
    return " ".join(" ".join(body).split())


def explain(kind: type[Config], words: list[str], message: str) -> str:
    """Return tyro's message in plainer words, naming flag and value."""
    flag = _PARSING.match(message)
    if flag:
        return _wrong_value(kind, words, flag[1])
    choice = _CHOICE.match(message)
    if choice:
        return f"{choice['flag']}: '{choice['value']}' is not one of {choice['choices'].replace(chr(39), '')}"
    if message.startswith("Missing from"):
        return f"missing: {', '.join(_missing(kind, words))}"
    for old, new in _PLAINER:
        message = message.replace(old, new)
    return message.rstrip(".") or "the flags could not be read"


def _missing(kind: type[Config], words: list[str]) -> list[str]:
    given = {word.split("=", 1)[0].replace("_", "-") for word in words}
    needed = [(path[-1], field) for path, field in leaves(kind) if field.is_required()]
    flags = [f"--{flag_name(key)}" for key, field in needed if not is_positional(field)]
    placed = [key.upper() for key, field in needed if is_positional(field)]
    if words and not words[0].startswith("-"):
        placed = placed[1:]
    return placed + [flag for flag in flags if flag not in given]


def _wrong_value(kind: type[Config], words: list[str], flag: str) -> str:
    path = flag_names(kind).get(flag)
    field = next((f for p, f in leaves(kind) if p == path), None)
    wanted = str(field.annotation) if field is not None else ""
    what = (
        "a whole number" if "int" in wanted else "a number" if "float" in wanted else "valid here"
    )
    value = _value_of(flag, words) or ""
    return f"{flag}: '{value}' is not {what}"
