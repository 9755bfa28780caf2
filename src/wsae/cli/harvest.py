"""`wsae harvest`: activations to a store."""

import shlex
from typing import Annotated, Any

import tyro

from wsae.acts.config import HarvestConfig, ImageHarvestConfig
from wsae.cli.common import UI, Common, CommonFlags, Place, config_flags, config_values, device
from wsae.cli.live import ImageFlags, LiveFlags, refuse
from wsae.core.config import Config

ABOUT = "Run a text or images through a model once and keep the activations of the named modules on disk."


class StoreFlags(
    config_flags(HarvestConfig, only=("tokens", "dtype", "store_dtype", "shard_tokens"))
):
    """How many rows, and how they are stored."""


class Flags(Config):
    """Flags of `wsae harvest`."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Hub id, local directory, .gguf file, or "builtin" (SmolLM2-135M); with --images a vision model or a run of
    `wsae pretrain`."""
    out: Place
    """Directory of the store."""
    store: tyro.conf.OmitArgPrefixes[StoreFlags] = StoreFlags()
    live: tyro.conf.OmitArgPrefixes[LiveFlags] = LiveFlags()
    """The text and the rows to keep."""
    vision: tyro.conf.OmitArgPrefixes[ImageFlags] = ImageFlags()
    """Or images."""
    common: CommonFlags = Common()


def run(flags: Flags, ui: UI) -> dict[str, Any]:
    """Harvest and return the store's path, rows and widths."""
    rest = {"seed": flags.common.seed, "device": device(flags.common.device)}
    if flags.vision.images is not None:
        others = set(StoreFlags.model_fields) - {"tokens"}
        refuse(flags.store, "is for --text, not for --images; see --limit", others)
        rest |= config_values(flags.store, ImageHarvestConfig)
        images = flags.vision.config(flags.model, flags.live, **rest)
        from wsae.acts.images.harvest import harvest_images

        harvest_images(images, flags.out, ui.progress)
    else:
        refuse(flags.vision, "is for --images, which is not given")
        text = flags.live.config(flags.model, **config_values(flags.store, HarvestConfig), **rest)
        from wsae.acts.harvest import harvest

        harvest(text, flags.out, ui.progress)
    result = describe(flags)
    if "text" in result:
        from wsae.acts.text import told

        for line in told(result["text"]):
            ui.note(f"wsae: {line}")
    return result


def describe(flags: Flags) -> dict[str, Any]:
    """Return what the store holds, from its manifest."""
    from wsae.core.artifact import read_manifest

    manifest = read_manifest(flags.out, "store", verify=False)
    size = sum(record.bytes for record in manifest.files.values())
    return {"store": str(flags.out), "bytes": size, **manifest.info}


def show(result: dict[str, Any], ui: UI) -> None:
    """Print what lies on disk and what to do next."""
    from wsae.core.errors import size

    rows, dropped = result["rows"], result["skipped"]["train"]
    widths = ", ".join(f"{hook} ({d_in})" for hook, d_in in result["hooks"].items())
    ui.say(f"store: {result['store']}, {size(result['bytes'])}, {result['store_dtype']}")
    ui.say(f"hooks (width): {widths}")
    ui.say(f"rows: {rows['train']:,} to train on, {rows['heldout']:,} held out")
    for note in result.get("notes", ()):
        ui.say(f"note: {note}")
    ui.say("left out: " + ", ".join(f"{n:,} {reason}" for reason, n in dropped.items()))
    gamma = ""
    if result.get("kind") == "images":
        _show_images(result, ui)
        gamma = " --gamma consistency" if result["labelled"] else ""
    elif result["exhausted"] or result["heldout_exhausted"]:
        ui.say("the text ended before the rows that were wanted; more text gives more")
    ui.say(f"next: wsae train {shlex.quote(result['store'])}{gamma} --out runs/first")


def _show_images(result: dict[str, Any], ui: UI) -> None:
    """Print what images there were, and which could not be read."""
    read, classes = result["images"], len(result["classes"])
    each = f"{result['positions']} rows each" if result["positions"] > 1 else "a row each"
    of = f"{classes} classes" if result["labelled"] else "no labels"
    side = result["size"]
    ui.say(f"images: {read['train'] + read['heldout']:,} of {side} x {side} pixels, {each}, {of}")
    unread = sum(part["unreadable"] for part in result["skipped"].values())
    for message in result["unreadable"]:
        ui.say(f"unreadable: {message}")
    if unread > len(result["unreadable"]):
        ui.say(f"unreadable: {unread - len(result['unreadable']):,} more")


KEPT = "{flags.out} keeps every whole shard; the same command goes on from there"
