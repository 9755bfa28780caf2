"""Activations of a vision model on images to a store: the text's format, image numbers and classes beside the rows."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wsae.acts.images.config import ImageHarvestConfig
from wsae.acts.images.flow import ImageFlow
from wsae.acts.images.model import VisionModel, load_vision, model_fingerprint
from wsae.acts.images.sets import ImageError, ImageSet, open_images
from wsae.acts.ledger import Ledger, drop_ledger, refuse_other
from wsae.acts.shards import Form, shard_name
from wsae.acts.store import IMAGES, SPLITS, Store, load_columns
from wsae.acts.tally import Tally
from wsae.acts.writing import Feed, SplitWriter, finish, lacking, outlier_dims, unfinished
from wsae.core.artifact import MANIFEST, read_manifest
from wsae.core.errors import UserError
from wsae.core.progress import Progress, quiet
from wsae.core.tensors import load_tensors, save_tensors

NAMED = 5


def harvest_images(
    cfg: ImageHarvestConfig,
    out: Path | str,
    progress: Progress = quiet,
    vision: VisionModel | None = None,
) -> Store:
    """Write (or finish, or just open) the store of `cfg` at `out`.

    The same command on a killed harvest continues after its last whole shard and ends with the same bytes. `vision`
    saves loading the model that `cfg` names a second time. Raises UserError for images or a model that are not there,
    a hook the model lacks, hooks with different numbers of rows an image, images none of which can be read (or any,
    with on_error "raise"), NaN or infinite activations, a full disk, or a directory that belongs to another config.
    """
    out, config = Path(out), _recorded(cfg)
    if (out / MANIFEST).exists():
        manifest = read_manifest(out, "store", verify=False)
        inputs = _inputs(cfg, open_images(cfg.images))
        refuse_other(out, manifest.config, config, manifest.inputs, inputs)
        drop_ledger(out)
        return Store(out, verify=False)
    vision = vision or load_vision(cfg.model, cfg.dtype, cfg.device)
    images = open_images(vision.images(cfg.images))
    flow = ImageFlow(cfg, vision, images)
    with unfinished(out, config, _inputs(cfg, images)) as ledger:
        _run(flow, out, ledger, progress)
    return Store(out, verify=False)


def _recorded(cfg: ImageHarvestConfig) -> dict[str, object]:
    """Return what decides the rows: neither the number of workers nor how the place of a file is written."""
    place = Path(cfg.images.path)
    path = str(place.resolve()) if place.exists() else cfg.images.path
    plain = cfg.images.model_copy(update={"workers": 0, "path": path})
    return cfg.model_copy(update={"images": plain}).to_dict()


def _inputs(cfg: ImageHarvestConfig, images: ImageSet) -> dict[str, str]:
    return {"model": model_fingerprint(cfg.model), "images": images.digest()}


def _run(flow: ImageFlow, out: Path, ledger: Ledger, progress: Progress) -> None:
    cfg = flow.cfg
    tally = ledger.tally(out, flow.hooks, flow.n_classes)
    form = Form(cfg.store_dtype, cfg.shard_rows, seq_len=None)
    nothing = f"images {cfg.images.path}: none of the {{split}} images can be read"
    feed = Feed(flow.hooks, flow.steps, form, nothing, threaded=cfg.device != "cpu")
    wanted = {split: len(flow.order[split]) * flow.positions for split in ("heldout", "train")}
    if not wanted["train"]:
        raise UserError(
            f"images {cfg.images.path}: {len(flow.order['heldout'])} images, all held out, leave none to train on; "
            "give more images or lower heldout_fraction"
        )
    done = sum(state.rows for state in ledger.splits.values())
    with progress("harvest", sum(wanted.values()), "rows", done) as tick:
        for split, rows in wanted.items():
            ledger = SplitWriter(feed, out, ledger, split, tally).run(rows, tick)
    _finish(flow, out, ledger, tally)


def _finish(flow: ImageFlow, out: Path, ledger: Ledger, tally: Tally) -> None:
    files, read, unread = [f"{split}/{IMAGES}" for split in SPLITS], {}, {}
    for split, name in zip(SPLITS, files, strict=True):
        found = _seen(out, split, len(ledger.splits[split].shard_rows), next(iter(flow.hooks)))
        missing = np.setdiff1d(flow.order[split], found)
        tensors = {"images": torch.from_numpy(found), "skipped": torch.from_numpy(missing)}
        if flow.labels is not None:
            tensors["labels"] = flow.labels[tensors["images"]]
        save_tensors(out / name, tensors)
        read[split], unread[split] = len(found), missing
    save = _info(flow, ledger, tally) | {
        "images": read,
        "skipped": {split: {"unreadable": len(missing)} for split, missing in unread.items()},
        "unreadable": list(_reasons(flow.images, np.concatenate(list(unread.values())))),
    }
    finish(out, ledger, tally, files, save)


def _seen(out: Path, split: str, shards: int, hook: str) -> np.ndarray:
    """Return the numbers of the images that have rows, ascending."""
    parts = [
        load_columns(out / shard_name(split, hook, number), ("seq",))["seq"].unique()
        for number in range(shards)
    ]
    return (
        torch.cat([torch.empty(0, dtype=torch.long), *(p.long() for p in parts)]).unique().numpy()
    )


def _reasons(images: ImageSet, skipped: np.ndarray) -> Iterator[str]:
    """Yield why the first few images cannot be read."""
    for index in skipped[:NAMED]:
        try:
            images.square(int(index))
        except ImageError as error:
            yield str(error)


def _info(flow: ImageFlow, ledger: Ledger, tally: Tally) -> dict[str, object]:
    train, heldout = ledger.splits["train"], ledger.splits["heldout"]
    return {
        "kind": "images",
        "hooks": flow.hooks,
        "model": flow.vision.name,
        "size": flow.side,
        "positions": flow.positions,
        "labelled": flow.labels is not None,
        "classes": list(flow.images.names),
        "store_dtype": flow.cfg.store_dtype,
        "rows": {"train": train.rows, "heldout": heldout.rows},
        "shard_rows": {"train": list(train.shard_rows), "heldout": list(heldout.shard_rows)},
        "outlier_dims": {hook: outlier_dims(tally, hook) for hook in flow.hooks},
        **lacking(flow.vision.not_loaded),
    }


def store_images(store: Store) -> ImageSet:
    """Open the images that a store was made of, in their own size; raises UserError where they have changed."""
    cfg = ImageHarvestConfig.parse(store.manifest.config, where=str(store.path))
    images = open_images(cfg.images)
    if images.digest() != store.manifest.inputs["images"]:
        raise UserError(f"images {cfg.images.path}: not those that {store.path} was made from")
    return images


def image_numbers(store: Store, split: str) -> dict[str, Tensor]:
    """Return the images of a split: `images` read and `skipped` (int64), and `labels` of those read where known."""
    return load_tensors(store.path / split / IMAGES)
