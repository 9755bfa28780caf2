"""`wsae compare`: paired differences with intervals."""

from pathlib import Path
from typing import Annotated, Any

import tyro

from wsae.cli.common import (
    UI,
    Common,
    CommonFlags,
    JsonFile,
    MaybePlace,
    config_flags,
    config_values,
)
from wsae.cli.evaluate import interval, measured, show_differences, show_matching
from wsae.cli.live import ReadingFlags
from wsae.core.config import FLAGS, Config
from wsae.core.errors import UserError
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
    out: JsonFile = None
    """Write the result as JSON here too."""
    picture: MaybePlace = None
    """Of SAEs that differ in more than their weights (a grid): draw FVU, and cross-entropy recovered where the model
    was spliced, against L0 into PATH.png and PATH.svg."""
    sure: tyro.conf.OmitArgPrefixes[SureFlags] = SureFlags()
    common: CommonFlags = Common()


def run(flags: Flags, ui: UI) -> dict[str, Any]:
    """Compare and return the comparisons of each hook."""
    from wsae.evals.compare import compare

    data = config_values(flags.sure, EvalConfig) | {"seed": flags.common.seed}
    asked = flags.reading.asked()
    runs = [measured(path, asked, flags.common, ui).path for path in flags.runs]
    result = compare(runs, EvalConfig.parse(data, where=FLAGS))
    if flags.picture is not None:
        result["pictures"] = _drawn(result["fronts"], flags.picture)
    return dict(result)


_NAMES = {"fvu": "FVU", "ce_loss_recovered_zero": "cross-entropy recovered"}


def _drawn(fronts: dict[str, Any], path: Path) -> list[str]:
    """Draw every hook's metrics against L0; returns the pictures' paths."""
    from wsae.studies.drawing import scatter_figure

    if not fronts:
        raise UserError(
            f"--picture {path}: the SAEs differ in their weights alone; train a grid, as by --k 16 32 64"
        )
    panels = []
    for hook, found in fronts.items():
        for metric, points in found.items():
            front = [point for point in points if point["front"]]
            line = {"label": "front", **{axis: [p[key] for p in front] for axis, key in _AXES}}
            placed = [{**p, "x": p["l0"], "y": p["value"]} for p in points if p["l0"] > 0]
            axes = {"xlabel": "L0: active latents per row", "ylabel": _NAMES[metric], "log": True}
            panels.append({"title": hook, "points": placed, "lines": [line], **axes})
    return [str(written) for written in scatter_figure(panels, path, columns=2)]


_AXES = (("x", "l0"), ("y", "value"))


def show(result: dict[str, Any], ui: UI) -> None:
    """Print each hook's differences, and who is on the front of a grid."""
    for hook, found in result["fronts"].items():
        cells: dict[str, dict[str, str]] = {}
        for metric, points in found.items():
            for point in points:
                row = cells.setdefault(point["member"], {"l0": f"{point['l0']:.3g}"})
                row[metric] = interval(point) + (" *" if point["front"] else "")
        rows = [
            [name, *(row.get(key, "-") for key in ("l0", *found))] for name, row in cells.items()
        ]
        columns = ("member", "L0", *(_NAMES[metric] for metric in found))
        ui.table(f"{hook}: fit against L0 (*: on the front)", columns, rows)
    if "pictures" in result:
        ui.say(f"pictures: {', '.join(result['pictures'])}")
    for hook, lines in result["hooks"].items():
        if lines:
            show_differences(hook, lines, ui)
        elif hook not in result["fronts"]:
            ui.say(f"{hook}: one SAE, and nothing to compare it with; name a second run")
        show_matching(result["matching"].get(hook, {}), ui)
    for kind, hooks in result["probing"].items():
        for hook, lines in hooks.items():
            show_differences(f"{hook}, probes of {kind}", lines, ui)
