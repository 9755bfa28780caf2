"""Images in a column: parquet files (by row group) and hub datasets (mapped from the hub library's cache)."""

import json
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int
from PIL import Image

from wsae.acts.images.arrays import checked_labels
from wsae.acts.images.config import ImagesConfig
from wsae.acts.images.folders import SPLITS
from wsae.acts.images.pixels import DecodedImages, ImageError, decoded
from wsae.core.errors import UserError, first_line, nearest
from wsae.core.files import digest, sha256_file
from wsae.core.hub import hub_reachable, quiet_hub

# Cells of one column of parquet files at any row, a bounded part of it in memory.

CACHE_BYTES = 256 << 20
"""Row groups kept after use; one that is larger is read forward a few rows at a time."""
_ROWS = 32


class Groups:
    """A column of parquet files, opened again in every process that reads it.

    Rows in any order are cheap while the row groups in use fit `CACHE_BYTES`; going backward in a larger row group
    reads it from its start. Raises UserError for a file without the column, and pyarrow's errors for a damaged one.
    """

    def __init__(self, files: list[Path], field: str) -> None:
        self.files, self._field = files, field
        self.roots = tuple(dict.fromkeys(file.resolve().parent for file in files))
        self._starts: list[int] = []
        self._places: list[tuple[int, int, int]] = []  # file, row group, bytes
        self._rows, self.columns = 0, []
        self.metadata: dict[str, str] = {}
        for number in range(len(files)):
            self._note(number)
        self._first = np.array(self._starts, dtype=np.int64)
        self._forget()

    def __len__(self) -> int:
        """Return the number of rows."""
        return self._rows

    def __getitem__(self, index: int) -> object:
        """Return one cell as pyarrow gives it to Python."""
        number = int(np.searchsorted(self._first, index, side="right")) - 1
        return self._cell(number, index - self._starts[number]).as_py()

    def column(self, name: str) -> np.ndarray:
        """Return another column whole."""
        parts = [self._open(n).read([name]).column(0).to_numpy() for n in range(len(self.files))]
        return np.concatenate(parts) if parts else np.empty(0)

    def kind(self, name: str) -> str:
        """Return "bytes", "struct" or the name of a column's type."""
        import pyarrow as pa

        kind = self._open(0).schema_arrow.field(name).type
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            return "bytes"
        is_image = pa.types.is_struct(kind) and "bytes" in [field.name for field in kind]
        return "struct" if is_image else str(kind)

    def __getstate__(self) -> dict[str, Any]:
        """Leave open files and cached rows out of what another process gets."""
        return {**self.__dict__, "_opened": {}, "_cache": OrderedDict(), "_cursor": None}

    def _note(self, number: int) -> None:
        import pyarrow.parquet as pq

        with pq.ParquetFile(self.files[number]) as file:
            columns = file.schema_arrow.names
            if self._field not in columns:
                raise UserError(
                    f"{self.files[number]}: no column {self._field!r}{nearest(self._field, columns)}; see --image-field"
                )
            self.columns = self.columns or columns
            meta = file.schema_arrow.metadata or {}
            self.metadata = self.metadata or {
                key.decode(): value.decode("utf-8", "replace") for key, value in meta.items()
            }
            for group in range(file.metadata.num_row_groups):
                # of all columns: asked for one column's, Arrow ends the process where its statistics are damaged
                record = file.metadata.row_group(group)
                self._starts.append(self._rows)
                self._places.append((number, group, record.total_byte_size))
                self._rows += record.num_rows

    def _forget(self) -> None:
        self._opened: dict[int, Any] = {}
        self._cache: OrderedDict[int, Any] = OrderedDict()
        self._cursor: _Cursor | None = None

    def _open(self, number: int) -> Any:
        import pyarrow.parquet as pq

        if number not in self._opened:
            for file in self._opened.values():
                file.close()
            self._cursor = None  # it may read from one of these
            # pages are read as they are needed, not the whole column of a row group
            self._opened = {number: pq.ParquetFile(self.files[number], buffer_size=1 << 20)}
        return self._opened[number]

    def _cell(self, number: int, row: int) -> Any:
        file, group, size = self._places[number]
        if size > CACHE_BYTES:
            return self._streamed(number, row)
        if number not in self._cache:
            self._cache[number] = self._open(file).read_row_group(group, columns=[self._field])
            while sum(self._places[n][2] for n in self._cache) > CACHE_BYTES:
                self._cache.popitem(last=False)
        self._cache.move_to_end(number)
        return self._cache[number].column(0)[row]

    def _streamed(self, number: int, row: int) -> Any:
        file, group, _ = self._places[number]
        if self._cursor is None or not self._cursor.reaches(number, row):
            rows = self._open(file).iter_batches(
                batch_size=_ROWS, row_groups=[group], columns=[self._field]
            )
            self._cursor = _Cursor(number, rows)
        return self._cursor.cell(row)


