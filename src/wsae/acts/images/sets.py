"""Where images come from: arrays (.npz, MNIST's IDX, digits), folders of files, columns of parquet and of the hub."""

import gzip
import hashlib
import json
import math
import os
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Shaped, UInt8
from PIL import Image
from torch import Tensor

from wsae.acts.config import DIGITS, ImagesConfig
from wsae.acts.flow import MOST_CLASSES
from wsae.acts.images.pixels import ImageError, ImageSet, decoded
from wsae.acts.tables import arrow_errors
from wsae.core.errors import UserError, first_line, nearest
from wsae.core.files import digest, sha256_file
from wsae.core.hub import hub_dataset, is_hub_name
from wsae.core.tensors import check_unpacked, npz_arrays

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
SPLITS = ("train", "training", "val", "valid", "validation", "dev", "test", "testing")
_ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")
_IDX_SPLITS = {"train": ("train",), "test": ("t10k", "test")}
_SAMPLES = 256
CACHE_BYTES = 256 << 20
"""Row groups kept after use; one that is larger is read forward a few rows at a time."""
_ROWS = 32


def open_images(cfg: ImagesConfig) -> ImageSet:
    """Open the images that a config names: their number, labels and names are known, pixels are read when asked for.

    Raises UserError in one line where there are none, or where names, columns and labels do not fit together.
    """
    if cfg.path == DIGITS:
        return _digits(cfg)
    path = Path(cfg.path).expanduser()
    if not cfg.path.strip() or not path.exists():
        if is_hub_name(cfg.path, (*SUFFIXES, *_ARCHIVES, ".npz", ".npy", ".parquet")):
            return _hub_images(cfg)
        raise UserError(f"images {cfg.path}: no such file or directory")
    if path.is_dir():
        if found := _idx_files(path):
            return _idx_images(path, found, cfg)
        tables = sorted(p for p in path.rglob("*.parquet") if not p.name.startswith("."))
        if tables and next(_image_files(path), None) is None:
            return _parquet_images(path, tables, cfg)
        return FolderImages(path, cfg)
    kind = path.suffix.lower()
    if kind in (".npz", ".parquet"):
        return _npz_images(path, cfg) if kind == ".npz" else _parquet_images(path, [path], cfg)
    what = "unknown kind of file; give a folder, .npz or .parquet"
    if kind in _ARCHIVES:
        what = "an archive; unpack it and name the folder"
    elif kind in SUFFIXES:
        what = "one image; name a folder of them"
    raise UserError(f"images {path}: {what}")


