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
from typing import NamedTuple, cast

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
"""Bytes of a record at most: a small .gz may hold one that fills the memory."""
_LARGE, _MOST_MARKS, _SIGNS = 1 << 20, 1 << 21, (b",", b"[", b"{")
"""A record of more bytes is looked at before it is parsed: as objects its values take a hundred bytes each."""
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_PARSE = json.JSONDecoder(object_pairs_hook=unique).decode
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
        yield from _records(path, field)
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            reason = "permission denied" if isinstance(error, PermissionError) else error.strerror
            raise UserError(f"text {path}: cannot be read ({reason})") from error
        packing = _packing(path) or named(path).packing or "packed"
        raise UserError(
            f"text {path}: damaged {packing} file ({first_line(error)}); fetch it again"
        ) from error


def _records(path: Path, field: str) -> Iterator[Record]:
    packing = _packing(path)
    with _opened(path, packing) as file:
        head = file.read(_HEAD)
    kind = _kind(path, packing, head)
    if kind in (PARQUET, ARROW):
        if packing:
            raise UserError(f"text {path}: a {kind} file packed as a whole; unpack it first")
        yield from (parquet_records if kind == PARQUET else arrow_records)(path, field)
        return
    with _opened(path, packing) as file:
        yield from _TEXTS[kind](_in_utf8(file, head, path), path, field)


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


def _opened(path: Path, packing: str) -> io.BufferedIOBase:
    """Open a file for reading what is packed in it."""
    if packing == "gzip":
        return gzip.open(path, "rb")
    if packing == "bz2":
        return bz2.open(path, "rb")
    if packing == "xz":
        return io.BufferedReader(_Unpacked(path), _HEAD)
    if packing:
        return _by_arrow(path, packing)
    return path.open("rb")


def _by_arrow(path: Path, packing: str) -> io.BufferedIOBase:
    try:
        import pyarrow as pa
    except ImportError as error:
        raise UserError(f"text {path}: {packing} needs pyarrow; pip install 'wsae[lm]'") from error
    return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path), "rb"), packing), _HEAD)


