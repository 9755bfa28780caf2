"""Documents from files, hub datasets or the shipped text, one after another in constant memory.

A document's index is its position in the whole stream; a hash of (seed, index) decides whether it is held out. What is
not read (files, records) is counted by reason.
"""

import hashlib
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from wsae.acts.config import HarvestConfig, TextConfig
from wsae.acts.reading import DATA, PACKED, PROSE, named, records
from wsae.acts.rows import LeftOut, Message, NoField, Record
from wsae.acts.tables import hub_records
from wsae.core.errors import UserError
from wsae.core.files import digest, parse_json
from wsae.core.seeds import seed_for

_SAMPLE_BYTES = 1 << 20
_NAMES = 3
"""Files left out that are named, of each reason."""
_ABOUT = re.compile(
    "readme|license|licence|copying|notice|changelog|changes|contributing|authors|citation|requirements|"
    "code_of_conduct|security"
)
"""Names of files, without suffix, that speak about the data."""
_RECORDS = re.compile(
    "dataset_infos?|dataset_dict|state|manifest|(generation_|tokenizer_)?config|tokenizer|special_tokens_map|"
    "added_tokens|vocab|croissant|package|metadata"
)
"""Names of .json files, without suffix, that describe data or models."""
_CACHE = re.compile(r"(cache|tmp)-.*\.arrow")
ABOUT, OTHER_SPLIT, UNKNOWN = "about the data", "of other splits", "of an unknown kind"
WITHOUT, UNLISTED, FOLDERS = "without the field", "not listed in state.json", "links to folders"
HIDDEN, BESIDE = "hidden", "of prose beside data"
_HASHES = 1 << 22
"""Documents of each half that are compared (8 bytes each)."""


