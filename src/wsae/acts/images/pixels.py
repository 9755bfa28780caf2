"""Images as RGB bytes: one decoded by Pillow, whatever its file holds; a set of them, read singly or in batches."""

import functools
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from wsae.acts.config import ImagesConfig
from wsae.core.errors import UserError, first_line

_FILTERS = {name.lower(): value for name, value in Image.Resampling.__members__.items()}
_WIDE = ("I", "I;16", "I;16L", "I;16B", "I;16N")
_TOP = 65_535
_STRIP = 16
"""Of longer images, in shorter sides, the middle alone is resized."""
_PLAIN_PIXELS, _MOST_PER_BYTE = 1 << 24, 1000
"""More pixels than the first are refused where there are more than the second for each byte of the file."""
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""What is read, by content whatever a file is called: Pillow knows more, and runs a program for some (PostScript)."""
NAMED = 5
"""Unreadable images that are named, not only counted."""


class ImageError(UserError):
    """An image that cannot be read; `index` is its number."""

    def __init__(self, message: str, index: int) -> None:
        self.index = index
        super().__init__(message)


class ImageSet:
    """Images by number, in a fixed order, with their classes where these are known; a subclass finds and decodes one.

    `labels` are the class of every image, int64 from 0, none where the images are not labelled; `names` those of the
    classes, empty without labels.
    """

    as_they_are = False
    """Whether `square` gives the images unchanged, so that reading them costs next to nothing."""

    def __init__(
        self,
        cfg: ImagesConfig,
        n: int,
        labels: Int[np.ndarray, " images"] | None,
        names: tuple[str, ...],
        digest: str = "",
    ) -> None:
        self.cfg, self._n, self.labels, self.names, self._digest = cfg, n, labels, names, digest

    def __len__(self) -> int:
        """Return how many images there are."""
        return self._n

    def decoded(self, index: int) -> Image.Image:
        """Return an image as RGB, in its own size; raises ImageError naming it where it cannot be read."""
        raise NotImplementedError

    def image(self, index: int) -> UInt8[Tensor, "3 height width"]:
        """Return an image's RGB bytes, in its own size; raises ImageError (a UserError) where it cannot be read."""
        return to_tensor(self.decoded(index))

    def square(self, index: int) -> UInt8[Tensor, "3 size size"]:
        """Return an image resized (shorter side) and cut to the config's square; raises ImageError like `image`."""
        return to_tensor(middle_square(self.decoded(index), self.cfg, self.cfg.side))

    def images(self, index: Int[np.ndarray, " rows"]) -> UInt8[Tensor, "rows 3 height width"]:
        """Return some images of one size."""
        return torch.stack([self.image(int(i)) for i in index])

    def digest(self) -> str:
        """Return a hash of what the images are."""
        return self._digest


def decoded(source: bytes | Path, where: str, index: int) -> Image.Image:
    """Return an image in mode RGB, upright; raises ImageError for one that is missing, damaged, cut or far too large.

    Alpha lies over white, 16 bits lose their lower byte, and EXIF orientation is obeyed. Pillow's limit against
    decompression bombs stands, with a lower one for files that are nearly empty; only `FORMATS` are read, and only
    from regular files.
    """
    if isinstance(source, Path) and source.exists() and not source.is_file():
        raise ImageError(f"{where}: cannot be read (not a regular file)", index)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice about odd but readable files
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            data = source if isinstance(source, bytes) else source.read_bytes()
            # from memory: of a file Pillow would ask for as many bytes as a damaged header says, at once
            with Image.open(io.BytesIO(data), formats=_formats()) as image:
                pixels = image.width * image.height
                if pixels > _PLAIN_PIXELS and pixels > _MOST_PER_BYTE * len(data):
                    raise ValueError(f"{pixels:,} pixels out of {len(data):,} bytes")
                return as_rgb(ImageOps.exif_transpose(image))
    except MemoryError:
        raise
    except (
        Exception
    ) as error:  # OSError, SyntaxError, ValueError, struct.error, zlib.error, bombs, ...
        why = f"cannot be read ({getattr(error, 'strerror', None) or first_line(error)})"
        if isinstance(error, Image.UnidentifiedImageError):
            why = "not an image that Pillow can read"
        raise ImageError(f"{where}: {why}", index) from error


