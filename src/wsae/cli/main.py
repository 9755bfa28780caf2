"""Entry point: finds the command, turns every ending into an exit code and at most one line.

Only the standard library is imported here; a command's own modules are imported when it runs.
"""

import errno
import io
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

from wsae.cli import table
from wsae.core import __version__
from wsae.core.errors import UserError, nearest, printable

EXTRAS = {
    **dict.fromkeys(("transformers", "tokenizers", "gguf", "accelerate", "pyarrow"), "lm"),
    **dict.fromkeys(("PIL", "sklearn", "kornia"), "vision"),
    **dict.fromkeys(("datasets", "huggingface_hub"), "hub"),
    **dict.fromkeys(("jinja2", "matplotlib"), "report"),
    **{"httpx": "interp", "tensorboard": "tensorboard", "wandb": "wandb"},
}
"""Module -> the extra that brings it."""
OK, BROKEN, BAD_INPUT, INTERRUPTED, PIPE_CLOSED = 0, 1, 2, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 1 failed, 2 bad input, 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    code = OK
    _open_streams()
    try:
        code = _dispatch(words)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader (`| head`) has enough
        _silence()
        return PIPE_CLOSED
    except OSError as error:  # stdout is closed, or goes to a file on a full disk
        _silence()
        return code or _error(f"stdout: cannot be written ({error.strerror})", BROKEN)
    return code


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        sys.stdout.write(table.help_text())
        return OK
    if words[0] in ("-V", "--version", "version"):
        sys.stdout.write(f"wsae {__version__}\n")
        return OK
    name, rest = words[0], words[1:]
    command = table.find(name)
    if command is None:
        known = table.names()
        what = "put the command first" if name.startswith("-") else "wsae --help lists them"
        return _error(f"no command '{name}'{nearest(name, known)}; {what}")

    def run() -> int:
        from wsae.cli.runner import run_command

        return run_command(command, rest)

    return _guarded(run, "--debug" in rest)


def _guarded(call: Callable[[], int], debug: bool) -> int:
    """Turn what `call` raises into one line and an exit code; with `debug` the traceback comes first."""
    try:
        return call()
    except BrokenPipeError:
        raise
    except KeyboardInterrupt as interrupt:
        note = str(interrupt) or "nothing is damaged"
        return _error(f"interrupted; {note}", INTERRUPTED, kind="")
    except UserError as error:
        return _error(str(error), BAD_INPUT, debug)
    except Exception as error:  # the last resort: name it, never hide it
        if isinstance(error, OSError) and error.errno == errno.EBADF and not error.filename:
            raise  # stdout is closed
        return _unexpected(error, debug)


def _unexpected(error: Exception, debug: bool) -> int:
    mended = _mendable(error)
    if mended is not None:
        return _error(str(mended), BAD_INPUT, debug)
    from wsae.core.errors import is_out_of_memory

    if is_out_of_memory(error):
        return _error(
            "out of memory; lower --batch-size or --d-sae (`wsae doctor` estimates the need)",
            BAD_INPUT,
            debug,
        )
    text = " ".join(str(error).split()) or "no message"
    hint = "" if debug else "; run again with --debug for the traceback"
    return _error(f"unexpected {type(error).__name__}: {text}{hint}", BROKEN, debug)


def _mendable(error: Exception) -> UserError | None:
    """Return what the user can do about a missing extra or the operating system's refusal, or None."""
    if isinstance(error, ModuleNotFoundError):
        name = (error.name or "").split(".")[0]
        extra = EXTRAS.get(name)
        mend = f"{name} is not installed; pip install 'wsae[{extra}]'"
        return None if extra is None else UserError(mend)
    if not isinstance(error, OSError):
        return None
    if not error.filename:  # stdout, or a library that does not say which file
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return UserError("the disk is full; free some space and run it again") if full else None
    from pathlib import Path

    from wsae.core.files import as_user_error

    path = Path(str(error.filename))
    if isinstance(error, FileNotFoundError):
        return UserError(f"{path}: no such file or directory")
    if error.errno == errno.ENAMETOOLONG:
        return UserError(f"{str(path)[:60]}...: a longer name than this system has; shorten it")
    mended = as_user_error(error, path)
    return mended if isinstance(mended, UserError) else None


def _error(message: str, code: int = BAD_INPUT, debug: bool = False, kind: str = "error: ") -> int:
    if debug:
        import traceback

        sys.stderr.write(traceback.format_exc())
    one_line = printable(" ".join(message.split()))
    sys.stderr.write(f"wsae: {kind}{one_line}\n")
    return code


def _open_streams() -> None:
    """Make stdin, stdout and stderr something that can be used, whatever the shell has closed (`>&-`).

    Else the first files opened would be taken for them. What is written to a closed stdout fails at the end, to a
    closed stderr it is lost. A character that the terminal's encoding lacks, or half of one in a file's name, is
    spelled out.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_WRONLY if number == 2 else os.O_RDONLY)  # the lowest free
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w", encoding="utf-8", closefd=False))
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _silence() -> None:
    """Point stdout, and stderr where nobody reads it, at nothing, so that the interpreter's last flush cannot fail."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
