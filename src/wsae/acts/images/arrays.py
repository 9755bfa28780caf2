"""Images of one size as arrays: .npz files, MNIST's IDX files, scikit-learn's digits."""

import gzip
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Shaped, UInt8
from torch import Tensor

from wsae.acts.images.config import ImagesConfig
from wsae.acts.images.pixels import middle_square, to_pillow, to_tensor
from wsae.acts.tally import MOST_CLASSES
from wsae.core.errors import UserError, first_line, nearest
from wsae.core.files import digest, sha256_file
from wsae.core.npy import check_unpacked, npz_arrays

IDX_SPLITS = {"train": ("train",), "test": ("t10k", "test")}
_IDX_BYTES, _OPAQUE = 8, 255


class ArrayImages:
    """Images of one size, grey [n, h, w] or with 1, 3 (RGB) or 4 (RGBA, laid over white) channels; memory may be a map.

    With a config that names a size they are resized to it, else `square` is the image as it is.
    """

    def __init__(
        self,
        images: UInt8[np.ndarray, "images height width *channels"],
        labels: Int[np.ndarray, " images"] | None,
        names: tuple[str, ...],
        digest: str,
        cfg: ImagesConfig = ImagesConfig(),  # noqa: B008  (frozen)
    ) -> None:
        self._images, self.labels, self.names, self._digest = images, labels, names, digest
        self._cfg = cfg
        own = cfg.size is None or images.shape[1:3] == (cfg.size, cfg.size)
        self.as_they_are = own and cfg.resize in (None, cfg.size)
        """Whether `square` gives the images unchanged, so that reading them costs next to nothing."""

    def __len__(self) -> int:
        """Return how many images there are."""
        return len(self._images)

    def image(self, index: int) -> UInt8[Tensor, "3 height width"]:
        """Return an image as RGB."""
        return self.images(np.array([index]))[0]

    def square(self, index: int) -> UInt8[Tensor, "3 height width"]:
        """Return an image in the config's size, or as it is where there is none."""
        image, size = self.image(index), self._cfg.size
        if self.as_they_are or size is None:
            return image
        return to_tensor(middle_square(to_pillow(image), self._cfg, size))

    def images(self, index: Int[np.ndarray, " rows"]) -> UInt8[Tensor, "rows 3 height width"]:
        """Return some images as RGB, in their own size."""
        raw = torch.from_numpy(self._images[index])
        if raw.ndim == 3:
            raw = raw[..., None]
        if raw.shape[3] == 4:
            raw = _over_white(raw)
        return raw.permute(0, 3, 1, 2).expand(-1, 3, -1, -1).contiguous()

    def digest(self) -> str:
        """Return a hash of what the images are."""
        return self._digest


def digits(cfg: ImagesConfig) -> ArrayImages:
    """Return scikit-learn's 1,797 handwritten digits of 8 x 8 pixels; raises UserError where it is not installed."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("images digits: needs scikit-learn; pip install 'wsae[vision]'") from error
    found: Any = load_digits()
    images = np.round(found.images * (255 / 16)).astype(np.uint8)
    names = tuple(str(name) for name in found.target_names)
    return ArrayImages(images, found.target.astype(np.int64), names, "scikit-learn digits", cfg)


def npz_images(path: Path, cfg: ImagesConfig) -> ArrayImages:
    """Return the images of an .npz file: mapped where it is stored uncompressed (np.savez), else read whole.

    Raises UserError where it is damaged, has no `images` or has ones that are not uint8, or labels that do not fit.
    """
    where = f"images {path}"
    found, there = npz_arrays(path, ("images", "labels", "names"), where)
    if "images" not in found:
        has, near = ", ".join(there) or "nothing", nearest("images", there)
        raise UserError(f"{where}: no array named images (it has: {has}); name it so{near}")
    images, labels = found["images"], found.get("labels")
    names = _names(found.get("names"), where)
    _check_images(images, where)
    classes, names = checked_labels(labels, names, len(images), where)
    return ArrayImages(images, classes, names, sha256_file(path), cfg)


def idx_files(folder: Path) -> dict[str, tuple[Path, Path | None]]:
    """Return split -> files of images and labels in MNIST's layout; empty where the folder has none."""
    found = {}
    for split, prefixes in IDX_SPLITS.items():
        for prefix in prefixes:
            images, labels = (
                _idx_file(folder, prefix, kind) for kind in ("images-idx3", "labels-idx1")
            )
            if images is not None:
                found.setdefault(split, (images, labels))
    return found


