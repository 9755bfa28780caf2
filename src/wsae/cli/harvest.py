"""`wsae harvest`: activations to a store."""

import shlex
from typing import Annotated, Any, Literal

import tyro

from wsae.cli.flags import Common, CommonFlags, Count, Place
from wsae.cli.live import DEFAULTS, LiveFlags, Precision
from wsae.cli.ui import UI
from wsae.core.config import Config

ABOUT = "Run a text through a model once and keep the activations of the named modules on disk."


class Flags(Config):
    """Flags of `wsae harvest`."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Hub id, local directory, .gguf file, or "builtin" (SmolLM2-135M)."""
    out: Place
    """Directory of the store."""
    tokens: Count = DEFAULTS.tokens
    """Training rows wanted."""
    dtype: Precision = DEFAULTS.dtype
    """Precision the model runs in."""
    store_dtype: Literal["float32", "bfloat16", "float16"] = DEFAULTS.store_dtype
    """Precision on disk; float32 loses nothing."""
    shard_tokens: Count = DEFAULTS.shard_tokens
    """Rows per shard; a killed harvest loses at most one shard."""
    live: tyro.conf.OmitArgPrefixes[LiveFlags] = LiveFlags()
    """The text and the rows to keep."""
    common: CommonFlags = Common()
    """Flags of every command."""


def run(flags: Flags, ui: UI) -> dict[str, Any]:
    """Harvest and return the store's path, rows and widths."""
    from wsae.acts.harvest import harvest
    from wsae.cli.runner import device

    own = ("tokens", "dtype", "store_dtype", "shard_tokens")
    cfg = flags.live.config(
        flags.model,
        seed=flags.common.seed,
        device=device(flags.common.device),
        **{name: getattr(flags, name) for name in own},
    )
    harvest(cfg, flags.out, ui.progress)
    return describe(flags)


def describe(flags: Flags) -> dict[str, Any]:
    """Return what the store holds, from its manifest."""
    from wsae.core.artifact import read_manifest

    manifest = read_manifest(flags.out, "store", verify=False)
    size = sum(record.bytes for record in manifest.files.values())
    return {"store": str(flags.out), "bytes": size, **manifest.info}


def show(result: dict[str, Any], ui: UI) -> None:
    """Print what lies on disk and what to do next."""
    from wsae.core.units import size

    rows, dropped = result["rows"], result["skipped"]["train"]
    widths = ", ".join(f"{hook} ({d_in})" for hook, d_in in result["hooks"].items())
    ui.say(f"store: {result['store']}, {size(result['bytes'])}, {result['store_dtype']}")
    ui.say(f"hooks (width): {widths}")
    ui.say(f"rows: {rows['train']:,} to train on, {rows['heldout']:,} held out")
    ui.say("left out: " + ", ".join(f"{n:,} {reason}" for reason, n in dropped.items()))
    if result["exhausted"] or result["heldout_exhausted"]:
        ui.say("the text ended before the rows that were wanted; more text gives more")
    ui.say(f"next: wsae train {shlex.quote(result['store'])} --out runs/first")


def interrupted(flags: Flags, words: list[str], error: KeyboardInterrupt) -> str:  # noqa: ARG001
    """Say what is kept and how to go on."""
    return f"{flags.out} keeps every whole shard; the same command goes on from there"
