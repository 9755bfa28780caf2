"""Documents from files, hub datasets or the shipped text, one after another in constant memory.

A document's index is its position in the whole stream; a hash of (seed, index) decides whether it is held out.
"""

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from wsae.acts.config import TextConfig
from wsae.acts.tables import hub_texts, parquet_texts
from wsae.core.errors import UserError
from wsae.core.files import digest
from wsae.core.seeds import seed_for

SUFFIXES = (".jsonl", ".jsonl.gz", ".txt", ".parquet")
_DOCUMENT_CHARS = 2_000
_LONGEST_CHARS = 8_000
_LONGEST_LINE = 1 << 26
"""Bytes of a JSON line at most: a small .gz may hold one that fills the memory."""
_SAMPLE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Document:
    """One text and its position in the stream."""

    index: int
    text: str


def documents(cfg: TextConfig, start: int = 0) -> Iterator[Document]:
    """Yield documents from index `start` on; raises UserError naming file, line and field of the first bad one."""
    for index, text in enumerate(_texts(cfg)):
        if index >= start:
            yield Document(index, text)


def is_heldout(index: int, seed: int, fraction: float) -> bool:
    """Return whether document `index` is kept for evaluation (the same on every machine)."""
    return seed_for(seed, "heldout", index) < fraction * 2.0**63


def fingerprint(cfg: TextConfig) -> str:
    """Return a digest of the text's files: name, size and the first and last megabyte of each (a hub name as it is)."""
    with resources.as_file(_builtin()) as builtin:
        path = builtin if cfg.path == "builtin" else Path(cfg.path)
        if not path.exists():
            return digest(cfg.to_dict())
        return digest([cfg.field, [_sample(p) for p in _files(path)]])


def _sample(path: Path) -> list[str | int]:
    size = path.stat().st_size
    with path.open("rb") as file:
        sha = hashlib.sha256(file.read(_SAMPLE_BYTES))
        if size > _SAMPLE_BYTES:
            file.seek(max(_SAMPLE_BYTES, size - _SAMPLE_BYTES))
            sha.update(file.read())
    return [path.name, size, sha.hexdigest()]


def _builtin():
    return resources.files("wsae") / "assets" / "text.jsonl.gz"


def _texts(cfg: TextConfig) -> Iterator[str]:
    if cfg.path == "builtin":
        with resources.as_file(_builtin()) as path:
            yield from _file_texts(path, "text")
        return
    path = Path(cfg.path)
    if cfg.path.strip() and path.exists():
        for file in _files(path):
            yield from _file_texts(file, cfg.field)
    elif _is_hub_name(cfg.path):
        yield from hub_texts(cfg.path, cfg.subset, cfg.split or "train", cfg.field)
    else:
        raise UserError(f"text {cfg.path}: no such file or directory")


def _is_hub_name(name: str) -> bool:
    looks_local = name.startswith(("/", ".", "~")) or name.lower().endswith(
        (*SUFFIXES, ".json", ".csv", ".gz")
    )
    return not looks_local and name.count("/") <= 1 and bool(name.strip())


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    found = sorted(p for p in path.rglob("*") if p.is_file() and p.name.lower().endswith(SUFFIXES))
    if not found:
        raise UserError(f"text {path}: no {', '.join(SUFFIXES)} file in this directory")
    return found


def _file_texts(path: Path, field: str) -> Iterator[str]:
    name = path.name.lower()
    if name.endswith(".parquet"):
        yield from parquet_texts(path, field)
        return
    if not name.endswith((".jsonl", ".jsonl.gz", ".txt")):
        raise UserError(f"text {path}: unknown kind of file; use one of {', '.join(SUFFIXES)}")
    try:
        with gzip.open(path, "rb") if name.endswith(".gz") else path.open("rb") as file:
            yield from (
                _plain_texts(file, path)
                if name.endswith(".txt")
                else _json_texts(file, path, field)
            )
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"text {path}: damaged gzip file ({error})") from error
    except PermissionError as error:
        raise UserError(f"text {path}: cannot be read (permission denied)") from error


def _json_texts(file: io.BufferedReader | gzip.GzipFile, path: Path, field: str) -> Iterator[str]:
    number = 0
    while line := file.readline(_LONGEST_LINE + 1):
        number += 1
        if len(line) > _LONGEST_LINE:
            raise UserError(
                f"text {path}, line {number}: over {_LONGEST_LINE:,} bytes; cut it into several"
            )
        if line.strip():
            yield _json_text(line, f"text {path}, line {number}", field)


def _json_text(line: bytes, where: str, field: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where}: not JSON ({_first_line(error)}); mend or remove the line"
        ) from error
    if not isinstance(row, dict):
        raise UserError(
            f"{where}: a {type(row).__name__} where an object with the field {field!r} is needed"
        )
    if field not in row:
        raise UserError(
            f"{where}: no field {field!r} (it has: {', '.join(map(str, row)) or 'none'}); see --field"
        )
    text = row[field]
    if not isinstance(text, str):
        raise UserError(f"{where}: field {field!r} is a {type(text).__name__}, not text")
    if not text.isascii():
        _check_unicode(text, where)
    return text


def _check_unicode(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: holds half a character (a lone surrogate); mend or remove the line"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _plain_texts(file: io.BufferedReader | gzip.GzipFile, path: Path) -> Iterator[str]:
    """Cut plain text at blank lines into documents of about 2,000 characters (8,000 where there is no blank line)."""
    parts, size, number = [], 0, 0
    try:
        with io.TextIOWrapper(file, encoding="utf-8") as lines:
            while line := lines.readline(_LONGEST_CHARS):
                number += 1
                blank = not line.strip()
                if size >= (_DOCUMENT_CHARS if blank else _LONGEST_CHARS):
                    yield "".join(parts).strip()
                    parts, size = [], 0
                if not blank or parts:
                    parts.append(line)
                    size += len(line)
    except UnicodeDecodeError as error:
        raise UserError(
            f"text {path}, after line {number}: not UTF-8 text ({error.reason})"
        ) from error
    if parts:
        yield "".join(parts).strip()
