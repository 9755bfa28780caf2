"""Cells of one column of parquet files at any row, a bounded part of it in memory."""

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from wsae.core.errors import UserError, nearest

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
