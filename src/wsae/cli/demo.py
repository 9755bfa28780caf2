"""`wsae demo`: the main job from end to end."""

from pathlib import Path
from typing import Annotated, Any

import tyro

from wsae.cli.common import (
    UI,
    Common,
    CommonFlags,
    MaybeName,
    Name,
    Place,
    config_flags,
    config_values,
    device,
)
from wsae.cli.evaluate import show_classes, show_differences, show_scores
from wsae.core.errors import UserError
from wsae.studies.demo_config import DemoConfig

ABOUT = """\
Read a text with a language model, train WSAEs and their plain twin on one layer's activations,
measure all of them on held-out text and write a report. Without flags: SmolLM2-135M and the
public-domain text of this package, no network; it says first what it will do and how long it takes.
With --vision: handwritten digits and a small ResNet-18, pretrained first; two minutes."""
TEXT = DemoConfig().text


class Flags(config_flags(DemoConfig, omit=("text",))):
    """Flags of `wsae demo`."""

    out: Place = Path("demo-out")
    """Directory of everything the demo makes."""
    vision: bool = False
    """Images in place of text: scikit-learn's digits; of the other flags only --out, --seed, --device and --json."""
    text: Annotated[str, tyro.conf.arg(metavar="FILE")] = TEXT.path
    """A .txt, .jsonl, .jsonl.gz or .parquet file, a directory of these, a hub dataset's name, or "builtin"."""
    field: Name = TEXT.field
    """Key or column that holds the text."""
    split: MaybeName = None
    """Split of a hub dataset; default: train."""
    subset: MaybeName = None
    """Configuration of a hub dataset that has several."""
    common: CommonFlags = Common()


def config(flags: Flags, device: str) -> DemoConfig:
    """Return the demo these flags describe; raises UserError in one line."""
    data = config_values(flags, DemoConfig) | {
        "text": {"path": flags.text, **flags.model_dump(include={"field", "split", "subset"})},
        "seed": flags.common.seed,
        "device": device,
    }
    return DemoConfig.parse(data, where="flags")


def run(flags: Flags, ui: UI) -> dict[str, Any]:
    """Run the demo and return the evaluation with the paths of run and report."""
    if flags.vision:
        for name, field in Flags.model_fields.items():
            if name not in ("out", "vision", "common") and getattr(flags, name) != field.default:
                raise UserError(
                    f"--{name.replace('_', '-')}: is for the demo on text, not for --vision"
                )
        from wsae.studies.demo import run_vision_demo

        where, seed = device(flags.common.device), flags.common.seed
        return run_vision_demo(flags.out, seed, where, ui.progress, ui.note)
    config(flags, "cpu")  # bad flags are refused before anything is loaded
    from wsae.studies.demo import run_demo

    return run_demo(config(flags, device(flags.common.device)), flags.out, ui.progress, ui.note)


def show(result: dict[str, Any], ui: UI) -> None:
    """Print scores, paired differences and where the report lies."""
    show_scores(result, ui)
    for hook, found in result.get("classes", {}).get("hooks", {}).items():
        show_classes(hook, found, ui)
    for hook, found in result["hooks"].items():
        show_differences(hook, found["comparisons"], ui)
    ui.say(f"report: {result['report']} (opens in a browser, needs nothing else)")


def interrupted(flags: Flags, words: list[str], error: KeyboardInterrupt) -> str:  # noqa: ARG001
    """Return what is kept and how to go on."""
    done = f"{error}; " if str(error) else ""
    return f"{done}{flags.out} keeps the work so far; the same command goes on from there"
