"""What every command shares: flags that become its frozen Config, and what the user sees while it works.

Parsing is tyro's; what goes wrong becomes a UserError of one line. Under the flags lies a file. A command's result goes
to stdout through `UI.say` and `UI.table`, everything else to stderr: bars on a terminal, elsewhere a line every ten
seconds.
"""

import contextlib
import difflib
import io
import itertools
import json
import math
import re
import textwrap
from collections.abc import Collection, Iterable, Sequence, Set
from contextlib import AbstractContextManager
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
)

import tyro
from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError, create_model
from pydantic.fields import FieldInfo

from wsae.core.config import FLAG_OF, FLAGS, Config, Read, read_config, yaml_value
from wsae.core.errors import UserError, nearest, printable
from wsae.core.files import check_writable, finite, write_json
from wsae.core.progress import EVERY_S, Drawn, Stream, printable_lines
from wsae.train import loggers as copies
from wsae.train.loggers import Logger, LoggerName, Mirror, WandbConfig

WIDE = 10_000
"""Columns where no terminal sets a limit."""


class UI(Drawn):
    """The terminal: notes and progress on stderr, results on stdout."""

    def __init__(self, stdout: Stream, stderr: Stream, every_s: float = EVERY_S) -> None:
        super().__init__(stderr, every_s)
        self.stdout = stdout

    def say(self, text: str) -> None:
        """Print a line of the result (stdout)."""
        self.stdout.write(printable_lines(text) + "\n")

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Print a table of the result (stdout): fitted to a terminal, one line per row elsewhere."""
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        live = self.stdout.isatty()
        text = io.StringIO()
        console = Console(
            file=text, highlight=False, force_terminal=live, width=None if live else WIDE
        )
        table = Table(
            title=printable(title),
            title_justify="left",
            title_style="bold",
            box=None,
            pad_edge=False,
        )
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*(Text(printable(cell), style=_STYLES.get(cell, "")) for cell in row))
        console.print(table)
        self.stdout.write("".join(f"{line.rstrip()}\n" for line in text.getvalue().splitlines()))


_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


# Flags files: what `--config` reads, in JSON or YAML, and what `--print-config` writes.
#
# A flag on the command line wins over the file, the file over the default.

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
    from_record = getattr(kind, "from_record", lambda data, _: data)
    read = read._replace(data=from_record(read.data, read.path))
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
    data = flags.to_dict()
    paths = (path for path, _ in leaves(type(flags)) if path[-1] not in NOT_IN_A_FILE)
    return {key_of(path): reduce(getitem, path, data) for path in paths}


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


Count = Annotated[int, tyro.conf.arg(metavar="N")]
Number = Annotated[float, tyro.conf.arg(metavar="X")]
Name = Annotated[str, tyro.conf.arg(metavar="NAME")]
Place = Annotated[Path, tyro.conf.arg(metavar="PATH")]
# the same where None stands for "as the help says", so that the default need not be shown
MaybeCount = Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="")]
MaybeNumber = Annotated[float | None, tyro.conf.arg(metavar="X", help_behavior_hint="")]
MaybeName = Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")]
MaybePlace = Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")]
_RESULT, _WRITTEN = object(), object()
ResultFile = Annotated[MaybePlace, _RESULT]
"""A file for the result: whether it can be written is seen before the work (`check_result`)."""
JsonFile = Annotated[ResultFile, _WRITTEN]
"""The same for what `run` returns, which is written there as JSON (`write_result`)."""
Switch = Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help_behavior_hint="")]

# Configs as flags: a config's fields are its flags, with the same names, defaults and help.

_METAVARS = {int: "N", float: "X", str: "NAME", Path: "PATH"}


OneOrSeveral = BeforeValidator(
    lambda value: value if isinstance(value, list | tuple) else () if value is None else (value,)
)
"""What lets Python and flags files give one value where several may be given, and null for none."""


def config_flags(
    *kinds: type[Config],
    omit: Collection[str] = (),
    only: Collection[str] = (),
    prefix: str = "",
    several: Collection[str] = (),
) -> Any:
    """Return the base of a class of flags: one for every field of these configs (or `only` some), but not `omit`.

    Nested configs have flags of their own. A flag of `several` takes any number of values, none by default.

    Limits are left to the config, which `config_values` fills, so that a bad value has one message everywhere. Every
    config's `seed` is --seed and its `device` --device. (Any: a type checker sees no class made at run time.)
    """
    fields: dict[str, Any] = {}
    for kind in kinds:
        for name, field in kind.model_fields.items():
            bare = _without_limits(field.annotation)
            left_out = name in ("seed", "device", *omit) or (only and name not in only)
            if left_out or not _is_plain(bare):
                continue
            optional = type(None) in get_args(bare)
            more = " ..." if get_origin(bare) is tuple else ""
            inner = next((k for k in (bare, *get_args(bare)) if k in _METAVARS), None)
            shown: dict[str, Any] = {"metavar": _METAVARS[inner] + more} if inner else {}
            default, about = field.get_default(call_default_factory=True), field.description
            if name in several:
                says_so = optional or "efault" in (about or "")
                about = f"{about} Several: an SAE for each."
                about += "" if says_so else f" Default: {default:g}."
                default, bare = (), Annotated[tuple[inner, ...], OneOrSeveral]
                shown["metavar"] += " ..."
            if optional or default in ("", ()):
                shown["help_behavior_hint"] = ""
            mark = Annotated[bare, tyro.conf.arg(**shown)]
            flag = FLAG_OF.get(name, prefix + name)
            fields[flag] = (mark, Field(default, description=about))
    return create_model("ConfigFlags", __base__=Config, __module__=__name__, **fields)


def config_values(flags: Config, kind: type[Config], prefix: str = "") -> dict[str, Any]:
    """Return what the flags say of the fields of `kind`."""
    names = {name: FLAG_OF.get(name, prefix + name) for name in kind.model_fields}
    own = type(flags).model_fields
    return {name: getattr(flags, flag) for name, flag in names.items() if flag in own}


def _without_limits(kind: Any) -> Any:
    """Return a type without the limits that pydantic checks, at any depth."""
    if get_origin(kind) is Annotated:
        return _without_limits(get_args(kind)[0])
    if get_origin(kind) is Literal or not get_args(kind):
        return kind
    inner = tuple(part if part is ... else _without_limits(part) for part in get_args(kind))
    return tuple[inner] if get_origin(kind) is tuple else Union[inner]  # noqa: UP007


def _is_plain(kind: Any) -> bool:
    """Return whether a flag can hold the type: nothing in it is a config."""
    parts = () if get_origin(kind) is Literal else get_args(kind)
    nested = isinstance(kind, type) and get_origin(kind) is None and issubclass(kind, Config)
    return not nested and all(_is_plain(part) for part in parts if part is not ...)


_LARGEST = 2**31 - 1
"""The largest count of what is held at once or done one after the other."""
_TOTAL = 10**15
_MOST = {
    **dict.fromkeys(("tokens", "heldout_tokens", "shard_tokens", "splice_tokens", "rows"), _TOTAL),
    **dict.fromkeys(("budget_tokens", "budget_requests"), _TOTAL),
    **dict.fromkeys(("dead_after", "stats_tokens", "splice_logits", "replay_bytes"), _TOTAL),
    "draws": 10**7,
    "seed": 2**63 - 1,
}
"""Flag -> its largest value, where that is another: totals over a whole command, resampling, seeds."""
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
    """Read flags from a YAML or JSON file. A flag on the command line wins over the file, the file over the default."""
    print_config: Switch = False
    """Print the flags as such a file, in YAML with help, or with --json in JSON, and stop."""
    debug: Switch = False
    """Show the traceback of an error."""


def device(name: str) -> str:
    """Return the device to use; raises UserError for one this machine lacks."""
    import torch

    from wsae.core.calls import usable_device

    if name == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    return usable_device(name, "--device")


CommonFlags = tyro.conf.OmitArgPrefixes[Common]
"""The last flags of every command: `common: CommonFlags = Common()`."""


def parse(kind: type[F], prog: str, words: list[str], about: str) -> F:
    """Return `kind` filled from `words`; raises UserError with one line, or SystemExit(0) after --help."""
    file: dict[tuple[str, ...], Any] = {}
    options: dict[str, Any] = {}
    if "--help" not in words and "-h" not in words:
        check_known(kind, words)
        path = _value_of("--config", words)
        if path is not None:
            file = read_flags(kind, path)
            options = {"default": filled(kind, file)}
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            flags = tyro.cli(kind, prog=prog, args=words, description=about, **options)
        _check_numbers(flags)
        return flags
    except SystemExit as end:
        if end.code == 0:
            raise
        raise UserError(
            f"{explain(kind, words, plain(stderr.getvalue()), set(file))}; see {prog} --help"
        ) from None


def _check_numbers(flags: Config) -> None:
    """Raise UserError for a number that no command can work with: not finite, a count below 0 or far too large."""
    for path, _ in leaves(type(flags)):
        value: Any = reduce(getattr, path, flags)
        most = _MOST.get(path[-1], _LARGEST)
        for one in value if isinstance(value, tuple) else (value,):
            said = f"--{flag_name(path[-1])}: {one}"
            if isinstance(one, float) and not math.isfinite(one):
                raise UserError(f"{said} is not a number to work with; give a finite one")
            if isinstance(one, int) and not 0 <= one <= most:
                raise UserError(f"{said:.60} is not between 0 and {most:,}")


def check_result(flags: Config) -> None:
    """Raise UserError where the command's result cannot be written to the file that is asked for."""
    for path in _files(flags, _RESULT):
        check_writable(path)