def idx_images(folder: Path, cfg: ImagesConfig) -> ArrayImages:
    """Return a split of a folder of IDX files; raises UserError where it has none, or they are damaged."""
    files, split = idx_files(folder), cfg.split or "train"
    if split not in files:
        raise UserError(f"images {folder}: no split {split!r}; it has {', '.join(files)}")
    path, label_path = files[split]
    images = _read_idx(path, 3)
    if 0 in images.shape:
        raise UserError(f"{path}: images of shape {images.shape}; there are none in it")
    labels = None if label_path is None else _read_idx(label_path, 1)
    classes, names = checked_labels(labels, (), len(images), f"images {folder}")
    hashes = [sha256_file(p) for p in (path, label_path) if p is not None]
    return ArrayImages(images, classes, names, digest(hashes), cfg)


def _idx_file(folder: Path, prefix: str, kind: str) -> Path | None:
    names = [f"{prefix}-{kind}-ubyte{end}" for end in ("", ".gz")]
    names += [f"{prefix}-{kind.replace('-idx', '.idx')}-ubyte{end}" for end in ("", ".gz")]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _read_idx(path: Path, axes: int) -> np.ndarray:
    """Return the bytes of an IDX file: mapped where it is unpacked."""
    start = 4 + 4 * axes
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            shape = _idx_shape(file.read(start), axes, path)
            needed = math.prod(shape)
            if path.suffix == ".gz":
                fix = "unpack it with gunzip: then it is mapped and not read"
                check_unpacked(needed, path.stat().st_size, str(path), fix)
                data = np.frombuffer(file.read(needed + 1), dtype=np.uint8)
            else:
                data = np.memmap(path, dtype=np.uint8, mode="r")[start:]
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a readable IDX file ({first_line(error)})") from error
    if len(data) != needed:
        raise UserError(f"{path}: {len(data)} bytes where its header says {shape} (cut or altered)")
    return np.array(data).reshape(shape) if axes == 1 else data.reshape(shape)


def _idx_shape(head: bytes, axes: int, path: Path) -> tuple[int, ...]:
    if len(head) < 4 + 4 * axes or [*head[:4]] != [0, 0, _IDX_BYTES, axes]:
        raise UserError(f"{path}: not an IDX file of bytes with {axes} axes")
    return tuple(int(n) for n in np.frombuffer(head[4:], dtype=">u4"))


def _check_images(images: np.ndarray, where: str) -> None:
    if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 3, 4)):
        raise UserError(
            f"{where}: images of shape {images.shape}; give [n, height, width] or [n, height, width, 1, 3 or 4]"
        )
    if images.dtype != np.uint8:
        raise UserError(
            f"{where}: images are {images.dtype}; give uint8 from 0 to 255 "
            '(floats in [0, 1]: np.round(255 * images).astype("uint8"))'
        )
    if 0 in images.shape:
        raise UserError(f"{where}: images of shape {images.shape}; there are none in it")


def _names(names: np.ndarray | None, where: str) -> tuple[str, ...]:
    if names is None:
        return ()
    if names.ndim != 1:
        raise UserError(f"{where}: names of shape {names.shape}; give a list, one a class")
    return tuple(str(name) for name in names)


def _over_white(raw: UInt8[Tensor, "rows height width 4"]) -> UInt8[Tensor, "rows height width 3"]:
    alpha = raw[..., 3:].int()
    mixed = raw[..., :3].int() * alpha + _OPAQUE * (_OPAQUE - alpha)
    return ((mixed + _OPAQUE // 2) // _OPAQUE).to(torch.uint8)


def checked_labels(
    labels: Shaped[np.ndarray, "..."] | None, names: tuple[str, ...], n_images: int, where: str
) -> tuple[Int[np.ndarray, " images"] | None, tuple[str, ...]]:
    """Return labels as int64 with one name a class (numbers where there are none); (None, ()) without labels.

    Labels that are all negative mean that nobody labelled the images. Raises UserError for another number of labels
    than images, ones that are not whole numbers from 0, or more classes than names.
    """
    if labels is None:
        return None, ()
    if labels.shape != (n_images,):
        raise UserError(
            f"{where}: labels of shape {labels.shape} for {n_images} images; give one an image"
        )
    if labels.dtype.kind not in "iu":
        raise UserError(
            f"{where}: labels are {labels.dtype}, not whole numbers; number the classes from 0"
        )
    if not n_images or int(labels.max()) < 0:
        return None, ()
    if int(labels.min()) < 0:
        raise UserError(
            f"{where}: image {int(labels.argmin())} has label {int(labels.min())}; number the classes from 0"
        )
    needed = int(labels.max()) + 1
    if needed > MOST_CLASSES:
        raise UserError(
            f"{where}: image {int(labels.argmax())} has label {needed - 1}; "
            f"number the classes from 0 (at most {MOST_CLASSES:,})"
        )
    if names and len(names) < needed:
        raise UserError(
            f"{where}: labels up to {needed - 1} but {len(names)} names; give one a class"
        )
    return labels.astype(np.int64), names or tuple(str(number) for number in range(needed))
