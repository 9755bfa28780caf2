"""A set of images in a fixed order, read one by one or many at a time; decoded to RGB bytes."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from wsae.acts.images.arrays import ArrayImages, digits, idx_files, idx_images, npz_images
from wsae.acts.images.config import ImagesConfig
from wsae.acts.images.folders import SUFFIXES, FolderImages, has_images
from wsae.acts.images.pixels import ImageError, ImageSet
from wsae.acts.images.tables import hub_images, parquet_files, parquet_images
from wsae.core.errors import UserError

NAMED = 5
"""Unreadable images that are named, not only counted."""
_PREFETCHED = 2
"""Batches that each worker process reads before they are asked for."""
_ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")


def open_images(cfg: ImagesConfig) -> ImageSet:
    """Open the images that a config names: their number, labels and names are known, pixels are read when asked for.

    Raises UserError in one line where there are none, or where names, columns and labels do not fit together.
    """
    if cfg.path == "digits":
        return digits(cfg)
    path = Path(cfg.path).expanduser()
    if cfg.path.strip() and path.exists():
        return _folder(path, cfg) if path.is_dir() else _file(path, cfg)
    if _is_hub_name(cfg.path):
        return hub_images(cfg)
    raise UserError(f"images {cfg.path}: no such file or directory")


def _file(path: Path, cfg: ImagesConfig) -> ImageSet:
    kind = path.suffix.lower()
    if kind == ".npz":
        return npz_images(path, cfg)
    if kind == ".parquet":
        return parquet_images(path, cfg)
    if kind in _ARCHIVES:
        raise UserError(f"images {path}: an archive; unpack it and name the folder")
    if kind in SUFFIXES:
        raise UserError(f"images {path}: one image; name a folder of them")
    raise UserError(f"images {path}: unknown kind of file; give a folder, .npz or .parquet")


def _folder(path: Path, cfg: ImagesConfig) -> ImageSet:
    if idx_files(path):
        return idx_images(path, cfg)
    if parquet_files(path) and not has_images(path):
        return parquet_images(path, cfg)
    return FolderImages(path, cfg)


def _is_hub_name(name: str) -> bool:
    looks_local = name.startswith(("/", ".", "~")) or name.lower().endswith(
        (*SUFFIXES, *_ARCHIVES, ".npz", ".npy", ".parquet")
    )
    return not looks_local and name.count("/") <= 1 and bool(name.strip())


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
    failures = failures or Failures("raise")
    chunks = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
    if isinstance(images, ArrayImages) and images.as_they_are:
        workers = 0  # handing them over would cost more than reading them
    for part in _read(_BatchReader(images, chunks), workers):
        for index, message in part.failed:
            failures.add(index, message)
        yield part.index, part.squares


@dataclass(frozen=True)
class _Part:
    """One batch: what could be read, and the number and message of what could not."""

    index: np.ndarray
    squares: Tensor
    failed: list[tuple[int, str]]


class _BatchReader(Dataset[_Part]):
    """Whole batches by number: what a worker process reads at a time."""

    def __init__(self, images: ImageSet, chunks: Sequence[np.ndarray]) -> None:
        self._images, self._chunks = images, chunks

    def __len__(self) -> int:
        return len(self._chunks)

    def __getitem__(self, number: int) -> _Part:
        index = self._chunks[number]
        if isinstance(self._images, ArrayImages) and self._images.as_they_are:
            return _Part(index, self._images.images(index), [])
        squares: list[Tensor] = []
        kept, failed = [], []
        for image in index:
            try:
                squares.append(self._images.square(int(image)))
                kept.append(image)
            except ImageError as error:
                failed.append((error.index, str(error)))
        stacked = torch.stack(squares) if squares else torch.empty(0, 3, 1, 1, dtype=torch.uint8)
        return _Part(np.array(kept, dtype=index.dtype), stacked, failed)


def _read(reader: _BatchReader, workers: int) -> Iterator[_Part]:
    """Return every batch in order, read by worker processes where there is more than one."""
    if not workers or len(reader) < 2:
        return (reader[number] for number in range(len(reader)))
    loader = DataLoader(
        reader,
        batch_size=None,
        shuffle=False,
        num_workers=min(workers, len(reader)),
        prefetch_factor=_PREFETCHED,
        generator=torch.Generator().manual_seed(0),  # the loader draws a seed nobody uses
    )
    with warnings.catch_warnings():
        # a worker decodes and does nothing that another thread could hold a lock for
        warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)
        return iter(loader)
