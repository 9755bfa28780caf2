"""Which images to read, which vision model to run, which rows to keep. Torch-free: help imports it."""

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from wsae.core.config import Config

Resample = Literal["bilinear", "bicubic", "lanczos", "nearest", "box", "hamming"]
FILE_SIZE = 224
"""Side in pixels of images from files where nobody names one."""
Stem = Literal["imagenet", "small", "smallest"]


class ImagesConfig(Config):
    """Where images come from. Their order is fixed: an image is named by its number everywhere."""

    path: str = "digits"
    """A folder of class folders, an .npz file (images, labels, names), a folder of IDX files (MNIST's layout, gzipped
    or not), a .parquet file or folder of them, a hub dataset's name, or "digits" (scikit-learn's 1,797 digits)."""
    split: str | None = None
    """Split of a hub dataset, an IDX folder, or a folder with train/ and val/ in it; default: "train"."""
    subset: str | None = None
    """Configuration of a hub dataset that has several."""
    image_field: str = "image"
    """Column of a table that holds the images."""
    label_field: str = "label"
    """Column of a table that holds their classes."""
    size: PositiveInt | None = None
    """Side in pixels: images are resized (shorter side) and cut to the middle square; default: the model's own,
    without a model an array's own, or 224."""
    resize: PositiveInt | None = None
    """Side that the shorter side is resized to before the middle square of `size` is cut; default: `size`."""
    resample: Resample = "bicubic"
    """Filter of the resizing (Pillow's, which smooths when it shrinks)."""
    on_error: Literal["skip", "raise"] = "skip"
    """What an unreadable image does: it is left out, named and counted, or ends the command."""
    workers: int = Field(default=0, ge=0)
    """Processes that decode and resize; 0: the main process. Arrays in their own size are read there anyway."""

    @property
    def side(self) -> int:
        """Side of the square that an image file becomes."""
        return self.size or FILE_SIZE


class ImageHarvestConfig(Config):
    """A vision model, its images, the hook points and the rows to keep."""

    model: str
    """Hub id or local directory of a Hugging Face vision model, or a run of `wsae pretrain`."""
    images: ImagesConfig = ImagesConfig()
    hooks: tuple[str, ...] = ("pooler",)
    """Module-name patterns; [batch, width] gives one row an image, [batch, tokens, width] and [batch, width, h, w] one
    for each position."""
    limit: PositiveInt | None = None
    """Images read at most, a random choice; default: all."""
    heldout_fraction: float = Field(default=0.2, ge=0, lt=1)
    """Share of the images kept for evaluation, chosen by a hash of seed and image number."""
    batch_size: PositiveInt = 64
    """Images per forward pass."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision the model runs in."""
    store_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision on disk."""
    shard_rows: PositiveInt = 65_536
    """Rows after which a store's shard is closed; a killed harvest loses at most this much work."""
    seed: int = 0
    """Decides which images are held out, and which are read under a limit."""
    device: str = "cpu"
    """Where the model runs."""

    @model_validator(mode="after")
    def _hooked(self) -> "ImageHarvestConfig":
        if not self.hooks:
            raise ValueError('hooks: name at least one, for example "pooler"')
        return self
