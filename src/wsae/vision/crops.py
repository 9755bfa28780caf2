"""Random crops of image files, cut by worker processes from the whole image, before anything is resized."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from kornia.augmentation.random_generator import ResizedCropGenerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from wsae.acts.images.pixels import ImageError
from wsae.core.seeds import seed_for
from wsae.vision.augment import RATIO
from wsae.vision.config import PretrainConfig
from wsae.vision.data import Data


class Crops(NamedTuple):
    """A step's images and two crops of each: all first ones, then all second ones."""

    numbers: Int64[np.ndarray, " batch"]
    crops: UInt8[Tensor, "views 3 size size"]
    failed: list[tuple[int, str]]


def crops_from(cfg: PretrainConfig, data: Data, part: slice, first: int) -> Iterator[Crops]:
    """Yield this process's part of every step from `first` on; the result does not depend on the number of workers."""
    reader = _Reader(cfg, data, part)
    steps = range(first, cfg.epochs * (len(data.train) // cfg.batch_size))
    if not data.workers:
        yield from (reader[step] for step in steps)
        return
    yield from DataLoader(
        reader,
        batch_size=None,
        sampler=steps,
        num_workers=data.workers,
        collate_fn=_as_it_is,
        generator=torch.Generator().manual_seed(0),  # the loader draws a seed nobody uses
    )


def _as_it_is(crops: Any) -> Any:
    """Return an item unchanged: by default the loader makes tensors of arrays."""
    return crops


class _Reader(Dataset[Crops]):
    def __init__(self, cfg: PretrainConfig, data: Data, part: slice) -> None:
        self._cfg, self._data, self._part = cfg, data, part
        self._boxes = ResizedCropGenerator(
            (cfg.size, cfg.size), torch.tensor(cfg.augment.crop), torch.tensor(RATIO)
        )

    def __getitem__(self, step: int) -> Crops:
        cfg = self._cfg
        index = self._data.batch(step, cfg.batch_size, cfg.seed)[self._part]
        found: list[Tensor | None] = []
        failed: list[tuple[int, str]] = []
        for number in index:
            try:
                found.append(self._views(int(number), step))
            except ImageError as error:
                found.append(None)
                failed.append((error.index, str(error)))
        good = [place for place, views in enumerate(found) if views is not None]
        if not good:
            raise ImageError(
                f"none of the {len(index)} images of a step can be read; {failed[0][1]}",
                failed[0][0],
            )
        # an unreadable image gives its place to one before it, so that all processes have equal parts
        places = [
            max((p for p in good if p <= place), default=good[0]) for place in range(len(index))
        ]
        views = [views for p in places if (views := found[p]) is not None]
        return Crops(index[places], torch.stack(views, dim=1).flatten(0, 1), failed)

    def _views(self, number: int, step: int) -> UInt8[Tensor, "2 3 size size"]:
        image, size = self._data.images.image(number), self._cfg.size
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_for(self._cfg.seed, "crop", step, number))
            boxes = self._boxes((2, *image.shape))["src"].round().long()
        views = []
        for box in boxes:
            (left, top), (right, bottom) = box[0].tolist(), box[2].tolist()
            cut = image[None, :, top : bottom + 1, left : right + 1]
            views.append(
                nn.functional.interpolate(cut, (size, size), mode="bilinear", antialias=True)
            )
        return torch.cat(views)
