"""Activations of a vision model on images to a store: the text's format, image numbers and classes beside the rows."""

import base64
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from torch import Tensor

from wsae.acts.capture import Capture
from wsae.acts.config import ImageHarvestConfig, located
from wsae.acts.flow import ONE_PASS, NonFiniteError, Step, Tally, running
from wsae.acts.hookpoints import probe
from wsae.acts.images.model import VisionModel, load_vision, model_fingerprint
from wsae.acts.images.pixels import NAMED, Failures, ImageError, ImageSet, batches
from wsae.acts.images.sets import open_images
from wsae.acts.store import (
    IMAGES,
    SPLITS,
    Feed,
    Ledger,
    ShardForm,
    Store,
    lacking,
    load_columns,
    outlier_dims,
    shard_name,
    write_store,
    written,
)
from wsae.acts.text import Position
from wsae.core.artifact import MANIFEST
from wsae.core.errors import UserError
from wsae.core.progress import Progress, quiet
from wsae.core.seeds import Permutation, seed_for
from wsae.core.tensors import save_tensors

SIDE = 56
"""Longest side of a thumbnail in pixels; smaller images stay as they are."""


class Gallery:
    """Classes and thumbnails of a set's images, by number."""

    def __init__(self, images: ImageSet, labels: Int[np.ndarray, " images"] | None = None) -> None:
        self._images = images
        self._labels = images.labels if labels is None else labels

    def label(self, image: int) -> str:
        """Return the name of an image's class, or its number where it has none."""
        if self._labels is None:
            return f"image {image}"
        number, names = int(self._labels[image]), self._images.names
        return names[number] if number < len(names) else f"class {number}"

    def thumbnail(self, image: int) -> str:
        """Return an image as PNG in base64, its longest side at most `SIDE` pixels; raises ImageError if unreadable."""
        pixels = self._images.image(image).permute(1, 2, 0).contiguous().numpy()
        picture = Image.fromarray(pixels)
        picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        if not np.ptp(pixels, axis=2).any():
            picture = picture.convert("L")  # a third of the bytes
        out = io.BytesIO()
        picture.save(out, "PNG", optimize=True)
        return base64.b64encode(out.getvalue()).decode("ascii")


def heldout_images(n: int, fraction: float, seed: int) -> Bool[np.ndarray, " images"]:
    """Return for each image whether it is held out: a hash of seed and image number, whatever else there is."""
    limit = fraction * 2.0**63
    return np.array([seed_for(seed, "heldout image", i) < limit for i in range(n)], dtype=bool)


def used_images(n: int, limit: int | None, seed: int) -> Int[np.ndarray, " used"]:
    """Return the numbers of the images used, ascending: all, or a random choice under a limit."""
    if limit is None or limit >= n:
        return np.arange(n)
    return np.sort(Permutation(n, seed_for(seed, "limit"))(np.arange(limit)))


