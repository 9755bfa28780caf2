"""`wsae reproduce`: a figure or table of the paper, measured again."""

from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from wsae.cli.flags import Common, CommonFlags, Place
from wsae.cli.ui import UI
from wsae.core.config import Config

ABOUT = """\
Measure a figure of the paper again and print its statement beside what was found.
figure2, figure3: SAEs and WSAEs on toy models of superposition, many seeds (Section 5.1).
readings: Figure 3 under every reading of what the paper leaves open.
recovery: which methods and loss weights recover the truth, over several kinds of worlds.
What is finished in OUT is not run again."""

Name = Literal["figure2", "figure3", "readings", "recovery"]


class Flags(Config):
    """Flags of `wsae reproduce`."""

    name: Annotated[Name, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """figure2, figure3, readings or recovery."""
    preset: Literal["tiny", "small", "paper"] = "small"
    """Size: tiny (seconds), small (a minute), paper (the paper's setting, minutes)."""
    out: Place = Path("reproduce-out")
    """Directory of the results; figure2 and figure3 share their training there."""
    common: CommonFlags = Common()
    """Flags of every command."""


def run(flags: Flags, ui: UI) -> dict[str, Any]:
    """Run the reproduction and return its panels or rows."""
    from wsae.cli.runner import device
    from wsae.experiments.reproduce import Setting, reproduce

    where = "cpu" if flags.common.device == "auto" else device(flags.common.device)
    place = flags.out / flags.preset
    setting = Setting(flags.preset, place, flags.common.seed, where, ui.progress, ui.note)
    return reproduce(flags.name, setting)


def show(result: dict[str, Any], ui: UI) -> None:
    """Print the paper's statement beside ours, then where the files are."""
    if "panels" in result:
        header = ["panel", "score", "the paper", "ours", "verdict"]
        rows = [
            [p[key] for key in ("panel", "score", "paper", "ours", "verdict")]
            for p in result["panels"]
        ]
        ui.table(result["name"], header, rows)
    for title, table in result.get("tables", {}).items():
        ui.table(title, table["header"], table["rows"])
    for reading in result.get("readings", []):
        ui.say(f"{reading['label']}: {_reading(reading)}")
    ui.say("files: " + ", ".join(result["files"]))


def interrupted(flags: Flags, words: list[str], error: KeyboardInterrupt) -> str:  # noqa: ARG001
    """Say what is kept."""
    return f"{flags.out} keeps the finished parts; the same command goes on from there"


def _reading(reading: dict[str, Any]) -> str:
    panels = ("3a raw", "3b raw", "3c", "3d")
    return ", ".join(
        f"{panel} {reading[panel]:+.1%} (scale alone {reading[f'{panel}, scale alone']:+.1%})"
        for panel in panels
    )
