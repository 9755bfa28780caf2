"""Columns of files: records of Parquet, Arrow (a few rows at a time), CSV and hub datasets; numbers of Arrow."""

import contextlib
import csv
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from wsae.core.errors import UserError, first_line, nearest
from wsae.core.hub import hub_dataset

if TYPE_CHECKING:
    import pyarrow as pa

# A field is a key, or keys joined by dots for what lies deeper ("data.text", "choices.0.text").

NULL, NO_FIELD = "null", "without the field"
"""Reasons to leave a record out."""
NO_TEXT_PARTS = "read without its parts that are no text"
"""What is told of a conversation with pictures or calls of tools in it."""
LOOK = 1000
"""A file of which none of the first records has the field is not the one that was meant."""
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
_MASK = "attention_mask"
_MISSING = object()


class LabelColumn(str):
    """A field that holds a label: numbers and truth values are read as they are written."""

    __slots__ = ()


class Turn(NamedTuple):
    """One turn of a conversation."""

    role: str
    content: str


def as_lines(messages: Sequence[Turn]) -> str:
    """Return a conversation as a line "role: content" a turn."""
    return "\n".join(f"{message.role}: {message.content}" for message in messages)


def turns_in(
    text: str, messages: Sequence[Turn], render: Callable[[Sequence[Turn]], str | None]
) -> list[slice] | None:
    """Return where the words of each turn stand in the text that `render` makes of a conversation.

    The same conversation with a mark for every turn's words shows what stands between them. Empty where a turn is left
    out; none where turns stand twice, or the template writes something else for other words.
    """
    marks = [f"wsae{number}turn{number}" for number in range(len(messages))]
    marked = render(
        [turn._replace(content=mark) for turn, mark in zip(messages, marks, strict=True)]
    )
    if marked is None or any(marked.count(mark) > 1 for mark in marks):
        return None
    order = sorted((marked.index(mark), i) for i, mark in enumerate(marks) if mark in marked)
    ends = [at + len(marks[i]) for at, i in order]
    between = [
        marked[a:b] for a, b in zip([0, *ends], [*(at for at, _ in order), None], strict=True)
    ]
    found = [slice(0, 0)] * len(messages)
    if not text.startswith(between[0]):
        return None
    at = len(between[0])
    for (_, i), after in zip(order, between[1:], strict=True):
        last = i == order[-1][1]
        words = messages[i].content
        exact = (at + len(w) for w in (words, words.strip()) if text.startswith(w + after, at))
        stop = len(text) - len(after) if last else next(exact, text.find(after, at))
        if stop < at or not text.startswith(after, stop):
            return None
        found[i] = slice(at, stop)
        at = stop + len(after)
    return found


class Content(NamedTuple):
    """What a record says. With `ids` the text is empty; a conversation's `text` has a line "role: content" a turn."""

    text: str
    ids: np.ndarray | None = None
    messages: tuple[Turn, ...] = ()
    note: str = ""
    """What of it was not read."""


class LeftOut(NamedTuple):
    """A record that is not read, and why."""

    reason: str


Record = Content | LeftOut


class NoField(UserError):
    """A file in which no record has the field."""


def read_row(row: Mapping[str, object], field: str, where: str) -> Record:
    """Return what a record says in its field; raises UserError beginning with `where` when that is no text."""
    value = _value(row, field)
    if value is _MISSING:
        return LeftOut(NO_FIELD)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return LeftOut(NULL)
    if isinstance(field, LabelColumn) and isinstance(value, bool | int | float):
        value = str(value)
    if isinstance(value, str):
        return Content(whole_text(value, where))
    if isinstance(value, list):
        return _listed(value, row, field, where)
    within = ""
    if isinstance(value, Mapping):
        within = f"; name a key in it: --field {field}.{next(iter(value), 'KEY')}"
    raise UserError(f"{where}: field {field!r} is a {type(value).__name__}, not text{within}")


def whole_text(text: str, where: str) -> str:
    """Return the text; raises UserError when half a character is in it."""
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"{where}: holds half a character (a lone surrogate); fix or remove the record"
            ) from error
    return text


def with_field(records: Iterator[Record], missing: Callable[[], NoField]) -> Iterator[Record]:
    """Yield a file's records; raises what `missing` returns when none of the first `LOOK`, or of all, has the field."""
    waiting = 0
    for record in records:
        if record != LeftOut(NO_FIELD):
            yield from repeat(LeftOut(NO_FIELD), waiting)
            yield record
            yield from records
            return
        waiting += 1
        if waiting == LOOK:
            break
    if waiting:
        raise missing()


def no_field(where: str, field: str, names: Mapping[str, bool], kind: str = "field") -> NoField:
    """Return the error for a file without the field; `names` of what it has: whether that could be read."""
    could = [name for name, readable in names.items() if readable]
    has = f" (it has: {', '.join(names) or 'none'})"
    near = nearest(field, names)
    advice = f"give --field {could[0]}" if len(could) == 1 else "see --field"
    advice = "see --label" if isinstance(field, LabelColumn) else advice
    return NoField(f"{where}: no {kind} {field!r}{near or has}; {advice}")


