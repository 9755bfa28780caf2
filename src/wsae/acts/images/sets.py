"""A set of images in a fixed order, read one by one or many at a time; decoded to RGB bytes."""

from pathlib import Path

from wsae.acts.images.arrays import ArrayImages, digits, idx_files, idx_images, npz_images
from wsae.acts.images.config import ImagesConfig
from wsae.acts.images.folders import SUFFIXES, FolderImages, has_images
from wsae.acts.images.pixels import ImageError, ImageSet
from wsae.acts.images.reading import Failures, batches, originals
from wsae.acts.images.tables import hub_images, parquet_files, parquet_images
from wsae.core.errors import UserError

__all__ = [
    "ArrayImages",
    "Failures",
    "ImageError",
    "ImageSet",
    "batches",
    "open_images",
    "originals",
]

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
