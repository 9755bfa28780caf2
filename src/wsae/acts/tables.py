"""Texts from columns: parquet files (by row group) and hub datasets (streamed)."""

from collections.abc import Iterator
from pathlib import Path

from wsae.core.errors import UserError, nearest
from wsae.core.hub import hub_reachable, quiet_hub

_BATCH_ROWS = 256


def parquet_texts(path: Path, field: str) -> Iterator[str]:
    """Yield the column `field` of a parquet file, a few rows in memory at a time."""
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError(f"text {path}: parquet needs pyarrow; pip install 'wsae[lm]'") from error
    try:
        with pq.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if field not in columns:
                raise UserError(
                    f"text {path}: no column {field!r}{nearest(field, columns)}; see --field"
                )
            row = 0
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=[field]):
                for value in batch.column(0).to_pylist():
                    yield _checked(value, field, f"text {path}, row {row}")
                    row += 1
    except (UserError, MemoryError):
        raise
    except Exception as error:  # Arrow's own, OSError, UnicodeDecodeError, ...
        raise UserError(f"text {path}: not a readable parquet file ({_first(error)})") from error


def hub_texts(name: str, subset: str | None, split: str, field: str) -> Iterator[str]:
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
    number = 0
    while first is not None:
        if field not in first:
            raise UserError(
                f"{where} it has no column {field!r}{nearest(field, first)}; see --field"
            )
        yield _checked(first[field], field, f"text {name}, row {number}")
        first = next(rows, None)
        number += 1


def _checked(value: object, field: str, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: field {field!r} is {type(value).__name__}, not text")
    return value


def _first(error: BaseException) -> str:
    return (str(error).splitlines() or ["no reason given"])[0]
