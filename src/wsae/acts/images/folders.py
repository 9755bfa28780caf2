"""Image files in folders: one a class (ImageFolder's layout), with or without train/ and val/ above, or all in one."""

import functools
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from wsae.acts.images.config import ImagesConfig
from wsae.acts.images.pixels import DecodedImages, decoded
from wsae.core.errors import UserError, nearest
from wsae.core.files import digest, sha256_file

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
SPLITS = ("train", "val", "valid", "validation", "test")
_SAMPLES = 256


class PackedTexts:
    """Many short strings in two arrays: processes that share them copy nothing."""

    def __init__(self, texts: Sequence[str]) -> None:
        parts = [text.encode("utf-8", "surrogateescape") for text in texts]
        self._bytes = b"".join(parts)
        self._ends = np.cumsum([0, *map(len, parts)], dtype=np.int64)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        """Return one."""
        first, last = int(self._ends[index]), int(self._ends[index + 1])
        return self._bytes[first:last].decode("utf-8", "surrogateescape")


class FolderImages(DecodedImages):
    """Image files of one folder, sorted by class and path, decoded when asked for."""

    def __init__(self, folder: Path, cfg: ImagesConfig) -> None:
        found = _found(folder, cfg)
        self._folder, self.cfg = folder, cfg
        self.names = tuple(sorted({name for name, _ in found if name}))
        numbers = {name: number for number, name in enumerate(self.names)}
        found.sort()
        self._paths = PackedTexts([path for _, path in found])
        self.labels = (
            np.array([numbers[name] for name, _ in found], dtype=np.int64) if self.names else None
        )

    def __len__(self) -> int:
        """Return how many images there are."""
        return len(self._paths)

    def decoded(self, index: int) -> Image.Image:
        """Return an image as RGB; raises ImageError naming the file."""
        path = self._path(index)
        return decoded(path, str(path), index)

    @functools.cache  # noqa: B019  (a set lives as long as its run)
    def digest(self) -> str:
        """Return a hash of every file's name and size and of 256 files' content."""
        sha = hashlib.sha256()
        for index in range(len(self)):
            size = self._path(index).stat().st_size
            sha.update(f"{self._paths[index]}\0{size}\n".encode("utf-8", "surrogateescape"))
        some = np.unique(np.linspace(0, len(self) - 1, _SAMPLES).round().astype(int))
        return digest([sha.hexdigest(), [sha256_file(self._path(int(i))) for i in some]])

    def _path(self, index: int) -> Path:
        return self._folder / self._paths[index]


def has_images(folder: Path) -> bool:
    """Return whether a folder holds an image file at any depth."""
    return next(_files(folder), None) is not None


def _found(root: Path, cfg: ImagesConfig) -> list[tuple[str, str]]:
    """Return (class, path from `root`) of every image; the class is empty in a folder without class folders."""
    found, flat = [], ""
    for part in _parts(root, cfg.split):
        for path in _files(part):
            inside = path.relative_to(part).parts
            flat = flat or (str(path) if len(inside) == 1 else "")
            found.append((inside[0] if len(inside) > 1 else "", str(path.relative_to(root))))
    if not found:
        raise UserError(f"images {root}: no image file in it ({', '.join(SUFFIXES)})")
    if flat and any(name for name, _ in found):
        raise UserError(
            f"images {root}: {flat} lies beside class folders; move it into its class's folder"
        )
    return found


def _parts(root: Path, split: str | None) -> list[Path]:
    """Return the folders that hold the classes: the root, or those of a split ("train", or "train.X1", ...)."""
    inside = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    kinds = {p.name.split(".")[0] for p in inside}
    if split is None and not (kinds and kinds <= set(SPLITS)):
        return [root]
    wanted = split or "train"
    parts = [p for p in inside if p.name == wanted] or [
        p for p in inside if p.name.split(".")[0] == wanted
    ]
    if not parts:
        has = ", ".join(sorted(kinds)) or "no folders"
        raise UserError(f"images {root}: no split {wanted!r}; it has {has}{nearest(wanted, kinds)}")
    return parts


def _files(folder: Path, seen: set[tuple[int, int]] | None = None) -> Iterator[Path]:
    """Yield the image files below a folder, each folder's own first, sorted. Links are followed: they are the user's.

    Raises UserError where links lead to a folder twice: in circles, or to an image under two classes.
    """
    seen = set() if seen is None else seen
    try:
        status = folder.stat()
        with os.scandir(folder) as found:
            entries = sorted((e for e in found if not e.name.startswith(".")), key=_name)
    except OSError as error:
        raise UserError(f"images {folder}: cannot be read ({error.strerror})") from error
    if (status.st_dev, status.st_ino) in seen:
        raise UserError(f"images {folder}: links lead to this folder twice; remove one of them")
    seen.add((status.st_dev, status.st_ino))
    for entry in entries:
        if entry.name.lower().endswith(SUFFIXES) and entry.is_file():
            yield Path(entry.path)
    for entry in entries:
        if entry.is_dir():
            yield from _files(Path(entry.path), seen)


def _name(entry: os.DirEntry[str]) -> str:
    return entry.name