@dataclass(slots=True)
class Document:
    """One record and its position in the stream: a text, or a conversation, or (then without text) token ids."""

    index: int
    text: str
    ids: np.ndarray | None = None
    messages: tuple[Message, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether there is nothing in it."""
        return not self.text and (self.ids is None or not len(self.ids))

    def hash(self) -> int:
        """Return 64 bits that documents of the same content share."""
        data = self.text.encode() if self.ids is None else self.ids.tobytes()
        return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest())


class Files(NamedTuple):
    """The files of a text in the order they are read, and those that are not, by reason."""

    read: list[Path]
    left_out: dict[str, list[str]] = {}


@dataclass
class Reading:
    """What was read of a text, and what was left out."""

    documents: int = 0
    empty: int = 0
    """Documents without any text in them (they count as documents)."""
    files: int = 0
    records: Counter[str] = field(default_factory=Counter)
    """Reason -> records left out."""
    files_left_out: dict[str, list[str]] = field(default_factory=dict)
    """Reason -> names."""

    def info(self) -> dict[str, Any]:
        """Return it as a store's manifest says it."""
        return {
            "documents": self.documents,
            "empty": self.empty,
            "left_out": dict(sorted(self.records.items())),
            "files": self.files,
            "files_left_out": {
                reason: {"n": len(names), "names": names[:_NAMES]}
                for reason, names in sorted(self.files_left_out.items())
            },
        }


def documents(
    cfg: TextConfig, start: int = 0, reading: Reading | None = None
) -> Iterator[Document]:
    """Yield documents from index `start` on; raises UserError naming file, line and field of the first bad one.

    `reading` counts what is met on the way, from the beginning.
    """
    reading = Reading() if reading is None else reading
    for index, record in enumerate(_records(cfg, reading)):
        if isinstance(record, LeftOut):
            reading.records[record.reason] += 1
            continue
        document = Document(index, record.text, record.ids, record.messages)
        reading.documents += 1
        if document.empty:
            reading.empty += 1
        if record.note:
            reading.records[record.note] += 1
        if index >= start:
            yield document


def is_heldout(index: int, seed: int, fraction: float) -> bool:
    """Return whether document `index` is kept for evaluation (the same on every machine)."""
    return seed_for(seed, "heldout", index) < fraction * 2.0**63


class Repeats:
    """Held-out documents that are training documents too, word for word; of so many million the first are compared."""

    def __init__(self) -> None:
        self._seen = {True: array("Q"), False: array("Q")}
        self._more = False

    def add(self, document: Document, heldout: bool) -> None:
        """Note a document."""
        if document.empty:
            return
        seen = self._seen[heldout]
        if len(seen) < _HASHES:
            seen.append(document.hash())
        else:
            self._more = True

    def info(self) -> dict[str, Any]:
        """Return how many held-out documents there are, and how many of them training repeats."""
        heldout, train = (np.array(self._seen[half], dtype=np.uint64) for half in (True, False))
        repeated = int(np.isin(heldout, train).sum())
        return {"heldout": len(heldout), "in_training": repeated, "at_least": self._more}


def survey(
    cfg: HarvestConfig,
    stop: Mapping[str, int | None],
    refuses: Callable[[Document], str] = lambda _: "",
) -> dict[str, Any]:
    """Return what the documents of a harvest were, read once more: what was left out, what both halves hold.

    `stop` says for "train" and "heldout" before which document its half ended (None: with the text). `refuses` returns
    why a document gave no tokens, or "". The answer does not depend on whether the harvest was killed on its way.
    """
    reading, repeats, refused = Reading(), Repeats(), Counter[str]()
    last = None if None in stop.values() else max((n for n in stop.values() if n), default=0)
    for document in documents(cfg.text, reading=reading):
        if last is not None and document.index >= last:
            break
        if document.empty:
            continue
        heldout = is_heldout(document.index, cfg.seed, cfg.heldout_fraction)
        end = stop["heldout" if heldout else "train"]
        if end is not None and document.index >= end:
            continue
        if reason := refuses(document):
            refused[reason] += 1
        else:
            repeats.add(document, heldout)
    reading.records += refused
    return {**reading.info(), "repeated": repeats.info()}


def told(info: Mapping[str, Any]) -> list[str]:
    """Return in words what a text's `info` says was left out or repeated; nothing where there is nothing to tell."""
    lines = []
    files = [
        f"{found['n']:,} {reason} ({', '.join(found['names'])}{', ...' if found['n'] > _NAMES else ''})"
        for reason, found in info.get("files_left_out", {}).items()
    ]
    if files:
        lines.append(f"files not read: {'; '.join(files)}")
    kept = [f"{n:,} {reason}" for reason, n in info.get("left_out", {}).items()]
    if info.get("empty"):
        kept.append(f"{info['empty']:,} empty")
    if kept:
        lines.append(f"records left out: {', '.join(kept)}")
    repeated = info.get("repeated", {})
    if repeated.get("in_training"):
        least = "at least " if repeated["at_least"] else ""
        lines.append(
            f"{least}{repeated['in_training']:,} of {repeated['heldout']:,} held-out documents are training documents "
            "too, word for word, so held-out scores are partly of known text; remove the repetitions"
        )
    return lines


def fingerprint(cfg: TextConfig) -> str:
    """Return a digest of the text's files: name, size and the first and last megabyte of each (a hub name as it is)."""
    with resources.as_file(_builtin()) as builtin:
        path = builtin if cfg.path == "builtin" else Path(cfg.path)
        if not path.exists():
            return digest(cfg.to_dict())
        return digest([cfg.field, [_sample(p) for p in _files(path, cfg.split).read]])


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


def _records(cfg: TextConfig, reading: Reading) -> Iterator[Record]:
    if cfg.path == "builtin":
        with resources.as_file(_builtin()) as path:
            yield from records(path, "text")
        return
    path = Path(cfg.path)
    if cfg.path.strip() and path.exists():
        yield from _read(_files(path, cfg.split), cfg.field, reading)
    elif _is_hub_name(cfg.path):
        yield from hub_records(cfg.path, cfg.subset, cfg.split or "train", cfg.field)
    else:
        raise UserError(f"text {cfg.path}: no such file or directory")


def _read(files: Files, name: str, reading: Reading) -> Iterator[Record]:
    """Yield the records of files; one without the field is left out, unless all are."""
    reading.files_left_out = {reason: [*names] for reason, names in files.left_out.items()}
    first, found = None, False
    for file in files.read:
        reading.files += 1
        try:
            for record in records(file, name):
                found = True
                yield record
        except NoField as error:
            reading.files -= 1
            first = first or error
            reading.files_left_out.setdefault(WITHOUT, []).append(file.name)
    if first is not None and not found:
        raise first


def _is_hub_name(name: str) -> bool:
    known = (*DATA, *PROSE, *PACKED, ".zip", ".tar")
    looks_local = name.startswith(("/", ".", "~")) or name.lower().endswith(known)
    return not looks_local and name.count("/") <= 1 and bool(name.strip())


# ---- which files


def _files(path: Path, split: str | None = None) -> Files:
    if path.is_file():
        return Files([path])
    if not path.is_dir():
        raise UserError(f"text {path}: neither a file nor a directory (a pipe?); save it to a file")
    root, others = _root(path, split)
    left_out = {OTHER_SPLIT: others} if others else {}
    sorted_out: dict[str, list[Path]] = {"": []}
    for file in sorted(root.rglob("*")):
        if file.is_dir() and not file.is_symlink():
            continue
        reason = _why_not(file, root, split if root == path else None)
        sorted_out.setdefault(reason, []).append(file)
    read, prose = sorted_out.pop(""), sorted_out.get(BESIDE, [])
    if not read and prose:
        read = sorted_out.pop(BESIDE)
    left_out |= {
        reason: [str(p.relative_to(root)) for p in ps] for reason, ps in sorted_out.items()
    }
    if not read:
        raise UserError(_nothing(root, split, left_out))
    return Files(read, left_out)


def _nothing(root: Path, split: str | None, left_out: dict[str, list[str]]) -> str:
    """Return the error for a directory without text: what it holds instead."""
    has = "; ".join(f"{len(ps)} {reason} ({ps[0]})" for reason, ps in left_out.items())
    what = f"no {', '.join(DATA)} file"
    if split is not None and OTHER_SPLIT in left_out:
        what = f"no file of the split {split!r}"
    return f"text {root}: {what} in this directory" + (
        f", only {has}; to read one of these, name it" if has else ""
    )


def _why_not(file: Path, root: Path, split: str | None) -> str:
    """Return why a file of a directory is not read; "" when it is."""
    inside = file.relative_to(root)
    name, stem = file.name.lower(), file.name.lower().split(".")[0]
    kind = named(file)
    suffix = Path(name.removesuffix(Path(name).suffix) if kind.packing else name).suffix
    if any(part.startswith(".") for part in inside.parts) or name == "_success":
        return HIDDEN
    if file.is_symlink() and file.is_dir():
        return FOLDERS
    is_about = _ABOUT.fullmatch(stem) is not None and suffix in ("", ".txt", *PROSE)
    is_record = _RECORDS.fullmatch(stem) is not None and suffix == ".json"
    if is_about or is_record or _CACHE.fullmatch(name):
        return ABOUT
    if kind.kind is None or not file.is_file():
        return UNKNOWN
    if suffix == ".arrow" and not _listed(file):
        return UNLISTED
    words = re.split(r"[-_./\\]", str(inside).lower())
    if split is not None and split.lower() not in words:
        return OTHER_SPLIT
    return BESIDE if suffix in PROSE else ""


def _listed(file: Path) -> bool:
    """Return whether an Arrow file belongs to the data set saved in its folder; a folder may say nothing."""
    state = file.parent / "state.json"
    if not state.is_file():
        return True
    return file.name in {entry.get("filename") for entry in _json_list(state, "_data_files")}


def _json_list(path: Path, key: str) -> list[Any]:
    """Return a list in a small JSON file of `save_to_disk`; raises UserError when it is not there."""
    try:
        with path.open("rb") as file:
            found = parse_json(file.read(1 << 24))[key]
        if isinstance(found, list) and all(isinstance(e, dict | str) for e in found):
            return found
    except (ValueError, RecursionError, KeyError, TypeError, OSError) as error:
        raise UserError(
            f"text {path}: damaged, no list {key!r} in it; save the data again"
        ) from error
    raise UserError(f"text {path}: damaged, no list {key!r} in it; save the data again")


def _root(path: Path, split: str | None) -> tuple[Path, list[str]]:
    """Return the folder that holds the files of a directory, and the names of the splits that are left out."""
    snapshots = path / "snapshots"
    if snapshots.is_dir() and (path / "refs").is_dir():  # a data set in the hub's cache
        found = sorted(p for p in snapshots.iterdir() if p.is_dir())
        main = path / "refs" / "main"
        chosen = [
            p for p in found if main.is_file() and p.name == main.read_text().strip()
        ] or found
        if len(chosen) != 1:
            raise UserError(f"text {path}: {len(found)} snapshots; name one of {snapshots}/...")
        return chosen[0], []
    if not (path / "dataset_dict.json").is_file():
        return path, []
    splits = [str(name) for name in _json_list(path / "dataset_dict.json", "splits")]
    wanted = split or ("train" if "train" in splits or len(splits) != 1 else splits[0])
    if wanted not in splits or not (path / wanted).is_dir() or Path(wanted).name != wanted:
        raise UserError(f"text {path}: no split {wanted!r}; give --split {' or '.join(splits)}")
    return path / wanted, [name for name in splits if name != wanted]
