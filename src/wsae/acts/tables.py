"""Records from columns: parquet and Arrow files (a few rows at a time), CSV, and hub datasets (streamed)."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsae.acts.rows import NULL, LeftOut, Record, mask_beside, no_field, read_row, with_field
from wsae.core.errors import UserError
from wsae.core.hub import hub_reachable, quiet_hub

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH_ROWS, _BATCH_BYTES = 16, 1 << 27
"""Rows read at once, and fewer where the largest possible value would make them more than so many bytes."""
_LONGEST = 1 << 24
"""Characters of a CSV row at most."""
_MOST_FIELDS = 1 << 20


def parquet_records(path: Path, field: str) -> Iterator[Record]:
    """Yield the column `field` of a parquet file, a few rows in memory at a time."""
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError(f"text {path}: parquet needs pyarrow; pip install 'wsae[lm]'") from error
    try:
        # pages are read as they are needed, not the whole column of a row group
        with pq.ParquetFile(path, buffer_size=1 << 20) as file:
            columns = _columns(file.schema_arrow, f"text {path}", field)
            row = 0
            for group in range(file.metadata.num_row_groups):
                # of all columns: asked for one column's, Arrow ends the process where its statistics are damaged
                held = max(1, file.metadata.row_group(group).total_byte_size)
                # a value that stands once in the file may be said in every row
                size = max(1, min(_BATCH_ROWS, _BATCH_BYTES // held))
                for batch in file.iter_batches(size, row_groups=[group], columns=columns):
                    yield from _batch_records(batch, field, f"text {path}", row)
                    row += batch.num_rows
    except (UserError, MemoryError):
        raise
    except Exception as error:  # Arrow's own, OSError, UnicodeDecodeError, ...
        raise UserError(f"text {path}: not a readable parquet file ({_first(error)})") from error


def arrow_records(path: Path, field: str) -> Iterator[Record]:
    """Yield the column `field` of an Arrow file or stream (`save_to_disk`, the hub's cache), a few rows at a time."""
    try:
        import pyarrow as pa
    except ImportError as error:
        raise UserError(f"text {path}: Arrow needs pyarrow; pip install 'wsae[lm]'") from error
    try:
        with pa.memory_map(str(path)) as source:
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            reader = (pa.ipc.open_file if is_file else pa.ipc.open_stream)(source)
            columns = _columns(reader.schema, f"text {path}", field)
            names = [name.split(".")[0] for name in columns]
            batches = (
                (reader.get_batch(i) for i in range(reader.num_record_batches))
                if is_file
                else iter(reader)
            )
            row = 0
            for batch in batches:
                chosen = batch.select([*dict.fromkeys(names)])
                chosen.validate(full=True)  # a damaged one would end the process
                for start in range(0, chosen.num_rows, _BATCH_ROWS):
                    part = chosen.slice(start, _BATCH_ROWS)
                    yield from _batch_records(part, field, f"text {path}", row)
                    row += part.num_rows
    except (UserError, MemoryError):
        raise
    except Exception as error:  # Arrow's own, OSError, ...
        raise UserError(f"text {path}: not a readable Arrow file ({_first(error)})") from error


def _columns(schema: "pa.Schema", where: str, field: str) -> list[str]:
    """Return the columns to read; raises NoField when there is none of that name."""
    import pyarrow as pa

    names = [str(name) for name in schema.names]
    if field in names:
        return [field, *mask_beside(field, names)]
    at, *deeper = field.split(".")
    if at not in names or not deeper:
        texts = {
            name: pa.types.is_string(kind) or pa.types.is_large_string(kind)
            for name, kind in zip(names, schema.types, strict=True)
        }
        raise no_field(where, field, texts, "column")
    kind = schema.field(at).type
    for name in deeper:
        if not pa.types.is_struct(kind) or kind.get_field_index(name) < 0:
            return [at]
        kind = kind.field(name).type
    return [field]


def _batch_records(batch: Any, field: str, where: str, first: int) -> Iterator[Record]:
    """Yield a batch's records, each turned into Python's own when it is its turn."""
    columns = {str(name): batch.column(i) for i, name in enumerate(batch.schema.names)}
    for i in range(batch.num_rows):
        row = {name: column[i].as_py() for name, column in columns.items()}
        yield read_row(row, field, f"{where}, row {first + i}")


def csv_records(lines: io.TextIOBase, where: str, field: str, tabs: bool) -> Iterator[Record]:
    """Yield the column `field` of a table with a header; cells may go on over lines within quotes."""
    csv.field_size_limit(_LONGEST)
    source = _CsvLines(lines, where)
    header = next(iter(source), "")
    names, delimiter = _header(header, field, tabs)
    if field not in names:
        raise no_field(where, field, dict.fromkeys(names, len(names) == 1), "column")
    place = names.index(field)
    rows = csv.reader(source, delimiter=delimiter, strict=True)
    try:
        for row in rows:
            at = f"{where}, line {rows.line_num + 1}"
            source.held = 0
            if len(row) > place:
                yield read_row({field: row[place]}, field, at)
            elif row:
                yield LeftOut(NULL)
    except csv.Error as error:
        raise UserError(
            f"{where}, line {rows.line_num + 1}: not CSV ({_first(error)}); fix or remove the row"
        ) from error


def _header(line: str, field: str, tabs: bool) -> tuple[list[str], str]:
    """Return the names of the columns and what stands between them: what the suffix says, or what fits the header."""
    usual = "\t" if tabs else ","
    found = {}
    for delimiter in dict.fromkeys([usual, ",", ";", "\t", "|"]):
        names = next(csv.reader([line], delimiter=delimiter), [])
        found[delimiter] = [name.strip() for name in names]
        if field in found[delimiter]:
            return found[delimiter], delimiter
    return found[usual], usual


class _CsvLines:
    """Lines of a table, none of them longer than a row may be, nor all that make a row."""

    def __init__(self, lines: io.TextIOBase, where: str) -> None:
        self._lines, self._where = lines, where
        self.held, self._number = 0, 0

    def __iter__(self) -> Iterator[str]:
        while line := self._lines.readline(_LONGEST + 1):
            self._number += 1
            self.held += len(line)
            marks = max(line.count(sign) for sign in ",;\t|") if len(line) > _MOST_FIELDS else 0
            if self.held > _LONGEST or marks > _MOST_FIELDS:
                raise UserError(
                    f"{self._where}, line {self._number}: a row of over {_LONGEST:,} characters, or {_MOST_FIELDS:,} "
                    "cells; is a quote left open?"
                )
            yield line


def hub_records(name: str, subset: str | None, split: str, field: str) -> Iterator[Record]:
    """Yield the column `field` of a hub dataset, streamed; no code from the hub is run."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError(
            f"text {name}: a hub dataset needs datasets; pip install 'wsae[hub]'"
        ) from error
    where = f"text {name}: no such file here, and as a hub dataset (split {split!r})"
    if not hub_reachable():
        raise UserError(f"{where} it cannot be read: there is no network")
    try:
        with quiet_hub():
            rows = iter(load_dataset(name, subset, split=split, streaming=True))
            first = next(rows, None)
    except (
        Exception
    ) as error:  # the library raises its own, requests', httpx's, OSError and ValueError
        raise UserError(
            f"{where} it cannot be read ({type(error).__name__}: {_first(error)})"
        ) from error

    def read() -> Iterator[Record]:
        row, number = first, 0
        while row is not None:
            yield read_row(row, field, f"text {name}, row {number}")
            row = next(rows, None)
            number += 1

    def missing():
        names = {str(key): isinstance(value, str) for key, value in (first or {}).items()}
        return no_field(f"{where} it can be read, but", field, names, "column")

    return with_field(read(), missing)


def _first(error: BaseException) -> str:
    return (str(error).splitlines() or ["no reason given"])[0]