def readable(value: Any) -> bool:
    """Return whether a value could be what --field names: text, or a conversation."""
    is_talk = isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)
    return isinstance(value, str) or (is_talk and _role(value[0]) is not None)


def _value(row: Mapping[str, object], field: str) -> object:
    if field in row:
        return row[field]
    at: Any = row
    for name in field.split("."):
        if isinstance(at, Mapping) and name in at:
            at = at[name]
        elif isinstance(at, list) and name.isdecimal() and int(name) < len(at):
            at = at[int(name)]
        else:
            return None if at is None else _MISSING
    return at


def _listed(value: list, row: Mapping[str, object], field: str, where: str) -> Content:
    kinds = {type(item) for item in value}
    if kinds <= {str}:
        return Content(whole_text("\n".join(value), where))
    if kinds <= {int}:
        beside = ".".join([*field.split(".")[:-1], _MASK])  # the mask that goes with the ids
        return Content("", ids=_ids(value, _value(row, beside), where))
    if kinds <= {dict}:
        return _conversation(value, field, where)
    names = ", ".join(sorted(kind.__name__ for kind in kinds))
    raise UserError(
        f"{where}: field {field!r} is a list of {names}; a list is read of text, of messages or of token ids"
    )


def _ids(value: list[int], mask: object, where: str) -> np.ndarray:
    low, high = min(value), max(value)
    if low < 0 or high >= 1 << 31:
        raise UserError(
            f"{where}: token id {low if low < 0 else high}, and ids are not negative (labels instead of input_ids?)"
        )
    ids = np.array(value, dtype=np.int32)
    if not isinstance(mask, list):
        return ids
    if len(mask) != len(ids) or not {*mask} <= {0, 1}:
        raise UserError(f"{where}: {_MASK} is not {len(ids)} times 0 or 1, as there are token ids")
    return ids[np.array(mask, dtype=bool)]


def _role(message: Mapping[str, object]) -> str | None:
    """Return who speaks, or None where the keys are not those of a message."""
    if not ("content" in message or "value" in message):
        return None
    role = message.get("role", message.get("from"))
    return _ROLES.get(role.lower(), role) if isinstance(role, str) else None


def _conversation(value: list[dict[str, object]], field: str, where: str) -> Content:
    messages, whole = [], True
    for turn in value:
        role = _role(turn)
        if role is None:
            raise UserError(
                f"{where}: field {field!r} is a list of objects with {', '.join(map(str, turn)) or 'nothing'}; "
                "messages have role and content, or from and value"
            )
        content = turn.get("content", turn.get("value"))
        parts = [content] if isinstance(content, str) else content or []
        if not isinstance(parts, list):
            raise UserError(f"{where}: a message whose content is a {type(content).__name__}")
        texts = [t for part in parts if (t := _part(part)) is not None]
        whole &= len(texts) == len(parts) and not turn.get("tool_calls")
        messages.append(Turn(role, whole_text("\n".join(texts), where)))
    return Content(
        as_lines(messages), messages=tuple(messages), note="" if whole else NO_TEXT_PARTS
    )


def _part(part: object) -> str | None:
    """Return the text of a part of a message; None for pictures and the like."""
    found = part.get("text") if isinstance(part, Mapping) else part
    return found if isinstance(found, str) else None


_BATCH_ROWS, _BATCH_BYTES = 16, 1 << 27
"""Rows read at once, and fewer where the largest possible value would make them more than so many bytes."""
_LONGEST = 1 << 24
"""Characters of a CSV row at most."""
_MOST_FIELDS = 1 << 20


@contextlib.contextmanager
def arrow_errors(where: str, kind: str, extra: str = "lm") -> Iterator[None]:
    """Turn what Arrow raises in the block, for a damaged file or where it is not installed, into a UserError."""
    if find_spec("pyarrow") is None:
        raise UserError(f"{where}: {kind} needs pyarrow; pip install 'wsae[{extra}]'")
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # Arrow's own, OSError, UnicodeDecodeError, ...
        raise UserError(f"{where}: not a readable {kind} file ({first_line(error)})") from error