def write_result(flags: Config, result: dict[str, Any]) -> None:
    """Write what a command returned to the file that is asked for."""
    for path in _files(flags, _WRITTEN):
        write_json(path, finite(result))


def _files(flags: Config, mark: object) -> list[Path]:
    marked = (getattr(flags, p[0]) for p, field in leaves(type(flags)) if mark in field.metadata)
    return [path for path in marked if path is not None]


def check_known(kind: type[Config], words: list[str]) -> None:
    """Raise UserError for the first flag that does not exist, with the nearest that do, or has too few or many values.

    What takes several values at once is given once, as the later would take the place of the earlier, and not without
    one where that is as if it were left out.
    """
    known = set(flag_names(kind))
    several = {f"--{flag_name(p[-1])}": f for p, f in leaves(kind) if _takes_several(f)}
    seen: set[str] = set()
    for word, after in itertools.pairwise([*words, "--"]):
        if not word.startswith("--") or word == "--":
            continue
        flag = word.split("=", 1)[0].replace("_", "-")
        if flag not in known:
            close = difflib.get_close_matches(flag, known, n=3, cutoff=0.6)
            mend = f" (nearest: {', '.join(close)})" if close else "; see --help"
            raise UserError(f"unknown flag {flag}{mend}")
        none = "=" not in word and after.startswith("--")
        if none and flag in several and several[flag].default == ():
            raise UserError(f"no value for '{word}'")
        if flag in several and flag in seen:
            raise UserError(f"{flag} is given twice; give all its values after one: {flag} A B")
        seen.add(flag)