class _Cursor:
    """A place in one row group that only moves forward."""

    def __init__(self, number: int, batches: Iterator[Any]) -> None:
        self._number, self._batches = number, batches
        self._first, self._batch = 0, None

    def reaches(self, number: int, row: int) -> bool:
        return number == self._number and row >= self._first

    def cell(self, row: int) -> Any:
        while self._batch is None or row >= self._first + len(self._batch):
            self._first += 0 if self._batch is None else len(self._batch)
            self._batch = next(self._batches)
        return self._batch.column(0)[row - self._first]


@runtime_checkable
class Cells(Protocol):
    """A column of images as they are stored."""

    roots: tuple[Path, ...]
    """Folders in which images may lie that a cell only names."""

    def __len__(self) -> int:
        """Return how many there are."""
        ...

    def __getitem__(self, index: int) -> object:
        """Return bytes, or {"bytes": ..., "path": ...} as the hub's library stores an image."""
        ...


class TableImages(DecodedImages):
    """The images of a column."""

    def __init__(
        self,
        cells: Cells,
        labels: Int[np.ndarray, " images"] | None,
        names: tuple[str, ...],
        where: str,
        digest: str,
        cfg: ImagesConfig,
    ) -> None:
        self._cells, self._where, self._digest, self.cfg = cells, where, digest, cfg
        self.labels, self.names = labels, names

    def __len__(self) -> int:
        """Return how many images there are."""
        return len(self._cells)

    def digest(self) -> str:
        """Return a hash of what the images are."""
        return self._digest

    def decoded(self, index: int) -> Image.Image:
        """Return an image as RGB; raises ImageError naming the row."""
        where = f"{self._where}, row {index}"
        try:
            cell = self._cells[index]
        except MemoryError:
            raise
        except Exception as error:  # pyarrow's own, OSError, ValueError
            raise ImageError(f"{where}: cannot be read ({first_line(error)})", index) from error
        path = cell.get("path") if isinstance(cell, Mapping) else None
        data = cell.get("bytes") if isinstance(cell, Mapping) else cell
        if isinstance(data, bytes):
            return decoded(data, where, index)
        if isinstance(path, str):
            return decoded(self._inside(path, where, index), f"{where} ({path})", index)
        raise ImageError(f"{where}: no image in it", index)

    def _inside(self, path: str, where: str, index: int) -> Path:
        """Return the file that a cell names; raises ImageError when it lies outside: a table may not reach anywhere."""
        roots = self._cells.roots
        places = [Path(os.path.realpath(root / path)) for root in roots if "\0" not in path]
        for root, place in zip(roots, places, strict=False):
            if place.is_relative_to(os.path.realpath(root)):
                return place
        raise ImageError(f"{where}: names a file outside the table's folder: {path!r}", index)


def parquet_files(path: Path) -> list[Path]:
    """Return a .parquet file, or those of a folder at any depth, sorted; empty where there are none."""
    if path.is_file():
        return [path] if path.suffix.lower() == ".parquet" else []
    return sorted(p for p in path.rglob("*.parquet") if not p.name.startswith("."))


def parquet_images(path: Path, cfg: ImagesConfig) -> TableImages:
    """Return the images of .parquet files, a row group or less of each in memory.

    A folder whose files are named after splits ("train-00000-of-00002.parquet") gives the one asked for. Raises
    UserError for a damaged file, a missing column (naming the nearest), or one that holds no images.
    """
    if find_spec("pyarrow") is None:
        raise UserError(f"images {path}: parquet needs pyarrow; pip install 'wsae[vision]'")
    files = _of_split(parquet_files(path), path, cfg.split)
    try:
        groups = Groups(files, cfg.image_field)
        labels = _labels(groups, cfg)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # Arrow's own, OSError, UnicodeDecodeError, ...
        raise UserError(
            f"images {path}: not a readable parquet file ({first_line(error)})"
        ) from error
    if not len(groups):
        raise UserError(f"images {path}: no rows in it")
    _check_kind(groups, path, cfg.image_field)
    where = f"images {path}"
    names = _class_names(groups.metadata.get("huggingface"), cfg.label_field)
    labels, names = checked_labels(*_numbered(labels, names), len(groups), where)
    return TableImages(groups, labels, names, where, digest([sha256_file(p) for p in files]), cfg)


