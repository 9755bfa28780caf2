"""`wsae completion`: a script that makes a shell complete commands, flags, choices and files."""

from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from wsae.cli import shells
from wsae.cli.flags import Common, CommonFlags, MaybePlace
from wsae.cli.ui import UI
from wsae.core.config import Config
from wsae.core.files import write_text

ABOUT = """\
Print a script that makes bash, zsh or fish complete the words of wsae. It is plain text:
completing starts no Python."""

PLACES = {
    "bash": "~/.local/share/bash-completion/completions/wsae",
    "zsh": "a directory of $fpath, as _wsae",
    "fish": "~/.config/fish/completions/wsae.fish",
}


class Flags(Config):
    """Flags of `wsae completion`."""

    shell: Annotated[
        Literal["bash", "zsh", "fish"], tyro.conf.Positional, tyro.conf.arg(metavar="SHELL")
    ]
    """bash, zsh or fish."""
    out: MaybePlace = None
    """Write the script there; none means to stdout."""
    common: CommonFlags = Common()
    """Flags of every command."""


def run(flags: Flags, ui: UI) -> dict[str, Any]:
    """Return the shell and its script, written to --out where that is given."""
    script = shells.script(flags.shell)
    if flags.out is not None:
        write_text(Path(flags.out), script)
        ui.note(f"{flags.shell} reads it from {PLACES[flags.shell]}")
    out = None if flags.out is None else str(flags.out)
    return {"shell": flags.shell, "out": out, "script": script}


def show(result: dict[str, Any], ui: UI) -> None:
    """Print the script, or where it is."""
    ui.say(result["script"].rstrip("\n") if result["out"] is None else f"script: {result['out']}")
