"""The images of a run: which are trained on, in what order, and what their pixels are like."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Int64, UInt8
from kornia import augmentation as kornia
from kornia.augmentation.random_generator import ResizedCropGenerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from wsae.acts.images.harvest import heldout_images, used_images
from wsae.acts.images.pixels import Failures, ImageError, ImageSet, batches
from wsae.acts.images.sets import ArrayImages
from wsae.core.errors import UserError
from wsae.core.seeds import Permutation, seed_for
from wsae.vision.config import AugmentConfig, PretrainConfig

# Random views of images, decided by a seed alone.

RATIO = (3 / 4, 4 / 3)
"""Width over height of a crop, before it is resized to a square."""
SIGMA = (0.1, 2.0)


class Augment:
    """Augments a batch on its own device; every image is treated by itself.

    `cropped`: the images are random crops already. `grey`: they have one channel, so colour is left alone.
    """

    def __init__(self, cfg: AugmentConfig, size: int, grey: bool, cropped: bool = False) -> None:
        square = (size, size)
        self._steps: list[torch.nn.Module] = []
        if not cropped:
            self._steps.append(
                kornia.RandomResizedCrop(square, cfg.crop, RATIO, cropping_mode="resample")
            )
        if cfg.flip:
            self._steps.append(kornia.RandomHorizontalFlip(p=cfg.flip))
        brightness, contrast, saturation, hue = cfg.jitter
        if grey:
            saturation = hue = 0.0
        if cfg.jitter_p and any((brightness, contrast, saturation, hue)):
            jitter = kornia.ColorJitter(brightness, contrast, saturation, hue, p=cfg.jitter_p)
            self._steps.append(jitter)
        if cfg.grey and not grey:
            self._steps.append(kornia.RandomGrayscale(p=cfg.grey))
        if cfg.blur:
            kernel = max(3, size // 10 | 1)
            self._steps.append(kornia.RandomGaussianBlur((kernel, kernel), SIGMA, p=cfg.blur))

    @torch.no_grad()
    def __call__(
        self, images: Float[Tensor, "batch channels height width"], seed: int
    ) -> Float[Tensor, "batch channels size size"]:
        """Return a view of each image, values in [0, 1]; the same for the same seed."""
        with torch.random.fork_rng(devices=[]):  # kornia draws on the CPU's generator
            torch.default_generator.manual_seed(seed)
            for step in self._steps:
                images = step(images)
        return images


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
STATS_IMAGES = 10_000
"""Training images at most behind mean and standard deviation."""
_CHUNK = 512

Channels = tuple[float, float, float]


@dataclass(frozen=True)
class Data:
    """Images divided into those trained on and those held out."""

    images: ImageSet
    train: Int64[np.ndarray, " train"]
    """Numbers of the images trained on."""
    heldout: Int64[np.ndarray, " heldout"]
    labels: Int64[Tensor, " images"] | None
    """Class of every image; none where fewer than two classes are trained on."""
    classes: int
    grey: bool
    """Return whether no image has colour, so that one channel says all."""
    mean: Channels
    std: Channels
    workers: int
    failures: Failures = field(default_factory=Failures)

    @property
    def in_memory(self) -> bool:
        """Return whether the images are an array, all of one size."""
        return isinstance(self.images, ArrayImages)

    def squares(
        self, index: Int[np.ndarray, " n"]
    ) -> Iterator[tuple[Int64[np.ndarray, " batch"], UInt8[Tensor, "batch channels size size"]]]:
        """Yield whole images as squares and their numbers, in this order; unreadable ones are left out."""
        for numbers, images in batches(self.images, index, _CHUNK, self.workers, self.failures):
            yield numbers, self._channels(images)

    def whole(self, index: Int[np.ndarray, " n"]) -> UInt8[Tensor, "n channels height width"]:
        """Return images of an array in its own size."""
        assert isinstance(self.images, ArrayImages)
        return self._channels(self.images.images(index))

    def _channels(self, images: Tensor) -> Tensor:
        return images[:, :1].contiguous() if self.grey else images

    def batch(self, step: int, size: int, seed: int) -> Int64[np.ndarray, " size"]:
        """Return the numbers of the images of a step; every epoch is a new order of all of them."""
        epoch, place = divmod(step, len(self.train) // size)
        order = Permutation(len(self.train), seed_for(seed, "order", epoch))
        return self.train[order(np.arange(place * size, (place + 1) * size))]


def make_data(cfg: PretrainConfig, images: ImageSet) -> Data:
    """Divide the images and measure their pixels; raises UserError when there are fewer than a batch."""
    used = used_images(len(images), cfg.limit, cfg.seed)
    held = heldout_images(len(images), cfg.heldout_fraction, cfg.seed)[used]
    train, heldout = used[~held], used[held]
    if len(train) < cfg.batch_size:
        raise UserError(
            f"images {cfg.images.path}: {len(train)} to train on are fewer than a batch of {cfg.batch_size}; "
            + (f"use --batch-size {len(train)} or less, or " if len(train) > 1 else "")
            + "give more images"
        )
    labels, classes, several = None, 0, False
    if images.labels is not None:
        classes = int(images.labels.max()) + 1
        several = len(np.unique(images.labels[train])) > 1
        labels = torch.from_numpy(np.ascontiguousarray(images.labels, dtype=np.int64))
    failures = Failures(cfg.images.on_error)
    mean, std = IMAGENET if cfg.normalise == "imagenet" else _moments(cfg, images, train, failures)
    return Data(
        images=images,
        train=train,
        heldout=heldout,
        labels=labels if several else None,
        classes=classes,
        grey=isinstance(images, ArrayImages) and _is_grey(images, used),
        mean=mean,
        std=std,
        workers=cfg.images.workers,
        failures=failures,
    )


def _is_grey(images: ArrayImages, used: Int64[np.ndarray, " used"]) -> bool:
    parts = (images.images(used[i : i + _CHUNK]) for i in range(0, len(used), _CHUNK))
    return all(bool((part == part[:, :1]).all()) for part in parts)


def _moments(
    cfg: PretrainConfig, images: ImageSet, train: Int[np.ndarray, " n"], failures: Failures
) -> tuple[Channels, Channels]:
    """Return mean and standard deviation of each channel over pixels in [0, 1] of training images chosen at random."""
    order = Permutation(len(train), seed_for(cfg.seed, "moments"))
    index = np.sort(train[order(np.arange(min(len(train), STATS_IMAGES)))])
    total, squares, pixels = torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), 0
    for _, part in batches(images, index, _CHUNK, cfg.images.workers, failures):
        x = part.to(torch.int64)
        total, squares = total + x.sum((0, 2, 3)), squares + x.square().sum((0, 2, 3))
        pixels += x.shape[0] * x.shape[2] * x.shape[3]
    if not pixels:
        raise UserError(f"images {cfg.images.path}: none can be read; {failures.summary()}")
    mean = total.double() / pixels
    std = (squares.double() / pixels - mean.square()).clamp_min(0).sqrt()
    if not bool((std > 0).any()):
        raise UserError(
            f"images {cfg.images.path}: all pixels have the same value; there is nothing to learn"
        )
    std = torch.where(std > 0, std, 255.0)  # a constant channel stays what it is
    a, b = (mean / 255).tolist(), (std / 255).tolist()
    return (a[0], a[1], a[2]), (b[0], b[1], b[2])


# Random crops of image files, cut by worker processes from the whole image, before anything is
# resized.


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