def hub_images(cfg: ImagesConfig) -> TableImages:
    """Return the images of a hub dataset, downloaded once and mapped; no code from the hub is run.

    Raises UserError where there is no such dataset, no network, or no such column.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"images {cfg.path}: a hub dataset needs datasets; pip install 'wsae[hub]'"
        ) from error
    split = cfg.split or "train"
    where = f"images {cfg.path}: no such file here, and as a hub dataset (split {split!r})"
    if not hub_reachable():
        raise UserError(f"{where} it cannot be read: there is no network")
    try:
        with quiet_hub():
            table: Any = datasets.load_dataset(cfg.path, cfg.subset, split=split)
    except Exception as error:  # the library raises its own, httpx's, OSError and ValueError
        raise UserError(
            f"{where} it cannot be read ({type(error).__name__}: {first_line(error)})"
        ) from error
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
    labels, names = checked_labels(*_numbered(labels, names), len(raw), f"images {cfg.path}")
    # the library's fingerprint names the data's revision and every change to it
    revision = getattr(table, "_fingerprint", len(table))
    name = digest([cfg.path, cfg.subset, split, cfg.image_field, cfg.label_field, revision])
    return TableImages(
        _Column(raw, cfg.image_field), labels, names, f"images {cfg.path}", name, cfg
    )


class _Column:
    def __init__(self, table: Any, field: str) -> None:
        from datasets import config
        from huggingface_hub.constants import HF_HUB_CACHE

        self._table, self._field = table, field
        places = (config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, HF_HUB_CACHE)
        self.roots = tuple(Path(place) for place in places)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> object:
        return self._table[index][self._field]


def _of_split(files: list[Path], path: Path, split: str | None) -> list[Path]:
    """Return the files that belong to a split, where files or their folders are named after splits."""
    kinds = {p: _kind(p, path) for p in files}
    if path.is_file() or (split is None and not any(kinds.values())):
        return files
    chosen = [p for p in files if kinds[p] == (split or "train")]
    if not chosen:
        has = ", ".join(sorted({kind for kind in kinds.values() if kind})) or "none"
        raise UserError(
            f"images {path}: no split {split or 'train'!r} among its files (it has: {has})"
        )
    return chosen


def _kind(file: Path, root: Path) -> str:
    words = [file.name.split("-")[0].split(".")[0], *file.relative_to(root).parts[:-1]]
    return next((word for word in words if word in SPLITS), "")


def _labels(groups: Groups, cfg: ImagesConfig) -> np.ndarray | None:
    if cfg.label_field not in groups.columns:
        if cfg.label_field != ImagesConfig().label_field:
            near = nearest(cfg.label_field, groups.columns)
            raise UserError(
                f"{groups.files[0]}: no column {cfg.label_field!r}{near}; see --label-field"
            )
        return None
    return groups.column(cfg.label_field)


def _numbered(
    labels: np.ndarray | None, names: tuple[str, ...]
) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Return labels as numbers: those that are text become the places of the sorted texts."""
    if (
        labels is None
        or labels.dtype.kind not in "OUS"
        or not all(isinstance(x, str) for x in labels)
    ):
        return labels, names
    found, numbers = np.unique(labels.astype(str), return_inverse=True)
    return numbers.astype(np.int64), tuple(str(name) for name in found)


def _class_names(metadata: str | None, field: str) -> tuple[str, ...]:
    """Return the class names that the hub's library notes in a parquet file's metadata."""
    try:
        feature = json.loads(metadata or "{}")["info"]["features"][field]
        return tuple(str(name) for name in feature["names"])
    except (ValueError, KeyError, TypeError):
        return ()


def _check_kind(groups: Groups, path: Path, field: str) -> None:
    kind = groups.kind(field)
    if kind not in ("bytes", "struct"):
        raise UserError(
            f"images {path}: column {field!r} holds {kind}; image files' bytes are needed, or {{bytes, path}}"
        )
