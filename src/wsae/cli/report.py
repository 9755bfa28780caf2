"""`wsae report`: one HTML file about a run."""

from pathlib import Path
from typing import Annotated, Any

import tyro

from wsae.cli.common import UI, Common, CommonFlags
from wsae.cli.evaluate import measured
from wsae.cli.live import ReadingFlags
from wsae.core.config import Config

ABOUT = (
    "Write one self-contained HTML file: results with intervals, figures and a browser of latents."
)


class Flags(Config):
    """Flags of `wsae report`."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run's directory, best after `wsae evaluate`; or one SAE: its folder, hub:owner/name, RELEASE:ID or
    whatever wsae import reads."""
    reading: tyro.conf.OmitArgPrefixes[ReadingFlags] = ReadingFlags()
    """A text on which one SAE alone is evaluated first."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """The file; default: RUN/report.html."""
    common: CommonFlags = Common()


def run(flags: Flags, ui: UI) -> dict[str, Any]:
    """Write the report and return its path and size."""
    from wsae.report.html import write_report

    opened = measured(flags.run, flags.reading.asked(), flags.common, ui)
    path = write_report(opened.path, flags.out)
    return {"report": str(path), "bytes": path.stat().st_size}


def show(result: dict[str, Any], ui: UI) -> None:
    """Print where the report lies."""
    ui.say(f"report: {result['report']} (opens in a browser, needs nothing else)")