class ImageFlow:
    """A model, its hook points, and the images of each half in the order of their numbers.

    `labels` [images] int64 or none, `positions` rows an image, `order` {split: image numbers}.
    """

    def __init__(self, cfg: ImageHarvestConfig, vision: VisionModel, images: ImageSet) -> None:
        self.cfg, self.vision, self.images = cfg, vision, images
        self.side = cfg.images.size or vision.size
        self.labels = None if images.labels is None else torch.from_numpy(images.labels)
        self.n_classes = len(images.names) if images.labels is not None else 0
        used = used_images(len(images), cfg.limit, cfg.seed)
        held = heldout_images(len(images), cfg.heldout_fraction, cfg.seed)[used]
        self.order = {"train": used[~held], "heldout": used[held]}
        modality = vision.modality(self.side, self.side)
        with ONE_PASS:
            hooks = probe(vision.model, cfg.hooks, modality).hooks
        self._capture = Capture(vision.model, hooks)
        self.hooks, self.positions = self._capture.hooks, hooks[0].positions
        for hook in hooks:
            if hook.positions != self.positions:
                raise UserError(
                    f"hooks {hooks[0].name!r} and {hook.name!r} have {self.positions} and {hook.positions} rows an "
                    "image; harvest them to two stores"
                )

    def steps(self, heldout: bool, start: Position) -> Iterator[Step]:
        """Yield steps from the `start.document`-th image of a half on; raises NonFiniteError at a NaN or infinity.

        Unreadable images are left out, or raise ImageError, as the config says.
        """
        order, cfg = self.order["heldout" if heldout else "train"], self.cfg
        done, failures = start.document, Failures(cfg.images.on_error)
        read = batches(self.images, order[done:], cfg.batch_size, cfg.images.workers, failures)
        for index, squares in read:
            done = min(done + cfg.batch_size, len(order))
            if len(index):
                yield self._step(index, squares, Position(done, 0, done))

    def _step(
        self,
        index: Int[np.ndarray, " batch"],
        squares: UInt8[Tensor, "batch 3 height width"],
        after: Position,
    ) -> Step:
        rows = self.cfg.batch_size * self.positions
        with running(self.hooks, rows, "--batch-size"):
            acts = self._capture.read({"pixel_values": self.vision.prepare(squares)})
            flat = {hook: x.flatten(0, 1).float().cpu() for hook, x in acts.items()}
        image = torch.from_numpy(index.astype(np.int64))
        self._check_finite(flat, image)
        n, none = len(index), torch.empty(0, dtype=torch.int32)
        return Step(
            x=flat,
            skipped={},
            seq=image.repeat_interleave(self.positions),
            pos=torch.arange(self.positions).repeat(n),
            ids=none.expand(n, 0),
            lengths=torch.zeros(n, dtype=torch.int32),
            counts={"kept": n * self.positions},
            after=after,
            labels=None
            if self.labels is None
            else self.labels[image].repeat_interleave(self.positions),
        )

    def _check_finite(
        self, acts: dict[str, Float[Tensor, "rows _"]], image: Int[Tensor, " batch"]
    ) -> None:
        for hook, x in acts.items():
            if not bool(torch.isfinite(x.sum())) and not bool(torch.isfinite(x).all()):
                row, dim = (int(i) for i in (~torch.isfinite(x)).nonzero()[0])
                number, pos = divmod(row, self.positions)
                place = f"image {int(image[number])}, position {pos}, dimension {dim}"
                raise NonFiniteError(hook, place, row)


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
    out = Path(out)
    # what decides the rows: neither the number of workers nor how the place of a file is written
    plain = cfg.images.model_copy(update={"workers": 0, "path": located(cfg.images.path)})
    config = cfg.model_copy(update={"images": plain, "model": located(cfg.model)}).to_dict()
    found = None
    if not (out / MANIFEST).exists():
        found = vision or load_vision(cfg.model, cfg.dtype, cfg.device)
    images = open_images(cfg.images if found is None else found.images(cfg.images))
    inputs = {"model": model_fingerprint(cfg.model), "images": images.digest()}

    def feed(_: Ledger) -> Feed:
        assert found is not None
        flow = ImageFlow(cfg, found, images)
        wanted = {split: len(flow.order[split]) * flow.positions for split in ("heldout", "train")}
        if not wanted["train"]:
            raise UserError(
                f"images {cfg.images.path}: {len(flow.order['heldout'])} images, all held out, leave none to train on; "
                "give more images or lower heldout_fraction"
            )
        return Feed(
            flow.hooks,
            flow.steps,
            ShardForm(cfg.store_dtype, cfg.shard_rows, seq_len=None),
            wanted,
            "rows",
            f"images {cfg.images.path}: none of the {{split}} images can be read",
            threaded=cfg.device != "cpu",
            rest=lambda ledger, tally: _rest(flow, out, ledger, tally),
            n_classes=flow.n_classes,
        )

    return write_store(out, config, inputs, feed, progress)


def _rest(
    flow: ImageFlow, out: Path, ledger: Ledger, tally: Tally
) -> tuple[list[str], dict[str, object]]:
    """Write which images have rows and which could not be read, and return what the manifest says."""
    files, read, unread = [f"{split}/{IMAGES}" for split in SPLITS], {}, {}
    for split, name in zip(SPLITS, files, strict=True):
        shards = range(len(ledger.splits[split].shard_rows))
        paths = (out / shard_name(split, next(iter(flow.hooks)), number) for number in shards)
        seen = [load_columns(path, ("seq",))["seq"].unique().long() for path in paths]
        found = torch.cat([torch.empty(0, dtype=torch.long), *seen]).unique()
        missing = torch.from_numpy(np.setdiff1d(flow.order[split], found.numpy()))
        tensors = {"images": found, "skipped": missing}
        if flow.labels is not None:
            tensors["labels"] = flow.labels[found]
        save_tensors(out / name, tensors)
        read[split], unread[split] = len(found), missing
    reasons = []
    for index in torch.cat(list(unread.values()))[:NAMED].tolist():
        try:
            flow.images.square(index)
        except ImageError as error:
            reasons.append(str(error))
    return files, {
        "kind": "images",
        "hooks": flow.hooks,
        "model": flow.vision.name,
        "size": flow.side,
        "positions": flow.positions,
        "labelled": flow.labels is not None,
        "classes": list(flow.images.names),
        **written(ledger, flow.cfg.store_dtype),
        "outlier_dims": outlier_dims(tally),
        **lacking(flow.vision.not_loaded),
        "images": read,
        "skipped": {split: {"unreadable": len(missing)} for split, missing in unread.items()},
        "unreadable": reasons,
    }


def store_images(store: Store) -> ImageSet:
    """Open the images that a store was made of, in their own size; raises UserError where they have changed."""
    cfg = ImageHarvestConfig.parse(store.manifest.config, where=str(store.path))
    images = open_images(cfg.images)
    if images.digest() != store.manifest.inputs["images"]:
        raise UserError(f"images {cfg.images.path}: not those that {store.path} was made from")
    return images
