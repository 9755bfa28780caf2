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
from wsae.acts.flow import NonFiniteError, Step, one_pass
from wsae.acts.hookpoints import HookPoint, probe
from wsae.acts.images.config import ImageHarvestConfig
from wsae.acts.images.model import VisionModel, load_vision, model_fingerprint
from wsae.acts.images.sets import NAMED, Failures, ImageError, ImageSet, batches, open_images
from wsae.acts.store import (
    IMAGES,
    SPLITS,
    Feed,
    Ledger,
    ShardForm,
    Store,
    drop_ledger,
    finish,
    lacking,
    load_columns,
    outlier_dims,
    refuse_other,
    shard_name,
    unfinished,
    write_halves,
)
from wsae.acts.tally import Tally
from wsae.acts.text import Position
from wsae.core.artifact import MANIFEST, read_manifest
from wsae.core.errors import UserError
from wsae.core.memory import Buffer, explained
from wsae.core.progress import Progress, quiet
from wsae.core.seeds import Permutation, seed_for
from wsae.core.tensors import save_tensors

# What a page shows of an image: its class and a thumbnail.

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


# Which images are kept for evaluation: one rule for pretraining, harvesting and every probe.


def heldout_images(n: int, fraction: float, seed: int) -> Bool[np.ndarray, " images"]:
    """Return for each image whether it is held out: a hash of seed and image number, whatever else there is."""
    limit = fraction * 2.0**63
    return np.array([seed_for(seed, "heldout image", i) < limit for i in range(n)], dtype=bool)


# Images through a vision model to rows, one forward pass at a time.


class ImageFlow:
    """A model, its hook points, and the images of each half in the order of their numbers.

    `labels` [images] int64 or none, `positions` rows an image, `order` {split: image numbers}.
    """

    def __init__(self, cfg: ImageHarvestConfig, vision: VisionModel, images: ImageSet) -> None:
        self.cfg, self.vision, self.images = cfg, vision, images
        self.side = cfg.images.size or vision.size
        self.labels = None if images.labels is None else torch.from_numpy(images.labels)
        self.n_classes = len(images.names) if images.labels is not None else 0
        self.order = _order(len(images), cfg)
        modality = vision.modality(self.side, self.side)
        with one_pass():
            hooks = probe(vision.model, cfg.hooks, modality).hooks
        self._capture = Capture(vision.model, hooks)
        self.hooks, self.positions = self._capture.hooks, _same_positions(hooks)

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
        with explained("running the model", self._buffers, "--batch-size"), one_pass():
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

    def _buffers(self) -> list[Buffer]:
        rows = self.cfg.batch_size * self.positions
        return [
            Buffer("activations of one pass", (rows, d_in), 4, "--batch-size")
            for d_in in set(self.hooks.values())
        ]


def _order(n: int, cfg: ImageHarvestConfig) -> dict[str, np.ndarray]:
    """Return each half's image numbers, ascending; under a limit a random choice of all images."""
    used = np.arange(n)
    if cfg.limit is not None and cfg.limit < n:
        used = np.sort(Permutation(n, seed_for(cfg.seed, "limit"))(np.arange(cfg.limit)))
    held = heldout_images(n, cfg.heldout_fraction, cfg.seed)[used]
    return {"train": used[~held], "heldout": used[held]}


def _same_positions(hooks: list[HookPoint]) -> int:
    rows = {hook.positions: hook.name for hook in hooks}
    if len(rows) > 1:
        (a, first), (b, second) = list(rows.items())[:2]
        raise UserError(
            f"hooks {first!r} and {second!r} have {a} and {b} rows an image; harvest them to two stores"
        )
    return hooks[0].positions


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
    form = ShardForm(cfg.store_dtype, cfg.shard_rows, seq_len=None)
    nothing = f"images {cfg.images.path}: none of the {{split}} images can be read"
    feed = Feed(flow.hooks, flow.steps, form, nothing, threaded=cfg.device != "cpu")
    wanted = {split: len(flow.order[split]) * flow.positions for split in ("heldout", "train")}
    if not wanted["train"]:
        raise UserError(
            f"images {cfg.images.path}: {len(flow.order['heldout'])} images, all held out, leave none to train on; "
            "give more images or lower heldout_fraction"
        )
    ledger = write_halves(feed, out, ledger, tally, wanted, "rows", progress)
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
