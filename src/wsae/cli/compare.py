"""`wsae compare`: paired differences with intervals."""

from pathlib import Path
from typing import Annotated, Any

import tyro

from wsae.cli.evaluate import show_matching
from wsae.cli.flags import Common, CommonFlags, Count, MaybePlace, Number
from wsae.cli.ui import UI
from wsae.core.config import FLAGS, Config
from wsae.core.files import write_json
from wsae.evals.config import EvalConfig

ABOUT = """\
Compare the SAEs of one run with their plain twin, or those of several runs with their namesakes in
the first, on the same held-out sequences or matched latents: difference, interval, effect size."""
DEFAULTS = EvalConfig()


class Flags(Config):
    """Flags of `wsae compare`."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Runs that `wsae evaluate` has measured."""
    out: MaybePlace = None
    """Write the result as JSON here too."""
    draws: Count = DEFAULTS.draws
    """Bootstrap resamples behind each interval."""
    confidence: Number = DEFAULTS.confidence
    """Coverage of the intervals."""
    common: CommonFlags = Common()
    """Flags of every command."""


def run(flags: Flags, ui: UI) -> dict[str, Any]:  # noqa: ARG001  (every command takes the terminal)
    """Compare and return the comparisons of each hook."""
    from wsae.evals.compare import compare

    data = {"draws": flags.draws, "confidence": flags.confidence, "seed": flags.common.seed}
    result = compare(list(flags.runs), EvalConfig.parse(data, where=FLAGS))
    if flags.out is not None:
        write_json(flags.out, result)
    return dict(result)


def show(result: dict[str, Any], ui: UI) -> None:
    """Print each hook's differences."""
    for hook, lines in result["hooks"].items():
        show_differences(hook, lines, ui)
        show_matching(result["matching"].get(hook, {}), ui)


def show_differences(hook: str, lines: list[dict[str, Any]], ui: UI) -> None:
    """Print differences with their intervals; where an interval leaves out 0 there is a star."""
    columns = ("a", "b", "metric", "a - b", "interval", "effect", "paired by")
    ui.table(
        f"{hook}: paired differences (*: the interval leaves out 0)", columns, map(_row, lines)
    )


def _row(line: dict[str, Any]) -> list[str]:
    low, high = line["low"], line["high"]
    sure = low is not None and (low > 0 or high < 0)
    return [
        line["a"],
        line["b"],
        line["metric"],
        _signed(line["difference"], ".3g") + (" *" if sure else ""),
        "-" if low is None else f"[{low:+.3g}, {high:+.3g}]",
        _signed(line.get("effect_size"), ".2f"),
        f"{line['n']:,} {line['unit']}s",
    ]


def _signed(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:+{form}}"
