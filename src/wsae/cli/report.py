"""`wsae report`: one HTML file about a run."""

from pathlib import Path
from typing import Annotated, Any

import tyro

from wsae.cli.flags import Common, CommonFlags
from wsae.cli.ui import UI
from wsae.core.config import Config

ABOUT = (
    "Write one self-contained HTML file: results with intervals, figures and a browser of latents."
)


class Flags(Config):
    """Flags of `wsae report`."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run's directory, best after `wsae evaluate`."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """The file; default: RUN/report.html."""
    common: CommonFlags = Common()
    """Flags of every command."""


def run(flags: Flags, ui: UI) -> dict[str, Any]:  # noqa: ARG001  (every command takes the terminal)
    """Write the report and return its path and size."""
    from wsae.report.html import write_report

    path = write_report(flags.run, flags.out)
    return {"report": str(path), "bytes": path.stat().st_size}


def show(result: dict[str, Any], ui: UI) -> None:
    """Print where the report lies."""
    ui.say(f"report: {result['report']} (opens in a browser, needs nothing else)")