def _takes_several(field: FieldInfo) -> bool:
    """Return whether a flag takes all its values at once."""
    kinds = (field.annotation, *get_args(field.annotation))
    return tyro.conf.UseAppendAction not in field.metadata and any(
        get_origin(one) is tuple for one in kinds
    )


def flag_names(kind: type[Config]) -> dict[str, tuple[str, ...]]:
    """Return flag -> path of the field it fills, the negative forms of switches included."""
    flags: dict[str, tuple[str, ...]] = {}
    for path, field in leaves(kind):
        if is_positional(field) or tyro.conf.Fixed in field.metadata:
            continue
        name = flag_name(path[-1])
        flags[f"--{name}"] = path
        if field.annotation is bool and tyro.conf.FlagCreatePairsOff not in field.metadata:
            flags[f"--no-{name}"] = path
    return flags


def is_positional(field: FieldInfo) -> bool:
    """Return whether the field is given by place, not by flag."""
    return tyro.conf.Positional in field.metadata


def _value_of(flag: str, words: list[str]) -> str | None:
    for here, following in itertools.pairwise([*words, ""]):
        if here == flag:
            return following
        if here.startswith(f"{flag}="):
            return here.removeprefix(f"{flag}=")
    return None


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


def explain(
    kind: type[Config], words: list[str], message: str, file: Set[tuple[str, ...]] = frozenset()
) -> str:
    """Return tyro's message in plainer words, naming flag and value; `file`: the fields that a flags file gives."""
    flag = _PARSING.match(message)
    if flag:
        return _wrong_value(kind, words, flag[1])
    choice = _CHOICE.match(message)
    if choice:
        known = choice["choices"].replace("'", "").rstrip(",")
        return f"{choice['flag']}: '{choice['value']}' is not one of {known}"
    if message.startswith("Missing from"):
        return f"missing: {', '.join(_missing(kind, words, file))}"
    for old, new in _PLAINER:
        message = message.replace(old, new)
    return message.rstrip(".") or "the flags could not be read"


def _missing(kind: type[Config], words: list[str], file: Set[tuple[str, ...]]) -> list[str]:
    given = {word.split("=", 1)[0].replace("_", "-") for word in words}
    needed = [(p[-1], f) for p, f in leaves(kind) if f.is_required() and p not in file]
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


# Flags that name loggers, and the context in which they copy a run's metrics.


class LoggerFlags(config_flags(WandbConfig, prefix="wandb_")):
    """Copies of the metrics for other tools."""

    logger: Annotated[
        tuple[LoggerName, ...],
        tyro.conf.arg(metavar="{tensorboard,wandb} ...", help_behavior_hint=""),
    ] = ()
    """Copy metrics.jsonl for these as it is written: tensorboard to the run's tensorboard/, wandb (Weights & Biases) to
    its wandb/ and, with your key, to the server. A resumed run has each step once."""

    def made(self) -> list[Logger]:
        """Return the loggers; raises UserError for one that cannot work here."""
        cfg = WandbConfig.parse(config_values(self, WandbConfig, "wandb_"), where=FLAGS)
        known = {"tensorboard": copies.tensorboard, "wandb": lambda: copies.wandb(cfg)}
        twice = [name for name in known if self.logger.count(name) > 1]
        if twice:
            raise UserError(f"--logger {twice[0]} {twice[0]}: name each logger once")
        loggers = [known[name]() for name in self.logger]
        for logger in loggers:
            logger.check()
        return loggers


def mirrored(loggers: list[Logger], ui: UI, first: bool = True) -> AbstractContextManager[Mirror]:
    """Copy the metrics of the run trained inside, where this process is the one that writes (`first`)."""
    return copies.mirrored(loggers if first else [], lambda text: ui.note(f"wsae: {text}"))
