"""One file to records: unpacked, in UTF-8, as lines or values of JSON, rows of a table, or plain text cut into pieces.

The content of a file decides where its name says another thing. Memory does not grow with a file: what is unpacked is
read a little at a time, and no single record may be larger than `LONGEST`.
"""

import bz2
import codecs
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from wsae.acts.tables import (
    Content,
    Record,
    arrow_records,
    csv_records,
    no_field,
    parquet_records,
    read_row,
    readable,
    with_field,
)
from wsae.core.errors import UserError, first_line
from wsae.core.files import GivenTwice, unique

PACKED = {
    ".gz": "gzip",
    ".zst": "zstd",
    ".zstd": "zstd",
    ".xz": "xz",
    ".bz2": "bz2",
    ".lz4": "lz4",
}
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\0": "xz",
    b"BZh": "bz2",
    b"\x04\x22\x4d\x18": "lz4",
}
LINES, VALUES, PLAIN = "lines of JSON", "JSON", "plain text"
PARQUET, ARROW, CSV = "parquet", "Arrow", "CSV"
DATA = {
    ".jsonl": LINES,
    ".ndjson": LINES,
    ".json": VALUES,
    ".parquet": PARQUET,
    ".arrow": ARROW,
    ".csv": CSV,
    ".tsv": CSV,
    ".txt": PLAIN,
}
"""Kinds of files that are taken from a directory, by suffix."""
PROSE = {".md": PLAIN, ".rst": PLAIN, ".text": PLAIN, ".log": PLAIN}
"""Kinds that are taken from a directory when there is nothing else in it."""
_NO_TEXT = {
    b"PK\x03\x04": "a zip archive (or a file of an office program); unpack it, or save the table as .csv",
    b"7z\xbc\xaf": "a 7z archive; unpack it",
    b"Rar!": "a rar archive; unpack it",
    b"%PDF": "a PDF; take the text out of it first (pdftotext)",
    b"SQLite format 3": "a database; export its table as .csv or .jsonl",
    b"version https://git-lfs": "a pointer of Git LFS in place of the data; run: git lfs pull",
}
_HEAD = 1 << 16
LONGEST = 1 << 26
"""Characters of a record at most: a small .gz may hold one that fills the memory."""
_LARGE, _MOST_MARKS, _SIGNS = 1 << 20, 1 << 21, (",", "[", "{")
"""A record of more characters is looked at before it is parsed: as objects its values take a hundred bytes each."""
_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_JSON = json.JSONDecoder(object_pairs_hook=unique)
_SPACE = re.compile(r"[ \t\r\n]*+")
_DOCUMENT_CHARS, _LONGEST_CHARS = 2_000, 8_000
_XZ_MEMORY = 256 << 20
ICONV = (
    "if it is Latin-1 or Windows-1252, turn it into UTF-8: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW"
)


class FileKind(NamedTuple):
    """What a file's name says: how it is packed ("": not) and its kind (None: unknown)."""

    packing: str
    kind: str | None


def named(path: Path) -> FileKind:
    """Return what the name of a file says."""
    name = path.name.lower()
    last = Path(name).suffix
    packing = PACKED.get(last, "")
    inner = Path(name).stem if packing else name
    return FileKind(packing, (DATA | PROSE).get(Path(inner).suffix))


def records(path: Path, field: str) -> Iterator[Record]:
    """Yield the records of a file; raises UserError naming file, place and the way out for what cannot be read."""
    try:
        packing = _packing(path)
        with _opened(path, packing) as file:
            head = file.read(_HEAD)
        kind = _kind(path, packing, head)
        if kind in (PARQUET, ARROW):
            if packing:
                raise UserError(f"text {path}: a {kind} file packed as a whole; unpack it first")
            yield from (parquet_records if kind == PARQUET else arrow_records)(path, field)
            return
        encoding, (read, newline, errors) = _encoding(head, path), _TEXTS[kind]
        errors = errors if encoding == "utf-8-sig" else "strict"
        with (
            _opened(path, packing) as packed,
            io.TextIOWrapper(packed, encoding, errors, newline) as file,
        ):
            try:
                yield from read(file, path, field)
            except UnicodeDecodeError as error:
                if encoding == "utf-8-sig":
                    raise UserError(
                        f"text {path}: not UTF-8 text ({error.reason}); {ICONV}"
                    ) from error
                raise UserError(
                    f"text {path}: begins as {encoding.upper()} and is damaged ({first_line(error)})"
                ) from error
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            reason = "permission denied" if isinstance(error, PermissionError) else error.strerror
            raise UserError(f"text {path}: cannot be read ({reason})") from error
        packing = _packing(path) or named(path).packing or "packed"
        raise UserError(
            f"text {path}: damaged {packing} file ({first_line(error)}); fetch it again"
        ) from error


