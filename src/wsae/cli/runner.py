"""Runs one command: flags in, result out as JSON or as the command's own words."""

import contextlib
import importlib
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

from wsae.cli.common import UI, Common, as_json, as_yaml, check_result, device, parse, write_result
from wsae.cli.table import Command
from wsae.core.artifact import CHECKPOINTS
from wsae.core.config import Config
from wsae.core.errors import UserError
from wsae.core.files import finite
from wsae.train.parallel.config import launched

if TYPE_CHECKING:
    from wsae.train.parallel.world import Mesh


@runtime_checkable
class CommandModule(Protocol):
    """What `wsae.cli.<command>` offers."""

    Flags: type[Config]
    ABOUT: str
    run: Callable[[Any, UI], dict[str, Any]]
    show: Callable[[dict[str, Any], UI], None]


def load(command: Command) -> CommandModule:
    """Import the command's module."""
    return cast(CommandModule, importlib.import_module(command.module))


def run_command(command: Command, words: list[str]) -> int:
    """Parse `words`, run the command and print its result; returns the exit code (1: a check failed)."""
    module = load(command)
    prog = f"wsae {command.name}"
    examples = "\n".join(f"  {example}" for example in command.examples)
    try:
        parsed = parse(module.Flags, prog, words, f"{module.ABOUT}\n\nExamples:\n{examples}")
    except SystemExit:
        return 0
    common: Common = cast(Any, parsed).common
    if common.print_config:
        sys.stdout.write(as_json(parsed) if common.as_json else as_yaml(parsed, prog))
        return 0
    # threads that spin while they wait make a training step 20 % slower beside one other busy process
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not common.debug:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        os.getcwd()  # PyTorch's libraries end the process where there is none
    except OSError as error:
        raise UserError(
            f"the current folder is gone ({error.strerror}); change to another"
        ) from error
    check_result(parsed)
    _bound_memory()
    ui = UI(sys.stdout, sys.stderr)
    stdout = sys.stderr if common.as_json else sys.stdout  # for whatever a library writes
    try:
        with contextlib.redirect_stdout(stdout), ui:
            result = module.run(parsed, ui)
            write_result(parsed, result)
    except KeyboardInterrupt as interrupt:
        kept = getattr(module, "KEPT", "nothing was written").format(flags=parsed)
        if describe := getattr(module, "interrupted", None):
            kept = describe(parsed, words, interrupt)
        elif hasattr(parsed, "resume"):
            kept = how_to_go_on(command.name, cast(Any, parsed).out, words, interrupt)
        raise KeyboardInterrupt(kept) from None
    if common.as_json:
        shape = getattr(module, "as_json", None)  # a command's JSON may be more than a dict
        value = shape(result) if shape else result
        sys.stdout.write(json_text(finite(value)) + "\n")
    else:
        module.show(result, ui)
    return 1 if result.get("failed") else 0


def json_text(value: Any) -> str:
    """Return a value as JSON that stdout can carry; what could steer a terminal is escaped."""
    utf8 = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "") == "utf8"
    text = json.dumps(value, indent=1, ensure_ascii=not utf8)
    return "".join(
        char if char.isprintable() or char == "\n" else json.dumps(char)[1:-1] for char in text
    )


def _bound_memory() -> None:
    """Have the system refuse what exceeds the machine's memory, so that it is one line and not a process killed.

    Not beside a GPU, whose driver reserves addresses without end.
    """
    gpu = any(os.path.exists(f"/dev/{name}") for name in ("nvidiactl", "kfd", "dxg"))
    if gpu or not sys.platform.startswith("linux"):
        return
    import resource

    from wsae.core.errors import most_memory

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    with contextlib.suppress(OSError):
        limits = [n for n in (soft, hard, most_memory()) if n != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))


# Runs that torchrun may have started, and that a checkpoint lets go on.


@contextlib.contextmanager
def together(common: Common, out: Path, ui: UI, mesh: str | None = None) -> "Iterator[Mesh]":
    """Be one of the processes that torchrun started; rank 0 alone prints, and a lost rank is one line."""
    from wsae.train.parallel.world import RankLost, joined

    try:
        with joined(mesh, device(common.device)) as world:
            if not world.first:
                with open(os.devnull, "w") as nothing:  # whatever writes there
                    os.dup2(nothing.fileno(), 1)
            yield world
    except RankLost as error:
        kept = (out / CHECKPOINTS).is_dir()
        how = "go on with the same command and --resume" if kept else "start the same command again"
        ui.note(f"wsae: error: {error}; the job has ended; {how}")
        raise SystemExit(1) from error


def how_to_go_on(command: str, out: Path, words: list[str], error: KeyboardInterrupt) -> str:
    """Return what an interrupted run keeps and how to go on."""
    again = shlex.join(["wsae", command, *(w for w in words if w != "--resume"), "--resume"])
    done = f"{error}; " if str(error) else ""
    if launched():
        again = "the same torchrun command and --resume"
    if not (out / CHECKPOINTS).is_dir():
        return f"{done}no checkpoint yet; the same command starts again"
    return f"{done}{out} keeps the work so far; go on with: {again}"