class _Unpacked(io.RawIOBase):
    """An .xz file, with a bound on the memory that its header may claim."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._unpack = lzma.LZMADecompressor(memlimit=_XZ_MEMORY)
        self._rest = b""

    def readable(self) -> bool:
        """Return that it can be read."""
        return True

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()

    def readinto(self, buffer) -> int:
        """Fill a buffer as far as one step of unpacking does; 0 at the end."""
        while True:
            if self._unpack.eof:  # a file may hold several streams
                self._rest = (self._unpack.unused_data or self._file.read(_HEAD)).lstrip(b"\0")
                if not self._rest:
                    return 0
                self._unpack = lzma.LZMADecompressor(memlimit=_XZ_MEMORY)
            elif self._unpack.needs_input:
                self._rest = self._file.read(_HEAD)
                if not self._rest:
                    raise EOFError("it ends too early")
            try:
                data = self._unpack.decompress(self._rest, len(buffer))
            except lzma.LZMAError as error:
                if "limit" not in str(error):
                    raise
                raise UserError(
                    f"text {self._file.name}: takes over {_XZ_MEMORY >> 20} MB to unpack; pack it again (xz -9)"
                ) from error
            self._rest = b""
            if data:
                buffer[: len(data)] = data
                return len(data)


def _in_utf8(file: io.BufferedIOBase, head: bytes, path: Path) -> io.BufferedIOBase:
    """Return the stream after its byte-order mark, recoded from UTF-16 or UTF-32 where the mark says so."""
    if head.startswith(codecs.BOM_UTF8):
        file.read(len(codecs.BOM_UTF8))
        return file
    for mark, name in ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32")):
        if head.startswith(mark):
            return io.BufferedReader(_Recoded(file, name, path), _HEAD)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return io.BufferedReader(_Recoded(file, "utf-16", path), _HEAD)
    if head.count(0) * 10 > len(head):
        raise UserError(
            f"text {path}: is full of zero bytes, so it is no text, or UTF-16 without a byte-order mark; turn it into "
            "UTF-8: iconv -f UTF-16LE -t UTF-8 OLD > NEW"
        )
    return file


class _Recoded(io.RawIOBase):
    """A stream in UTF-16 or UTF-32 as UTF-8."""

    def __init__(self, file: io.BufferedIOBase, encoding: str, path: Path) -> None:
        self._file, self._path, self._encoding = file, path, encoding
        self._decode = codecs.getincrementaldecoder(encoding)()
        self._rest = b""

    def readable(self) -> bool:
        """Return that it can be read."""
        return True

    def readinto(self, buffer) -> int:
        """Fill a buffer; 0 at the end."""
        while not self._rest:
            raw = self._file.read(_HEAD)
            try:
                self._rest = self._decode.decode(raw, final=not raw).encode()
            except UnicodeError as error:
                raise UserError(
                    f"text {self._path}: begins as {self._encoding.upper()} and is damaged ({first_line(error)})"
                ) from error
            if not raw:
                break
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size


# ---- JSON


def _json_lines(file: io.BufferedIOBase, path: Path, field: str) -> Iterator[Record]:
    def rows() -> Iterator[tuple[str, object]]:
        number, prefix = 0, f"text {path}, line "
        while line := file.readline(LONGEST + 1):
            number += 1
            where = prefix + str(number)
            if len(line) > LONGEST:
                raise UserError(f"{where}: over {LONGEST:,} bytes; cut it into several")
            if line.strip():
                yield where, _parsed(line, where)

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


def _parsed(raw: bytes, where: str) -> object:
    if len(raw) > _LARGE:
        _refuse_many_values(raw, where)
    try:
        return _PARSE(raw.decode())
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not JSON in UTF-8 ({error.reason}); {ICONV}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where}: not JSON ({first_line(error)}); fix or remove the line"
        ) from error


def _refuse_many_values(raw: bytes, where: str) -> None:
    """Raise UserError when a record, once parsed, would take far more memory than it has bytes."""
    marks, at = 0, 0
    for found in _STRING.finditer(raw):
        marks += 1 + sum(raw.count(sign, at, found.start()) for sign in _SIGNS)
        at = found.end()
        if marks > _MOST_MARKS:
            break
    if marks + sum(raw.count(sign, at) for sign in _SIGNS) > _MOST_MARKS:
        raise UserError(f"{where}: over {_MOST_MARKS:,} values in one record; cut it into several")


def _json_values(file: io.BufferedIOBase, path: Path, field: str) -> Iterator[Record]:
    return _rows(_values(file, path), field)


def _values(file: io.BufferedIOBase, path: Path) -> Iterator[tuple[str, object]]:
    """Yield the values of a file one after another, or the items of the list that it is."""
    source = _Source(file, path)
    listed = source.take("[")
    more = not (listed and source.take("]"))
    while more and not source.done():
        yield source.where, source.value()
        more = not listed or source.take(",")
        if listed and not more and not source.take("]"):
            raise UserError(f"{source.where}: not JSON (no comma or closing bracket before it)")
    if not source.done():
        raise UserError(f"{source.where}: more after the list's end; one list a file is read")


class _Source:
    """JSON text that is read on as it is parsed."""

    def __init__(self, file: io.BufferedIOBase, path: Path) -> None:
        self._file, self._path = file, path
        self._decode = codecs.getincrementaldecoder("utf-8")()
        self._parse = json.JSONDecoder(object_pairs_hook=unique).raw_decode
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
                value, self._at = self._parse(self._text, self._at)
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
        raw = self._file.read(max(_LARGE, len(self._text)))
        self._ended = not raw
        try:
            self._text += self._decode.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            raise UserError(f"{self.where}: not JSON in UTF-8 ({error.reason}); {ICONV}") from error
        if len(self._text) > 2 * _LARGE:
            _refuse_many_values(self._text.encode("utf-8", "surrogatepass"), self.where)


# ---- plain text and tables


def _plain_texts(file: io.BufferedIOBase, path: Path, _: str) -> Iterator[Record]:
    """Cut plain text at blank lines into documents of about 2,000 characters (8,000 where there is no blank line)."""
    parts, size, number = [], 0, 0
    try:
        with io.TextIOWrapper(cast(io.BufferedReader, file), encoding="utf-8") as lines:
            while line := lines.readline(_LONGEST_CHARS):
                number += 1
                blank = not line.strip()
                if size >= (_DOCUMENT_CHARS if blank else _LONGEST_CHARS):
                    yield Content("".join(parts).strip())
                    parts, size = [], 0
                if not blank or parts:
                    parts.append(line)
                    size += len(line)
    except UnicodeDecodeError as error:
        raise UserError(
            f"text {path}, after line {number}: not UTF-8 text ({error.reason}); {ICONV}"
        ) from error
    if parts:
        yield Content("".join(parts).strip())


def _csv(file: io.BufferedIOBase, path: Path, field: str) -> Iterator[Record]:
    tabs = ".tsv" in path.name.lower()
    try:
        buffered = cast(io.BufferedReader, file)
        with io.TextIOWrapper(buffered, encoding="utf-8", newline="") as lines:
            yield from csv_records(lines, f"text {path}", field, tabs)
    except UnicodeDecodeError as error:
        raise UserError(f"text {path}: not UTF-8 text ({error.reason}); {ICONV}") from error


_TEXTS: dict[str, Callable[[io.BufferedIOBase, Path, str], Iterator[Record]]] = {
    LINES: _json_lines,
    VALUES: _json_values,
    PLAIN: _plain_texts,
    CSV: _csv,
}