def _checked_labels(
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
    low, needed = int(labels.min()), int(labels.max()) + 1
    if low < 0 or needed > MOST_CLASSES:
        image, label = (labels.argmin(), low) if low < 0 else (labels.argmax(), needed - 1)
        most = "" if low < 0 else f" (at most {MOST_CLASSES:,})"
        raise UserError(
            f"{where}: image {int(image)} has label {label}; number the classes from 0{most}"
        )
    if names and len(names) < needed:
        raise UserError(
            f"{where}: labels up to {needed - 1} but {len(names)} names; give one a class"
        )
    return labels.astype(np.int64), names or tuple(str(number) for number in range(needed))


# Image files in folders: one a class (ImageFolder's layout), with or without train/ and val/ above,
# or all in one.


class FolderImages(ImageSet):
    """Image files of one folder, sorted by class and path, decoded when asked for."""

    def __init__(self, folder: Path, cfg: ImagesConfig) -> None:
        found = sorted(_found(folder, cfg))
        names = tuple(sorted({name for name, _ in found if name}))
        numbers = {name: number for number, name in enumerate(names)}
        labels = np.array([numbers[name] for name, _ in found], dtype=np.int64) if names else None
        super().__init__(cfg, len(found), labels, names)
        self._folder = folder
        self._paths = np.array([os.fsencode(path) for _, path in found])
        """From the folder, as bytes of one width: processes that share them copy nothing."""

    def _path(self, index: int) -> Path:
        return self._folder / os.fsdecode(self._paths[index])

    def decoded(self, index: int) -> Image.Image:
        """Return an image as RGB; raises ImageError naming the file."""
        path = self._path(index)
        return decoded(path, str(path), index)

    def digest(self) -> str:
        """Return a hash of every file's name and size and of 256 files' content."""
        if not self._digest:
            sha = hashlib.sha256()
            for index, name in enumerate(self._paths.tolist()):
                sha.update(name + f"\0{self._path(index).stat().st_size}\n".encode())
            some = np.unique(np.linspace(0, len(self) - 1, _SAMPLES).round().astype(int))
            hashes = [sha256_file(self._path(int(i))) for i in some]
            self._digest = digest([sha.hexdigest(), hashes])
        return self._digest


def _found(root: Path, cfg: ImagesConfig) -> list[tuple[str, str]]:
    """Return (class, path from `root`) of every image; the class is empty in a folder without class folders."""
    found, flat = [], ""
    for part in _parts(root, cfg.split):
        for path in _image_files(part):
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
    """Return the folders that hold the classes: the root, or those of a split ("train", "train.X1", ...).

    Folders are splits where all that hold images are named so.
    """
    inside = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    kinds = {p: p.name.split(".")[0].lower() for p in inside}
    named = [kind for kind in kinds.values() if kind in SPLITS]
    others = (p for p, kind in kinds.items() if kind not in SPLITS)
    if split is None and not (named and all(next(_image_files(p), None) is None for p in others)):
        return [root]
    wanted = split or next((kind for kind in SPLITS[:2] if kind in named), SPLITS[0])
    parts = [p for p in inside if p.name == wanted] or [
        p for p, kind in kinds.items() if kind == wanted
    ]
    if not parts:
        has = ", ".join(dict.fromkeys(named)) or "none, its folders are classes: leave --split out"
        raise UserError(f"images {root}: no split {wanted!r}; it has {has}")
    return parts


def _image_files(folder: Path, seen: set[tuple[int, int]] | None = None) -> Iterator[Path]:
    """Yield the image files below a folder, each folder's own first, sorted. Links are followed: they are the user's.

    Raises UserError where links lead nowhere, or to a folder twice: in circles, or to an image under two classes.
    """
    seen = set() if seen is None else seen
    try:
        status = folder.stat()
        with os.scandir(folder) as found:
            entries = sorted(
                (e for e in found if not e.name.startswith(".")), key=lambda entry: entry.name
            )
    except OSError as error:
        raise UserError(f"images {folder}: cannot be read ({error.strerror})") from error
    if (status.st_dev, status.st_ino) in seen:
        raise UserError(f"images {folder}: links lead to this folder twice; remove one of them")
    seen.add((status.st_dev, status.st_ino))
    for entry in entries:
        if entry.is_symlink() and not os.path.exists(entry.path):
            raise UserError(
                f"images {entry.path}: a link that leads nowhere; fetch what it is of, or remove it"
            )
        if entry.name.lower().endswith(SUFFIXES) and entry.is_file():
            yield Path(entry.path)
    for entry in entries:
        if entry.is_dir():
            yield from _image_files(Path(entry.path), seen)


class ArrayImages(ImageSet):
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
        super().__init__(cfg, len(images), labels, names, digest)
        self._images = images
        own = cfg.size is None or images.shape[1:3] == (cfg.size, cfg.size)
        self.as_they_are = own and cfg.resize in (None, cfg.size)

    def image(self, index: int) -> UInt8[Tensor, "3 height width"]:
        """Return an image as RGB."""
        return self.images(np.array([index]))[0]

    def decoded(self, index: int) -> Image.Image:
        """Return an image as RGB, as Pillow holds one."""
        return Image.fromarray(self.image(index).permute(1, 2, 0).numpy())

    def square(self, index: int) -> UInt8[Tensor, "3 height width"]:
        """Return an image in the config's size, or as it is where there is none."""
        as_it_is = self.as_they_are or self.cfg.size is None
        return self.image(index) if as_it_is else super().square(index)

    def images(self, index: Int[np.ndarray, " rows"]) -> UInt8[Tensor, "rows 3 height width"]:
        """Return some images as RGB, in their own size."""
        raw = torch.from_numpy(self._images[index])
        if raw.ndim == 3:
            raw = raw[..., None]
        if raw.shape[3] == 4:
            alpha = raw[..., 3:].int()
            mixed = raw[..., :3].int() * alpha + 255 * (255 - alpha)
            raw = ((mixed + 127) // 255).to(torch.uint8)
        return raw.permute(0, 3, 1, 2).expand(-1, 3, -1, -1).contiguous()


def _digits(cfg: ImagesConfig) -> ArrayImages:
    """Return scikit-learn's 1,797 handwritten digits of 8 x 8 pixels."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("images digits: needs scikit-learn; pip install 'wsae[vision]'") from error
    found: Any = load_digits()
    images = np.round(found.images * (255 / 16)).astype(np.uint8)
    names = tuple(str(name) for name in found.target_names)
    return ArrayImages(images, found.target.astype(np.int64), names, "scikit-learn digits", cfg)


def _npz_images(path: Path, cfg: ImagesConfig) -> ArrayImages:
    """Return the images of an .npz file: mapped where it is stored uncompressed (np.savez), else read whole.

    Raises UserError where it is damaged, has no `images` or has ones that are not uint8, or labels that do not fit.
    """
    where = f"images {path}"
    found, there = npz_arrays(path, ("images", "labels", "names"), where)
    if "images" not in found:
        has, near = ", ".join(there) or "nothing", nearest("images", there)
        raise UserError(f"{where}: no array named images (it has: {has}); name it so{near}")
    images, names = found["images"], found.get("names", np.empty(0))
    if names.ndim != 1:
        raise UserError(f"{where}: names of shape {names.shape}; give a list, one a class")
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
    classes = _checked_labels(found.get("labels"), tuple(map(str, names)), len(images), where)
    return ArrayImages(images, *classes, sha256_file(path), cfg)


def _idx_files(folder: Path) -> dict[str, list[Path]]:
    """Return split -> the file of images and any of labels in MNIST's layout; empty where the folder has none."""
    found: dict[str, list[Path]] = {}
    for split, prefixes in _IDX_SPLITS.items():
        for prefix in prefixes:
            files = [
                next(filter(Path.is_file, (folder / f"{prefix}-{name}" for name in names)), None)
                for names in (
                    [f"{kind}{dot}idx{n}-ubyte{end}" for dot in "-." for end in ("", ".gz")]
                    for kind, n in (("images", 3), ("labels", 1))
                )
            ]
            if files[0] is not None:
                found.setdefault(split, [file for file in files if file is not None])
    return found


def _idx_images(folder: Path, files: dict[str, list[Path]], cfg: ImagesConfig) -> ArrayImages:
    """Return a split of a folder of IDX files; raises UserError where it has none, or they are damaged."""
    split = cfg.split or "train"
    if split not in files:
        raise UserError(f"images {folder}: no split {split!r}; it has {', '.join(files)}")
    path, *label_paths = files[split]
    images = _read_idx(path, 3)
    if 0 in images.shape:
        raise UserError(f"{path}: images of shape {images.shape}; there are none in it")
    labels = np.array(_read_idx(label_paths[0], 1)) if label_paths else None
    classes = _checked_labels(labels, (), len(images), f"images {folder}")
    return ArrayImages(images, *classes, digest([sha256_file(p) for p in files[split]]), cfg)


def _read_idx(path: Path, axes: int) -> np.ndarray:
    """Return the bytes of an IDX file: mapped where it is unpacked."""
    start = 4 + 4 * axes
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(start)
            if len(head) < start or [*head[:4]] != [0, 0, 8, axes]:
                raise UserError(f"{path}: not an IDX file of bytes with {axes} axes")
            shape = tuple(int(n) for n in np.frombuffer(head[4:], dtype=">u4"))
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
    return data.reshape(shape)


# Images in a column: parquet files, by row group, and hub datasets, mapped from the hub library's
# cache.


class ParquetColumn:
    """A column of parquet files, opened again in every process that reads it.

    Rows in any order are cheap while the row groups in use fit `CACHE_BYTES`; going backward in a larger row group
    reads it from its start. Raises UserError for a file without the column, and pyarrow's errors for a damaged one.
    """

    def __init__(self, files: list[Path], field: str) -> None:
        self.files, self._field, self.schema = files, field, None
        self.names: set[str] = set()
        """Of the columns of any file."""
        self.roots = tuple(dict.fromkeys(file.resolve().parent for file in files))
        """Folders in which images may lie that a cell only names."""
        self._opened: dict[int, Any] = {}
        self._cache: OrderedDict[int, Any] = OrderedDict()
        self._cursor: tuple[int, int, Any, Iterator[Any]] | None = None
        """The row group that is read forward, the first row of what is held of it, that, and the rest."""
        self._places: list[tuple[int, int, int]] = []  # file, row group, bytes
        rows = [0]
        for number, path in enumerate(files):
            file = self._open(number)
            schema = file.schema_arrow
            if field not in schema.names:
                near = nearest(field, schema.names)
                raise UserError(f"{path}: no column {field!r}{near}; see --image-field")
            self.schema = self.schema or schema
            self.names |= {*schema.names}
            for group in range(file.metadata.num_row_groups):
                # of all columns: asked for one column's, Arrow ends the process where its statistics are damaged
                record = file.metadata.row_group(group)
                self._places.append((number, group, record.total_byte_size))
                rows.append(record.num_rows)
        self._starts = np.cumsum(rows)

    def __len__(self) -> int:
        """Return the number of rows."""
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> object:
        """Return one cell as pyarrow gives it to Python."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        row, (file, group, size) = index - int(self._starts[number]), self._places[number]
        if size > CACHE_BYTES:
            return self._read_forward(number, row)
        if number not in self._cache:
            self._cache[number] = self._open(file).read_row_group(group, columns=[self._field])
            while sum(self._places[n][2] for n in self._cache) > CACHE_BYTES:
                self._cache.popitem(last=False)
        self._cache.move_to_end(number)
        return self._cache[number].column(0)[row].as_py()

    def _read_forward(self, number: int, row: int) -> object:
        """Return a cell of a row group that is not held whole: its rows are read on from the last one asked for."""
        if self._cursor is None or self._cursor[0] != number or row < self._cursor[1]:
            file, group, _ = self._places[number]
            rows = self._open(file).iter_batches(_ROWS, row_groups=[group], columns=[self._field])
            self._cursor = number, 0, next(rows), rows
        _, first, batch, rows = self._cursor
        while row >= first + len(batch):
            first, batch = first + len(batch), next(rows)
        self._cursor = number, first, batch, rows
        return batch.column(0)[row - first].as_py()

    def whole(self, name: str) -> np.ndarray:
        """Return another column whole; raises UserError for a file without it."""
        parts = []
        for number, path in enumerate(self.files):
            table = self._open(number).read([name])
            if not table.num_columns:
                raise UserError(f"{path}: no column {name!r}, which other files here have")
            parts.append(table.column(0).to_numpy())
        return np.concatenate(parts)

    def __getstate__(self) -> dict[str, Any]:
        """Leave open files and cached rows out of what another process gets."""
        return {**self.__dict__, "_opened": {}, "_cache": OrderedDict(), "_cursor": None}

    def _open(self, number: int) -> Any:
        import pyarrow.parquet as pq

        if number not in self._opened:
            for file in self._opened.values():
                file.close()
            self._opened.clear()
            self._cursor = None  # it may read from one of these
            # pages are read as they are needed, not the whole column of a row group
            self._opened[number] = pq.ParquetFile(self.files[number], buffer_size=1 << 20)
        return self._opened[number]


class HubColumn:
    """The images of a hub dataset as they are stored, in the hub library's cache."""

    def __init__(self, table: Any, field: str) -> None:
        from datasets import config
        from huggingface_hub.constants import HF_HUB_CACHE

        self._table, self._field = table, field
        places = (config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, HF_HUB_CACHE)
        self.roots = tuple(Path(place) for place in places)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> object:
        """Return bytes, or {"bytes": ..., "path": ...}."""
        return self._table[index][self._field]


class TableImages(ImageSet):
    """The images of a column, whose labels may be texts: they become the places of the sorted texts."""

    def __init__(
        self,
        cells: ParquetColumn | HubColumn,
        labels: Shaped[np.ndarray, " images"] | None,
        names: tuple[str, ...],
        where: str,
        digest: str,
        cfg: ImagesConfig,
    ) -> None:
        is_text = labels is not None and labels.dtype.kind in "OUS"
        if labels is not None and is_text and all(isinstance(label, str) for label in labels):
            found, labels = np.unique(labels.astype(str), return_inverse=True)
            names = tuple(map(str, found))
        super().__init__(
            cfg, len(cells), *_checked_labels(labels, names, len(cells), where), digest
        )
        self._cells, self._where = cells, where

    def decoded(self, index: int) -> Image.Image:
        """Return an image as RGB; raises ImageError naming the row."""
        where = f"{self._where}, row {index}"
        try:
            cell = self._cells[index]
        except MemoryError:
            raise
        except Exception as error:  # pyarrow's own, OSError, ValueError
            raise ImageError(f"{where}: cannot be read ({first_line(error)})", index) from error
        path, data = None, cell
        if isinstance(cell, Mapping):
            path, data = cell.get("path"), cell.get("bytes")
        if isinstance(data, bytes):
            return decoded(data, where, index)
        if not isinstance(path, str):
            raise ImageError(f"{where}: no image in it", index)
        for root in self._cells.roots if "\0" not in path else ():
            place = Path(os.path.realpath(root / path))
            if place.is_relative_to(os.path.realpath(root)):
                return decoded(place, f"{where} ({path})", index)
        # a table may not reach anywhere
        raise ImageError(f"{where}: names a file outside the table's folder: {path!r}", index)


def _parquet_images(path: Path, files: list[Path], cfg: ImagesConfig) -> TableImages:
    """Return the images of .parquet files, a row group or less of each in memory.

    A folder whose files are named after splits ("train-00000-of-00002.parquet") gives the one asked for. Raises
    UserError for a damaged file, a missing column (naming the nearest), or one that holds no images.
    """
    where = f"images {path}"
    with arrow_errors(where, "parquet", "vision"):
        import pyarrow as pa

        files = files if path.is_file() else _of_split(files, path, cfg.split)
        cells, labels = ParquetColumn(files, cfg.image_field), None
        assert cells.schema is not None
        if cfg.label_field in cells.names:
            labels = cells.whole(cfg.label_field)
        elif cfg.label_field != ImagesConfig().label_field:
            near = nearest(cfg.label_field, cells.names)
            raise UserError(f"{files[0]}: no column {cfg.label_field!r}{near}; see --label-field")
    if not len(cells):
        raise UserError(f"{where}: no rows in it")
    kind: Any = cells.schema.field(cfg.image_field).type
    is_struct = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
    if not (is_struct or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise UserError(
            f"{where}: column {cfg.image_field!r} holds {kind}; image files' bytes are needed, or {{bytes, path}}"
        )
    try:  # the class names that the hub's library notes
        noted = json.loads((cells.schema.metadata or {}).get(b"huggingface", b"{}"))
        names = tuple(map(str, noted["info"]["features"][cfg.label_field]["names"]))
    except (ValueError, KeyError, TypeError):
        names = ()
    return TableImages(cells, labels, names, where, digest([sha256_file(p) for p in files]), cfg)


def _of_split(files: list[Path], path: Path, split: str | None) -> list[Path]:
    """Return the files that belong to a split, where files or their folders are named after splits."""
    kinds = {}
    for file in files:
        words = [file.name.split("-")[0].split(".")[0], *file.relative_to(path).parts[:-1]]
        kinds[file] = next((word for word in words if word in SPLITS), "")
    if split is None and not any(kinds.values()):
        return files
    chosen = [file for file, kind in kinds.items() if kind == (split or "train")]
    if not chosen:
        has = ", ".join(sorted({kind for kind in kinds.values() if kind})) or "none"
        raise UserError(
            f"images {path}: no split {split or 'train'!r} among its files (it has: {has})"
        )
    return chosen


def _hub_images(cfg: ImagesConfig) -> TableImages:
    """Return the images of a hub dataset, downloaded once and mapped; no code from the hub is run.

    Raises UserError where there is no such dataset, no network, or no such column.
    """
    split = cfg.split or "train"
    with hub_dataset("images", cfg.path, split) as where:
        import datasets

        table: Any = datasets.load_dataset(cfg.path, cfg.subset, split=split)
    columns = list(table.features)
    if cfg.image_field not in columns:
        near = nearest(cfg.image_field, columns)
        raise UserError(f"{where} it has no column {cfg.image_field!r}{near}; see --image-field")
    names, labels = (), None
    if cfg.label_field in columns:
        names = tuple(getattr(table.features[cfg.label_field], "names", None) or ())
        labels = np.asarray(table.data.column(cfg.label_field).to_numpy())
    raw = table.select_columns([cfg.image_field]).cast_column(
        cfg.image_field, datasets.Image(decode=False)
    )
    # the library's fingerprint names the data's revision and every change to it
    revision = getattr(table, "_fingerprint", len(table))
    name = digest([cfg.path, cfg.subset, split, cfg.image_field, cfg.label_field, revision])
    cells = HubColumn(raw, cfg.image_field)
    return TableImages(cells, labels, names, f"images {cfg.path}", name, cfg)
