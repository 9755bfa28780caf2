"""What a page shows of an image: its class and a thumbnail."""

import base64
import io

import numpy as np
from jaxtyping import Int
from PIL import Image

from wsae.acts.images.sets import ImageSet

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
