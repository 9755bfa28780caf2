"""One image: decoded by Pillow to RGB bytes, whatever its file holds, and cut to a square."""

import functools
import io
import warnings
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image, ImageOps
from torch import Tensor

from wsae.acts.images.config import ImagesConfig
from wsae.core.errors import UserError, first_line

_FILTERS = {name.lower(): value for name, value in Image.Resampling.__members__.items()}
_WIDE = ("I", "I;16", "I;16L", "I;16B", "I;16N")
_TOP = 65_535
_PLAIN_PIXELS, _MOST_PER_BYTE = 1 << 24, 1000
"""More pixels than the first are refused where there are more than the second for each byte of the file."""
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""What is read, by content whatever a file is called: Pillow knows more, and runs a program for some (PostScript)."""


class ImageError(UserError):
    """An image that cannot be read; `index` is its number."""

    def __init__(self, message: str, index: int) -> None:
        self.index = index
        super().__init__(message)


@runtime_checkable
class ImageSet(Protocol):
    """Images by number, with their classes where these are known."""

    labels: Int[np.ndarray, " images"] | None
    """Class of every image, int64 from 0; none where the images are not labelled."""
    names: tuple[str, ...]
    """The classes' names; empty without labels."""

    def __len__(self) -> int:
        """Return how many images there are."""
        ...

    def image(self, index: int) -> UInt8[Tensor, "3 height width"]:
        """Return an image as RGB, in its own size; raises ImageError (a UserError) where it cannot be read."""
        ...

    def square(self, index: int) -> UInt8[Tensor, "3 size size"]:
        """Return an image resized (shorter side) and cut to the config's square; raises ImageError like `image`."""
        ...

    def digest(self) -> str:
        """Return a hash of what the images are."""
        ...


class DecodedImages:
    """Images that are decoded when asked for: a subclass says how one is found."""

    cfg: ImagesConfig

    def decoded(self, index: int) -> Image.Image:
        """Return an image as RGB, in its own size; raises ImageError naming it."""
        raise NotImplementedError

    def image(self, index: int) -> UInt8[Tensor, "3 height width"]:
        """Return an image as RGB, in its own size; raises ImageError naming it."""
        return to_tensor(self.decoded(index))

    def square(self, index: int) -> UInt8[Tensor, "3 size size"]:
        """Return an image resized and cut; raises ImageError naming it."""
        return to_tensor(middle_square(self.decoded(index), self.cfg, self.cfg.side))


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
    ) as error:  # OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, bombs, ...
        raise ImageError(f"{where}: {_reason(error)}", index) from error


def as_rgb(image: Image.Image) -> Image.Image:
    """Return a Pillow image of any mode as RGB; raises ValueError for floating-point pixels."""
    if image.mode in _WIDE:
        return Image.fromarray((_wide(image) >> 8).astype(np.uint8)).convert("RGB")
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
    short, (width, height) = cfg.resize or side, image.size
    size = (
        (short, int(short * height / width))
        if width <= height
        else (int(short * width / height), short)
    )
    if size != image.size:
        image = image.resize(size, _FILTERS[cfg.resample])
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    return image.crop((left, top, left + side, top + side))


def to_tensor(image: Image.Image) -> UInt8[Tensor, "3 height width"]:
    """Return an RGB image's bytes."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def to_pillow(image: UInt8[Tensor, "3 height width"]) -> Image.Image:
    """Return RGB bytes as an image."""
    return Image.fromarray(image.permute(1, 2, 0).numpy())


@functools.cache
def _formats() -> tuple[str, ...]:
    """Return those of `FORMATS` that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _wide(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(np.int64).clip(0, _TOP)


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image that Pillow can read"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    return f"cannot be read ({first_line(error)})"