def parquet_records(path: Path, field: str) -> Iterator[Record]:
    """Yield the column `field` of a parquet file, a few rows in memory at a time."""
    where = f"text {path}"
    with arrow_errors(where, "parquet"):
        import pyarrow.parquet as pq

        # pages are read as they are needed, not the whole column of a row group
        with pq.ParquetFile(path, buffer_size=1 << 20) as file:
            columns = _columns(file.schema_arrow, where, field)
            row = 0
            for group in range(file.metadata.num_row_groups):
                # of all columns: asked for one column's, Arrow ends the process where its statistics are damaged
                held = max(1, file.metadata.row_group(group).total_byte_size)
                # a value that stands once in the file may be said in every row
                size = max(1, min(_BATCH_ROWS, _BATCH_BYTES // held))
                for batch in file.iter_batches(size, row_groups=[group], columns=columns):
                    yield from _batch_records(batch, field, where, row)
                    row += batch.num_rows


def arrow_records(path: Path, field: str) -> Iterator[Record]:
    """Yield the column `field` of an Arrow file or stream (`save_to_disk`, the hub's cache), a few rows at a time."""
    where = f"text {path}"

    def names(schema: "pa.Schema") -> list[str]:
        return list(dict.fromkeys(name.split(".")[0] for name in _columns(schema, where, field)))

    with arrow_errors(where, "Arrow"):
        row = 0
        for batch in arrow_batches(path, names):
            for start in range(0, batch.num_rows, _BATCH_ROWS):
                part = batch.slice(start, _BATCH_ROWS)
                yield from _batch_records(part, field, where, row)
                row += part.num_rows


def arrow_batches(
    path: Path, names: Callable[["pa.Schema"], list[str]]
) -> Iterator["pa.RecordBatch"]:
    """Yield the batches of an Arrow file or stream, mapped, with the columns that `names` chooses of its schema."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        reader: Any = (pa.ipc.open_file if is_file else pa.ipc.open_stream)(source)
        numbers = range(reader.num_record_batches) if is_file else ()
        for batch in map(reader.get_batch, numbers) if is_file else reader:
            chosen = batch.select(names(reader.schema))
            chosen.validate(full=True)  # a damaged one would end the process
            yield chosen


def arrow_matrices(path: Path) -> dict[str, list[np.ndarray]]:
    """Return the columns of floating-point lists of an Arrow file, an array for each batch that looks into the file."""
    found: dict[str, list[np.ndarray]] = {}
    with arrow_errors(str(path), "Arrow"):
        for batch in filter(len, arrow_batches(path, _of_numbers)):
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                found.setdefault(name, []).append(_unpacked(column, f"{path}: column {name}"))
    return found


def _of_numbers(schema: "pa.Schema") -> list[str]:
    """Return the columns whose cells are lists, or lists of lists, of floating-point numbers."""
    from pyarrow import types

    names = []
    for column in schema:
        kind = getattr(column.type, "storage_type", column.type)  # of a type with a name
        while (within := getattr(kind, "value_type", None)) is not None:
            kind = within
        if types.is_floating(kind):
            names.append(str(column.name))
    return names


def _unpacked(column: Any, where: str) -> np.ndarray:
    """Return a column's numbers as an array that looks into the file."""
    from pyarrow.compute import call_function

    column, shape = getattr(column, "storage", column), [len(column)]
    while hasattr(column.type, "value_type"):
        lengths = set(call_function("list_value_length", [column]).unique().to_pylist())
        if len(lengths) != 1 or None in lengths:
            raise UserError(f"{where}: lists of several lengths, or none; rows need one width")
        shape.append(lengths.pop())
        column = column.flatten()
    return column.to_numpy(zero_copy_only=True).reshape(shape)


def _columns(schema: "pa.Schema", where: str, field: str) -> list[str]:
    """Return the columns to read; raises NoField when there is none of that name."""
    import pyarrow as pa

    names = [str(name) for name in schema.names]
    if field in names:
        return [field, _MASK] if _MASK in names and "." not in field else [field]
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


def csv_records(read: Callable[[int], str], where: str, field: str, tabs: bool) -> Iterator[Record]:
    """Yield the column `field` of a table with a header; cells may go on over lines within quotes.

    `read` returns the next line, or so many characters of it.
    """
    csv.field_size_limit(_LONGEST)
    held, number = 0, 0
    """Characters of the row so far, and lines of the file."""

    def lines() -> Iterator[str]:
        nonlocal held, number
        while line := read(_LONGEST + 1):
            number += 1
            held += len(line)
            marks = max(line.count(sign) for sign in ",;\t|") if len(line) > _MOST_FIELDS else 0
            if held > _LONGEST or marks > _MOST_FIELDS:
                raise UserError(
                    f"{where}, line {number}: a row of over {_LONGEST:,} characters, or {_MOST_FIELDS:,} "
                    "cells; is a quote left open?"
                )
            yield line

    source = lines()
    names, delimiter = _header(next(source, ""), field, tabs)
    if field not in names:
        raise no_field(where, field, dict.fromkeys(names, len(names) == 1), "column")
    place = names.index(field)
    try:
        for row in csv.reader(source, delimiter=delimiter, strict=True):
            held = 0
            if len(row) > place:
                yield read_row({field: row[place]}, field, f"{where}, line {number}")
            elif row:
                yield LeftOut(NULL)
    except csv.Error as error:
        raise UserError(
            f"{where}, line {number}: not CSV ({first_line(error)}); fix or remove the row"
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


def hub_records(name: str, subset: str | None, split: str, field: str) -> Iterator[Record]:
    """Yield the column `field` of a hub dataset, streamed; no code from the hub is run."""
    with hub_dataset("text", name, split) as where:
        from datasets import load_dataset

        rows = iter(load_dataset(name, subset, split=split, streaming=True))
        first = next(rows, None)

    def missing() -> NoField:
        names = {str(key): isinstance(value, str) for key, value in (first or {}).items()}
        return no_field(f"{where} it can be read, but", field, names, "column")

    found = enumerate(chain([] if first is None else [first], rows))
    return with_field(
        (read_row(row, field, f"text {name}, row {number}") for number, row in found), missing
    )