def _packing(path: Path) -> str:
    """Return how a file is packed, by its first bytes; raises UserError for one whose name alone says it is."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
    for magic, packing in _MAGIC.items():
        if head.startswith(magic):
            return packing
    said = named(path)
    is_json = said.kind in (LINES, VALUES) and head.lstrip()[:1] in (b"{", b"[")
    if said.packing and head and not is_json:
        raise UserError(f"text {path}: damaged {said.packing} file (it does not begin as one)")
    return ""


def _kind(path: Path, packing: str, head: bytes) -> str:
    """Return what a file holds, by its first bytes or else its name."""
    for magic, advice in _NO_TEXT.items():
        if head.startswith(magic):
            raise UserError(f"text {path}: is {advice}")
    if head[257:262] == b"ustar":
        raise UserError(f"text {path}: is a tar archive; unpack it: tar -xf {path.name}")
    if head.startswith(b"PAR1"):
        return PARQUET
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return ARROW
    kind, start = named(path).kind, head.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    if kind in (LINES, VALUES):
        return _json_kind(kind, head.removeprefix(codecs.BOM_UTF8).lstrip())
    if kind is None:
        suffix = Path(path.name.lower().removesuffix(path.suffix.lower() if packing else "")).suffix
        if start in (b"{", b"["):
            return _json_kind(VALUES, head.lstrip())
        if suffix.strip(".0123456789"):
            raise UserError(
                f"text {path}: unknown kind of file; use one of {', '.join([*DATA, *PROSE])}, also packed "
                f"({', '.join(PACKED)})"
            )
        return PLAIN
    return kind


def _json_kind(said: str, head: bytes) -> str:
    """Return whether JSON is one value a line, as it is read faster and named by line."""
    if said == LINES:
        return VALUES if re.match(rb"\[\s*\{", head) else LINES
    line, end, _ = head.partition(b"\n")
    try:
        return LINES if end and isinstance(json.loads(line), dict) else VALUES
    except (ValueError, RecursionError):
        return VALUES


def _opened(path: Path, packing: str) -> Any:
    """Open a file for reading what is packed in it; raises UserError for an .xz that claims much memory."""
    if packing == "gzip":
        return gzip.open(path, "rb")
    if packing == "bz2":
        return bz2.open(path, "rb")
    if packing == "xz":
        with path.open("rb") as file:
            try:
                lzma.LZMADecompressor(memlimit=_XZ_MEMORY).decompress(file.read(_HEAD), 1)
            except lzma.LZMAError as error:
                if "limit" not in str(error):
                    raise
                raise UserError(
                    f"text {path}: takes over {_XZ_MEMORY >> 20} MB to unpack; pack it again (xz -9)"
                ) from error
        return lzma.open(path, "rb")
    if not packing:
        return path.open("rb")
    try:
        import pyarrow as pa
    except ImportError as error:
        raise UserError(f"text {path}: {packing} needs pyarrow; pip install 'wsae[lm]'") from error
    packed = pa.CompressedInputStream(pa.OSFile(str(path), "rb"), packing)
    return io.BufferedReader(packed, _HEAD)


def _encoding(head: bytes, path: Path) -> str:
    """Return what a text is written in, by its byte-order mark; raises UserError where it is full of zeros."""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if head.count(0) * 10 > len(head):
        raise UserError(
            f"text {path}: is full of zero bytes, so it is no text, or UTF-16 without a byte-order mark; turn it into "
            "UTF-8: iconv -f UTF-16LE -t UTF-8 OLD > NEW"
        )
    return "utf-8-sig"


def _in_utf8(text: str, where: str, what: str) -> str:
    """Return a text; raises UserError where bytes were not UTF-8: they were read as halves of characters."""
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            try:
                text.encode("utf-8", "surrogateescape").decode()
            except UnicodeDecodeError as error:
                raise UserError(f"{where}: not {what} ({error.reason}); {ICONV}") from error
    return text


def _json_lines(file: io.TextIOWrapper, path: Path, field: str) -> Iterator[Record]:
    def rows() -> Iterator[tuple[str, object]]:
        number, prefix = 0, f"text {path}, line "
        while line := file.readline(LONGEST + 1):
            number += 1
            where = prefix + str(number)
            if len(line) > LONGEST:
                raise UserError(f"{where}: over {LONGEST:,} characters; cut it into several")
            if line.isspace():
                continue
            if len(line) > _LARGE:
                _refuse_many_values(line, where)
            try:
                yield where, _JSON.decode(_in_utf8(line, where, "JSON in UTF-8"))
            except UserError:
                raise
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{where}: not JSON ({first_line(error)}); fix or remove the line"
                ) from error

    return _rows(rows(), field)


def _rows(rows: Iterator[tuple[str, object]], field: str) -> Iterator[Record]:
    first: list[tuple[str, dict[str, object]]] = []

    def read() -> Iterator[Record]:
        for where, row in rows:
            if not isinstance(row, dict):
                raise UserError(
                    f"{where}: a {type(row).__name__} where an object with the field {field!r} is needed"
                )
            record = read_row(row, field, where)
            if not first:
                first.append((where, row if not isinstance(record, Content) else {}))
            yield record

    def missing():
        where, row = first[0]
        names = {str(name): readable(value) for name, value in row.items()}
        return no_field(where, field, names)

    return with_field(read(), missing)


def _refuse_many_values(raw: str, where: str) -> None:
    """Raise UserError when a record, once parsed, would take far more memory than it has bytes."""
    marks, at = 0, 0
    for found in _STRING.finditer(raw):
        marks += 1 + sum(raw.count(sign, at, found.start()) for sign in _SIGNS)
        at = found.end()
        if marks > _MOST_MARKS:
            break
    if marks + sum(raw.count(sign, at) for sign in _SIGNS) > _MOST_MARKS:
        raise UserError(f"{where}: over {_MOST_MARKS:,} values in one record; cut it into several")


def _json_values(file: io.TextIOWrapper, path: Path, field: str) -> Iterator[Record]:
    """Read the values of a file one after another, or the items of the list that it is."""
    source = _JsonText(file, path)

    def values() -> Iterator[tuple[str, object]]:
        listed = source.take("[")
        more = not (listed and source.take("]"))
        while more and not source.done():
            yield source.where, source.value()
            more = not listed or source.take(",")
            if listed and not more and not source.take("]"):
                raise UserError(f"{source.where}: not JSON (no comma or closing bracket before it)")
        if not source.done():
            raise UserError(f"{source.where}: more after the list's end; one list a file is read")

    return _rows(values(), field)


class _JsonText:
    """JSON text that is read on as it is parsed."""

    def __init__(self, file: io.TextIOWrapper, path: Path) -> None:
        self._file, self._path = file, path
        self._text, self._at, self._ended, self._number = "", 0, False, 0

    @property
    def where(self) -> str:
        """How the record that comes next is named."""
        return f"text {self._path}, record {self._number + 1}"

    def done(self) -> bool:
        """Return whether nothing but white space is left."""
        while True:
            found = _SPACE.match(self._text, self._at)
            self._at = found.end() if found else self._at
            if self._at < len(self._text):
                return False
            if self._ended:
                return True
            self._more()

    def take(self, sign: str) -> bool:
        """Pass over white space and, if it comes next, a sign; return whether it did."""
        if self.done() or self._text[self._at] != sign:
            return False
        self._at += 1
        return True

    def value(self) -> object:
        """Return the next value; raises UserError when there is none, or it is larger than a record may be."""
        while True:
            try:
                value, self._at = _JSON.raw_decode(self._text, self._at)
            except (ValueError, RecursionError) as error:
                if self._ended or isinstance(error, RecursionError | GivenTwice):
                    raise UserError(f"{self.where}: not JSON ({first_line(error)})") from error
                self._more()
                continue
            self._number += 1
            return value

    def _more(self) -> None:
        self._text = self._text[self._at :]
        self._at = 0
        if len(self._text) > LONGEST:
            raise UserError(
                f"{self.where}: over {LONGEST:,} characters, or not JSON; write one object a line (.jsonl)"
            )
        more = self._file.read(max(_LARGE, len(self._text)))
        self._ended = not more
        self._text += _in_utf8(more, self.where, "JSON in UTF-8")
        if len(self._text) > 2 * _LARGE:
            _refuse_many_values(self._text, self.where)


def _plain_texts(file: io.TextIOWrapper, path: Path, _: str) -> Iterator[Record]:
    """Cut plain text at blank lines into documents of about 2,000 characters (8,000 where there is no blank line)."""
    parts, size, number = [], 0, 0
    while line := file.readline(_LONGEST_CHARS):
        line = _in_utf8(line, f"text {path}, after line {number}", "UTF-8 text")
        number += 1
        blank = not line.strip()
        if size >= (_DOCUMENT_CHARS if blank else _LONGEST_CHARS):
            yield Content("".join(parts).strip())
            parts, size = [], 0
        if not blank or parts:
            parts.append(line)
            size += len(line)
    if parts:
        yield Content("".join(parts).strip())


def _csv(file: io.TextIOWrapper, path: Path, field: str) -> Iterator[Record]:
    return csv_records(file.readline, f"text {path}", field, ".tsv" in path.name.lower())


_TEXTS: dict[
    str, tuple[Callable[[io.TextIOWrapper, Path, str], Iterator[Record]], str | None, str]
] = {
    LINES: (_json_lines, "\n", "surrogateescape"),
    VALUES: (_json_values, "\n", "surrogateescape"),
    PLAIN: (_plain_texts, None, "surrogateescape"),
    CSV: (_csv, "", "strict"),
}
"""Kind -> what reads it, which line ends are kept as they are, and whether it tells of bytes that are not UTF-8."""
