"""`wsae demo`: the main job from end to end."""

from pathlib import Path
from typing import Annotated, Any

import tyro

from wsae.cli.evaluate import show_classes, show_differences, show_scores
from wsae.cli.flags import Common, CommonFlags, Count, MaybeName, Name, Number, Place
from wsae.cli.live import Precision
from wsae.cli.ui import UI
from wsae.core.config import Config
from wsae.core.errors import UserError
from wsae.experiments.config import DemoConfig

ABOUT = """\
Read a text with a language model, train WSAEs and their plain twin on one layer's activations,
measure all of them on held-out text and write a report. Without flags: SmolLM2-135M and the
public-domain text of this package, no network; it says first what it will do and how long it takes.
With --vision: handwritten digits and a small ResNet-18, pretrained first; two minutes."""
DEFAULTS = DemoConfig()


class Flags(Config):
    """Flags of `wsae demo`."""

    out: Place = Path("demo-out")
    """Directory of everything the demo makes."""
    vision: bool = False
    """Images in place of text: scikit-learn's digits; of the other flags only --out, --seed, --device and --json."""
    model: Name = DEFAULTS.model
    """Hub id, local directory, .gguf file, or "builtin" (SmolLM2-135M)."""
    text: Annotated[str, tyro.conf.arg(metavar="FILE")] = DEFAULTS.text.path
    """A .txt, .jsonl, .jsonl.gz or .parquet file, a directory of these, a hub dataset's name, or "builtin"."""
    field: Name = DEFAULTS.text.field
    """Key or column that holds the text."""
    split: MaybeName = None
    """Split of a hub dataset; none means train."""
    subset: MaybeName = None
    """Configuration of a hub dataset that has several."""
    hook: Annotated[str, tyro.conf.arg(metavar="NAME")] = DEFAULTS.hook
    """The module to read."""
    tokens: Count = DEFAULTS.tokens
    """Training rows to harvest."""
    heldout_tokens: Count = DEFAULTS.heldout_tokens
    """Rows to measure on, from other documents."""
    passes: Count = DEFAULTS.passes
    """Passes over the training rows."""
    expansion: Count = DEFAULTS.expansion
    """Latents per input dimension."""
    k: Count = DEFAULTS.k
    """Active latents per token."""
    alpha: Annotated[tuple[float, ...], tyro.conf.arg(metavar="A ...")] = DEFAULTS.alpha
    """One WSAE for each exponent of the variance."""
    lr: Number = DEFAULTS.lr
    """Peak learning rate."""
    splice_tokens: Count = DEFAULTS.splice_tokens
    """Held-out tokens run through the model with reconstructions in place; 0 skips it."""
    n_latents: Count = DEFAULTS.n_latents
    """Latents per SAE shown in the report."""
    dtype: Precision = DEFAULTS.dtype
    """Precision of the model and of the dense encoder product."""
    common: CommonFlags = Common()
    """Flags of every command."""


def config(flags: Flags, device: str) -> DemoConfig:
    """Return the demo these flags describe; raises UserError in one line."""
    not_ours = {"out", "common", "text", "field", "split", "subset", "vision"}
    data = flags.model_dump(exclude=not_ours) | {
        "text": {"path": flags.text, **flags.model_dump(include={"field", "split", "subset"})},
        "seed": flags.common.seed,
        "device": device,
    }
    return DemoConfig.parse(data, where="flags")


def run(flags: Flags, ui: UI) -> dict[str, Any]:
    """Run the demo and return the evaluation with the paths of run and report."""
    if flags.vision:
        return run_vision(flags, ui)
    config(flags, "cpu")  # bad flags are refused before anything is loaded
    from wsae.cli.runner import device
    from wsae.experiments.demo import run_demo

    return run_demo(config(flags, device(flags.common.device)), flags.out, ui.progress, ui.note)


def run_vision(flags: Flags, ui: UI) -> dict[str, Any]:
    """Run the demo on images; raises UserError for a flag of the other one."""
    for name, field in Flags.model_fields.items():
        if name not in ("out", "vision", "common") and getattr(flags, name) != field.default:
            raise UserError(
                f"--{name.replace('_', '-')}: is for the demo on text, not for --vision"
            )
    from wsae.cli.runner import device
    from wsae.experiments.vision.demo import run_vision_demo

    where, seed = device(flags.common.device), flags.common.seed
    return run_vision_demo(flags.out, seed, where, ui.progress, ui.note)


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
