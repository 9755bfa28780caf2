"""`wsae pretrain`: an image encoder by contrastive learning, NCL or SimCLR."""

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from wsae.cli.common import (
    UI,
    Common,
    CommonFlags,
    LoggerFlags,
    MaybeCount,
    MaybeName,
    Place,
    Switch,
    device,
    mirrored,
)
from wsae.cli.runner import together
from wsae.core.config import Config
from wsae.core.errors import UserError
from wsae.core.progress import quiet
from wsae.train.parallel.config import launched

if TYPE_CHECKING:
    from wsae.vision.config import PretrainConfig

ABOUT = """\
Pretrain a ResNet-18 by contrastive learning: SimCLR, or NCL, which makes the projections non-negative.
Labels, where there are some, are used only to say what the embeddings know."""


class Flags(Config):
    """Flags of `wsae pretrain`."""

    images: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES")]
    """A folder of class folders, an .npz file (images, labels, names), a folder of IDX or Parquet files, a hub dataset,
    or "digits"."""
    out: Place
    """Directory of the run."""
    preset: Literal["imagenet100", "cifar", "small", "tiny"] = "small"
    """Sizes, augmentation and optimiser: imagenet100 and cifar are the NCL paper's, small is for 28x28 on two cores,
    tiny for the digits."""
    method: Literal["ncl", "simclr"] = "ncl"
    """ncl: projections made non-negative; simclr: left as they are."""
    epochs: MaybeCount = None
    """Passes over the images; default: the preset's."""
    batch_size: MaybeCount = None
    """Images per step; default: the preset's."""
    limit: MaybeCount = None
    """Images used at most; default: all."""
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None, tyro.conf.arg(help_behavior_hint="")
    ] = None
    """Precision of convolutions and products; default: the preset's."""
    split: MaybeName = None
    """Split of a hub dataset or IDX folder; default: "train"."""
    workers: MaybeCount = None
    """Processes that decode and crop image files; default: one per core. Images in memory need none."""
    resume: Switch = False
    """Continue an interrupted run in --out."""
    loggers: tyro.conf.OmitArgPrefixes[LoggerFlags] = LoggerFlags()
    common: CommonFlags = Common()


def run(flags: Flags, ui: UI) -> dict[str, Any]:
    """Pretrain and return the run's path and what its manifest says."""
    for module in ("transformers", "kornia", "PIL"):  # other extras bring some of them
        if find_spec(module) is None:
            raise UserError(f"{module} is not installed; pip install 'wsae[vision]'")
    cfg = config(flags)
    loggers = flags.loggers.made()
    from wsae.acts.images.sets import open_images
    from wsae.vision.pretrain import pretrain

    if launched():
        with together(flags.common, flags.out, ui) as world:
            progress = ui.progress if world.first else quiet
            images = open_images(cfg.images)
            with mirrored(loggers, ui, world.first):
                result = pretrain(cfg, images, flags.out, progress, flags.resume, world=world)
    else:
        where = device(flags.common.device)
        images = open_images(cfg.images)
        with mirrored(loggers, ui):
            result = pretrain(cfg, images, flags.out, ui.progress, flags.resume, where)
    return {"run": str(result.path), **result.info}


def config(flags: Flags) -> "PretrainConfig":
    """Return the run's config: the preset's, changed by the flags."""
    from wsae.vision.config import PRESETS, preset

    own = {"epochs", "batch_size", "limit", "dtype"}
    changes = flags.model_dump(include=own, exclude_none=True)
    workers = flags.workers if flags.workers is not None else os.cpu_count() or 1
    images = {
        "path": flags.images,
        "split": flags.split,
        "size": PRESETS[flags.preset].get("size", 32),
        "workers": workers,
    }
    return preset(
        flags.preset, images=images, method=flags.method, seed=flags.common.seed, **changes
    )


def show(result: dict[str, Any], ui: UI) -> None:
    """Print what the embeddings know and what to do next."""
    probes = result["probes"]
    if probes is None:
        ui.say(
            "no labels of two classes or more, or no held-out images: what the embeddings know was not measured"
        )
    else:
        rows = [
            [
                name,
                f"{100 * probes[key]['accuracy']:.2f} %",
                f"{probes[key]['train']:,}",
                f"{probes[key]['test']:,}",
            ]
            for name, key in (
                ("linear probe on embeddings", "linear"),
                ("the same on raw pixels", "raw_pixels"),
                ("20 nearest neighbours", "knn"),
            )
        ]
        ui.table("held-out accuracy", ("probe", "accuracy", "train", "test"), rows)
    bad = result["unreadable"]
    if bad["count"]:
        ui.say(f"{bad['count']:,} times an image was unreadable, first: {bad['first'][0]}")
    ui.say(f"loss: {result['loss']:.4g} after {result['steps']:,} steps")
    ui.say(f"run: {result['run']}")
