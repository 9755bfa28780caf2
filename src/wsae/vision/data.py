"""The images of a run: which are trained on, in what order, and what their pixels are like."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Int, Int64, UInt8
from torch import Tensor

from wsae.acts.images.sets import ArrayImages, Failures, ImageSet, batches
from wsae.acts.images.split import heldout_images
from wsae.core.errors import UserError
from wsae.core.seeds import Permutation, seed_for
from wsae.vision.config import PretrainConfig

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
    """Class of every image; none where fewer than two classes are there."""
    classes: int
    grey: bool
    """Whether no image has colour, so that one channel says all."""
    mean: Channels
    std: Channels
    workers: int
    failures: Failures = field(default_factory=Failures)

    @property
    def in_memory(self) -> bool:
        """Whether the images are an array, all of one size."""
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
    used = _used(len(images), cfg)
    held = heldout_images(len(images), cfg.heldout_fraction, cfg.seed)[used]
    train, heldout = used[~held], used[held]
    if len(train) < cfg.batch_size:
        raise UserError(
            f"images {cfg.images.path}: {len(train)} to train on are fewer than a batch of {cfg.batch_size}; "
            f"use --batch-size {max(2, len(train))} or less, or more images"
        )
    labels, classes, several = None, 0, False
    if images.labels is not None:
        classes = int(images.labels.max()) + 1
        several = len(np.unique(images.labels[used])) > 1
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


def _used(n: int, cfg: PretrainConfig) -> Int64[np.ndarray, " used"]:
    """Return the numbers of the images used: all, or a random choice under a limit."""
    if cfg.limit is None or cfg.limit >= n:
        return np.arange(n)
    return np.sort(Permutation(n, seed_for(cfg.seed, "limit"))(np.arange(cfg.limit)))


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