def as_rgb(image: Image.Image) -> Image.Image:
    """Return a Pillow image of any mode as RGB; raises ValueError for floating-point pixels."""
    if image.mode in _WIDE:
        wide = np.asarray(image).astype(np.int64).clip(0, _TOP)
        return Image.fromarray((wide >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels; store them as 8 or 16 bits")
    if image.has_transparency_data:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    return image.convert("RGB")


def middle_square(image: Image.Image, cfg: ImagesConfig, side: int) -> Image.Image:
    """Return the middle square of `side` pixels after the shorter side has been resized to the config's `resize`.

    Where `resize` is none it is `side`; where it is smaller the borders are black.
    """
    short = cfg.resize or side
    most = _STRIP * min(image.size) * -(-side // short)
    if max(image.size) > most:  # resized whole, a line of pixels would take all memory
        image = _middle(image, min(image.width, most), min(image.height, most))
    width, height = image.size
    size = (
        (short, int(short * height / width))
        if width <= height
        else (int(short * width / height), short)
    )
    if size != image.size:
        image = image.resize(size, _FILTERS[cfg.resample])
    return _middle(image, side, side)


def _middle(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def to_tensor(image: Image.Image) -> UInt8[Tensor, "3 height width"]:
    """Return an RGB image's bytes."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


@functools.cache
def _formats() -> tuple[str, ...]:
    """Return those of `FORMATS` that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


class Failures:
    """Images that could not be read: how many, and the first five by name; `on_error` "raise" stops at the first."""

    def __init__(self, on_error: Literal["skip", "raise"] = "raise") -> None:
        self.on_error = on_error
        self.count = 0
        self.messages: list[str] = []

    def add(self, index: int, message: str) -> None:
        """Note one; raises ImageError where none may be skipped."""
        if self.on_error == "raise":
            raise ImageError(message, index)
        self.count += 1
        if len(self.messages) < NAMED:
            self.messages.append(message)

    def summary(self) -> str:
        """Return a line that counts and names them; empty where there are none."""
        more = f" and {self.count - NAMED} more" if self.count > NAMED else ""
        return f"{self.count} unreadable: {'; '.join(self.messages)}{more}" if self.count else ""


@dataclass(frozen=True)
class _Part:
    """One batch: what could be read, and the number and message of what could not."""

    index: np.ndarray
    squares: Tensor
    failed: list[tuple[int, str]]


class _Parts(Dataset[_Part]):
    """Whole batches by number: what a worker process reads at a time."""

    def __init__(self, images: ImageSet, order: np.ndarray, size: int) -> None:
        self._images = images
        self._chunks = [order[first : first + size] for first in range(0, len(order), size)]

    def __len__(self) -> int:
        return len(self._chunks)

    def __getitem__(self, number: int) -> _Part:
        index = self._chunks[number]
        if self._images.as_they_are:
            return _Part(index, self._images.images(index), [])
        squares, kept, failed = [torch.empty(0, 3, 1, 1, dtype=torch.uint8)], [], []
        for image in index:
            try:
                squares.append(self._images.square(int(image))[None])
                kept.append(image)
            except ImageError as error:
                failed.append((error.index, str(error)))
        return _Part(np.array(kept, index.dtype), torch.cat(squares[1:] or squares), failed)


def batches(
    images: ImageSet,
    order: Int[np.ndarray, " images"],
    batch_size: int,
    workers: int = 0,
    failures: Failures | None = None,
) -> Iterator[tuple[Int[np.ndarray, " batch"], UInt8[Tensor, "batch 3 height width"]]]:
    """Yield the numbers and squares of every `batch_size` images of `order`, in that order.

    Images that cannot be read are missing from their batch (which may become empty) and noted in `failures`; without it
    the first one raises ImageError. The result does not depend on `workers`.
    """
    failures, parts = failures or Failures("raise"), _Parts(images, order, batch_size)
    # handing images that are as they are over would cost more than reading them
    in_others = workers and len(parts) > 1 and not images.as_they_are
    with warnings.catch_warnings():
        # a worker decodes and does nothing that another thread could hold a lock for
        warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)
        read = iter(
            DataLoader(
                parts,
                batch_size=None,
                num_workers=min(workers, len(parts)) if in_others else 0,
                prefetch_factor=2 if in_others else None,
                generator=torch.Generator().manual_seed(0),  # the loader draws a seed nobody uses
            )
        )
    for part in read:
        for index, message in part.failed:
            failures.add(index, message)
        yield part.index, part.squares
