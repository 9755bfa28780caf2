"""`wsae compare`: paired differences with intervals."""

from pathlib import Path
from typing import Annotated, Any

import tyro

from wsae.cli.evaluate import measured, show_differences, show_matching
from wsae.cli.flags import Common, CommonFlags, MaybePlace, config_flags, config_values
from wsae.cli.live import ReadingFlags
from wsae.cli.ui import UI
from wsae.core.config import FLAGS, Config
from wsae.core.files import write_json
from wsae.evals.config import EvalConfig

ABOUT = """\
Compare the SAEs of one run with their plain twin, or those of several runs with their namesakes in
the first, on the same held-out sequences or matched latents: difference, interval, effect size."""


class SureFlags(config_flags(EvalConfig, only=("draws", "confidence"))):
    """How sure the numbers are."""


class Flags(Config):
    """Flags of `wsae compare`."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Runs that `wsae evaluate` has measured; or SAEs alone: their folders, hub:owner/name, RELEASE:ID or
    whatever wsae import reads."""
    reading: tyro.conf.OmitArgPrefixes[ReadingFlags] = ReadingFlags()
    """A text on which SAEs alone are evaluated first."""
    out: MaybePlace = None
    """Write the result as JSON here too."""
    sure: tyro.conf.OmitArgPrefixes[SureFlags] = SureFlags()
    """How sure the numbers are."""
    common: CommonFlags = Common()
    """Flags of every command."""


def run(flags: Flags, ui: UI) -> dict[str, Any]:
    """Compare and return the comparisons of each hook."""
    from wsae.evals.compare import compare

    data = config_values(flags.sure, EvalConfig) | {"seed": flags.common.seed}
    asked = flags.reading.asked()
    runs = [measured(path, asked, flags.common, ui).path for path in flags.runs]
    result = compare(runs, EvalConfig.parse(data, where=FLAGS))
    if flags.out is not None:
        write_json(flags.out, result)
    return dict(result)


def show(result: dict[str, Any], ui: UI) -> None:
    """Print each hook's differences."""
    for hook, lines in result["hooks"].items():
        show_differences(hook, lines, ui)
        show_matching(result["matching"].get(hook, {}), ui)
    for kind, hooks in result["probing"].items():
        for hook, lines in hooks.items():
            show_differences(f"{hook}, probes of {kind}", lines, ui)
