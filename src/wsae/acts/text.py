"""Documents from files, hub datasets or the shipped text, one after another in constant memory.

A document's index is its position in the whole stream; a hash of (seed, index) decides whether it is held out. What is
not read (files, records) is counted by reason.
"""

import hashlib
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from itertools import islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int

from wsae.acts.config import HarvestConfig, TextConfig
from wsae.acts.reading import DATA, PACKED, PROSE, named, records
from wsae.acts.tables import (
    LabelColumn,
    LeftOut,
    NoField,
    Record,
    Turn,
    as_lines,
    hub_records,
    turns_in,
)
from wsae.acts.tokens import TokenTable
from wsae.core.cache import content_digest
from wsae.core.errors import UserError
from wsae.core.files import digest, parse_json
from wsae.core.hub import is_hub_name
from wsae.core.seeds import seed_for

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
    messages: tuple[Turn, ...] = ()

    @property
    def empty(self) -> bool:
        """Return whether there is nothing in it."""
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
class TextCounts:
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
    cfg: TextConfig, start: int = 0, reading: TextCounts | None = None
) -> Iterator[Document]:
    """Yield documents from index `start` on; raises UserError naming file, line and field of the first bad one.

    `reading` counts what is met on the way, from the beginning.
    """
    reading = TextCounts() if reading is None else reading
    for index, record in enumerate(_records(cfg, cfg.field, reading)):
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


class LabelledText(NamedTuple):
    """A text and what its record says in the columns of labels."""

    text: str
    labels: tuple[str, ...]


def labelled(
    cfg: TextConfig, columns: Sequence[str], reading: TextCounts
) -> Iterator[LabelledText]:
    """Yield the texts that have a label in every column; `reading` counts those left out.

    Raises UserError as `documents`, and where text and labels are of different files.
    """
    counts = [reading, *(TextCounts() for _ in columns)]
    fields = (cfg.field, *map(LabelColumn, columns))
    read = [_records(cfg, field, count) for field, count in zip(fields, counts, strict=True)]
    for text, *labels in zip_longest(*read):
        if len({count.files for count in counts}) > 1 or text is None or None in labels:
            raise UserError(
                f"text {cfg.path}: {' and '.join(fields)} are not in the same files; give one that has them all"
            )
        if isinstance(text, LeftOut):
            reading.records[text.reason] += 1
            continue
        reading.documents += 1
        known = [label.text for label in labels if not isinstance(label, LeftOut)]
        if len(known) < len(columns):
            reading.records["without a label"] += 1
        elif not text.text:
            reading.empty += 1
        else:
            yield LabelledText(text.text, tuple(known))


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
    reading, repeats, refused, roles = TextCounts(), Repeats(), Counter[str](), Counter[str]()
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
            roles.update(turn.role for turn in document.messages)
    reading.records += refused
    unheard = {} if cfg.roles is None else {"turns": {**dict.fromkeys(cfg.roles, 0), **roles}}
    return {**reading.info(), "repeated": repeats.info(), **unheard}


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
    turns = info.get("turns", {})
    lines += [
        f"no turn is of the role {role!r}{heard(turns)}" for role, n in turns.items() if not n
    ]
    repeated = info.get("repeated", {})
    if repeated.get("in_training"):
        least = "at least " if repeated["at_least"] else ""
        lines.append(
            f"{least}{repeated['in_training']:,} of {repeated['heldout']:,} held-out documents are training documents "
            "too, word for word, so held-out scores are partly of known text; remove the repetitions"
        )
    return lines


def heard(turns: Mapping[str, int]) -> str:
    """Return in brackets how many turns of each role there are."""
    said = ", ".join(f"{n:,} of {role}" for role, n in sorted(turns.items()) if n)
    return f" (there are {said})" if said else ""


def fingerprint(cfg: TextConfig) -> str:
    """Return a digest of the text's files: name, size and content of each (a hub name as it is)."""
    with resources.as_file(_builtin()) as builtin:
        path = builtin if cfg.path == "builtin" else Path(cfg.path)
        if not path.exists():
            return digest(cfg.to_dict())
        read = _files(path, cfg.split).read
        samples = [[place.name, place.stat().st_size, content_digest(place)] for place in read]
        return digest([cfg.field, samples])


def _builtin():
    return resources.files("wsae") / "assets" / "text.jsonl.gz"


def _records(cfg: TextConfig, field: str, reading: TextCounts) -> Iterator[Record]:
    if cfg.path == "builtin":
        with resources.as_file(_builtin()) as path:
            yield from records(path, field if isinstance(field, LabelColumn) else "text")
        return
    path = Path(cfg.path)
    if cfg.path.strip() and path.exists():
        yield from _read(_files(path, cfg.split), field, reading)
    elif is_hub_name(cfg.path, (*DATA, *PROSE, *PACKED, ".zip", ".tar")):
        yield from hub_records(cfg.path, cfg.subset, cfg.split or "train", field)
    else:
        raise UserError(f"text {cfg.path}: no such file or directory")


def _read(files: Files, name: str, reading: TextCounts) -> Iterator[Record]:
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


def _files(path: Path, split: str | None = None) -> Files:
    if path.is_file():
        return Files([path])
    if not path.is_dir():
        raise UserError(f"text {path}: neither a file nor a directory (a pipe?); save it to a file")
    root, others = _root(path, split)
    left_out = {OTHER_SPLIT: others} if others else {}
    sorted_out: dict[str, list[Path]] = {}
    for file in sorted(root.rglob("*")):
        if not file.is_dir() or file.is_symlink():
            reason = _why_not(file, root, split if root == path else None)
            sorted_out.setdefault(reason, []).append(file)
    read = sorted_out.pop("", []) or sorted_out.pop(BESIDE, [])
    left_out |= {
        reason: [str(p.relative_to(root)) for p in ps] for reason, ps in sorted_out.items()
    }
    if not read:
        has = "; ".join(f"{len(ps)} {reason} ({ps[0]})" for reason, ps in left_out.items())
        what = f"no {', '.join(DATA)} file"
        if split is not None and OTHER_SPLIT in left_out:
            what = f"no file of the split {split!r}"
        instead = f", only {has}; to read one of these, name it" if has else ""
        raise UserError(f"text {root}: {what} in this directory{instead}")
    return Files(read, left_out)


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
    state = file.parent / "state.json"
    if suffix == ".arrow" and state.is_file():  # of a data set saved in this folder
        listed = {entry.get("filename") for entry in _json_list(state, "_data_files")}
        if file.name not in listed:
            return UNLISTED
    words = re.split(r"[-_./\\]", str(inside).lower())
    if split is not None and split.lower() not in words:
        return OTHER_SPLIT
    return BESIDE if suffix in PROSE else ""


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


PIECE = 1 << 20
"""Characters tokenised at once: a tokenizer takes 150 bytes for each."""
REFUSED = "conversations that the model's chat template refuses"
MIXED = "conversations whose turns cannot be told apart in the chat template's text"
_TODAY = "26 Jul 2024"
_DAY = (
    '{%- macro strftime_now(form) -%}{{ {"%d %b %Y": "26 Jul 2024", "%d %B %Y": "26 July 2024"}'
    '.get(form, "2024-07-26") }}{%- endmacro %}'
)
"""What tells chat templates the day, so that a text has the same tokens on any day."""


class Position(NamedTuple):
    """Where the next sequence begins: a document of the stream, how many of its tokens are used up, its own number."""

    document: int = 0
    token: int = 0
    sequence: int = 0

    @property
    def documents(self) -> int:
        """How many documents of the stream are used, the last perhaps in part."""
        return self.document + (self.token > 0)


START = Position()
_BEFORE_WORD = re.compile(r"(?<=\S) (?=\w)")


class TokenSequence(NamedTuple):
    """One model input: ids [seq_len] int32, how many of them are not padding, and the position after it."""

    ids: np.ndarray
    length: int
    after: Position
    cut: bool = False
    """Whether it is a document that was longer."""
    said: np.ndarray | None = None
    """Which tokens are words of the roles asked for, bool [seq_len]; none where all roles are."""


class Packer:
    """Sequences of one half of a text ("train" or "heldout").

    Packed: documents joined by the end-of-text token and cut every seq_len tokens, the last piece padded. Else: one
    document a sequence, truncated and padded on the right. Each sequence starts with a begin-of-text token if the
    tokenizer adds one of its own accord. A position is document and token number, so resuming reads no more than that
    one document again.
    """

    def __init__(
        self, cfg: HarvestConfig, tokenizer: "PreTrainedTokenizerBase", heldout: bool
    ) -> None:
        self.cfg, self.heldout = cfg, heldout
        self._tokenizer = tokenizer
        self._start = automatic_bos(tokenizer)
        self._end = _one_id(tokenizer.eos_token_id) or _one_id(tokenizer.bos_token_id)
        self._pad = (_one_id(tokenizer.pad_token_id) or self._end or [0])[0]
        self._refused, self._reason = 0, ""
        self.roles = Counter[str]()  # turns of each so far
        if cfg.roles is not None:
            refuse_unable_to_mask(tokenizer)
        self._highest = max(tokenizer.get_vocab().values(), default=-1)

    @property
    def ends(self) -> tuple[int, ...] | None:
        """Ids that end a document: none where each sequence is one, None where nothing marks it."""
        return (tuple(self._end) or None) if self.cfg.pack else ()

    def tables(self) -> Iterator[TokenTable]:
        """Yield all sequences, a batch at a time, as tokens without strings; no model is run."""
        sequences = self.sequences()
        while batch := tuple(islice(sequences, self.cfg.batch_seqs)):
            ids = torch.from_numpy(np.stack([s.ids for s in batch]))
            lengths = torch.tensor([s.length for s in batch], dtype=torch.int32)
            yield TokenTable(ids, lengths, {}, self.ends)

    def sequences(self, start: Position = START) -> Iterator[TokenSequence]:
        """Yield sequences from a position on; raises UserError when all there is are conversations, none usable."""
        found = self._packed(start) if self.cfg.pack else self._single(start)
        first = next(found, None)
        if first is not None:
            yield first
            yield from found
        elif start == START and self._refused:
            raise UserError(
                f"text {self.cfg.text.path}: the model's chat template refuses all {self._refused:,} conversations "
                f"({self._reason}); read a field of plain text (--field)"
            )

    def _documents(self, start: int) -> Iterator[Document]:
        for document in documents(self.cfg.text, start):
            if document.empty:  # millions of them should pass quickly
                continue
            if is_heldout(document.index, self.cfg.seed, self.cfg.heldout_fraction) == self.heldout:
                yield document

    def _packed(self, start: Position) -> Iterator[TokenSequence]:
        room = self.cfg.seq_len - len(self._start)
        parts: list[np.ndarray] = []
        have, number = 0, start.sequence
        after = start.document
        for document in self._documents(start.document):
            tokens = self._tokens(document, self._end)
            used, n = start.token if document.index == start.document else 0, tokens.shape[1]
            while n - used >= room - have:
                parts.append(tokens[:, used : used + room - have])
                used += room - have
                number += 1
                after_it = Position(document.index, used, number)
                yield self._sequence(np.concatenate(parts, axis=1), after_it)
                parts, have = [], 0
            if used < n:  # nothing is kept of empty documents, however many there are
                parts.append(tokens[:, used:])
                have += n - used
            after = document.index + 1
        if have:
            yield self._sequence(np.concatenate(parts, axis=1), Position(after, 0, number + 1))

    def _single(self, start: Position) -> Iterator[TokenSequence]:
        number = start.sequence
        for document in self._documents(start.document):
            sequence = self.whole(document, number)
            if sequence is not None:
                number += 1
                yield sequence

    def whole(self, document: Document, number: int) -> TokenSequence | None:
        """Return a document as the sequence of this number, truncated; none when it has no tokens."""
        room, tokens = self.cfg.seq_len - len(self._start), self._tokens(document, [])
        n = tokens.shape[1]
        if not n:
            return None
        after = Position(document.index + 1, 0, number + 1)
        return self._sequence(tokens[:, :room], after)._replace(cut=n > room)

    def refuses(self, document: Document) -> str:
        """Return why a document has no tokens although it is not empty: what its chat template says; else ""."""
        if not document.messages:
            return ""
        text = self._rendered(document.messages)
        if text is None:
            return REFUSED
        return MIXED if self.cfg.roles and self._turns(document, text) is None else ""

    def _tokens(self, document: Document, end: list[int]) -> Int[np.ndarray, "2 tokens"]:
        """Return a document's ids and, below each, 1 where the token is part of what the roles asked for say, else 0.

        Raises UserError for a document that is no conversation where roles are asked for.
        """
        if self.cfg.roles and not document.messages:
            raise UserError(
                f"text {self.cfg.text.path}, document {document.index}: field {self.cfg.text.field!r} holds no "
                "conversation, so nobody's words can be chosen; name the field with the messages (--field), or leave "
                "out --roles"
            )
        if document.ids is not None:
            ids = self._checked(document)
            tokens = np.stack([ids, np.ones_like(ids)])
        elif document.messages:
            tokens = self._talk(document)
        else:
            tokens = self._read(document.text, None)
        if document.messages or document.ids is not None:  # these may bring their own
            if self._start and tokens[0, :1].tolist() == self._start:
                tokens = tokens[:, 1:]
            end = [] if tokens[0, -1:].tolist() == end else end
        if not tokens.shape[1] or not end:
            return tokens
        return np.concatenate([tokens, np.array([end, [0]], dtype=np.int32)], axis=1)

    def _talk(self, document: Document) -> Int[np.ndarray, "2 tokens"]:
        """Return the tokens of a conversation, none where it is refused; counts the roles."""
        text = self._rendered(document.messages)
        if self.cfg.roles is None or text is None:
            return self._read(text or "", None)
        self.roles.update(turn.role for turn in document.messages)
        turns = self._turns(document, text)
        if turns is None:
            self._refused, self._reason = self._refused + 1, "turns cannot be told apart in it"
        return self._read(text if turns is not None else "", turns)

    def _turns(self, document: Document, text: str) -> list[slice] | None:
        """Return where in a conversation's text the roles asked for speak; none where that cannot be told."""
        found, roles = turns_in(text, document.messages, self._rendered), self.cfg.roles or ()
        if found is None:
            return None
        return [
            part for part, turn in zip(found, document.messages, strict=True) if turn.role in roles
        ]

    def _read(self, text: str, turns: list[slice] | None) -> Int[np.ndarray, "2 tokens"]:
        """Return the ids of a text, and which overlap some parts of it (none: all do)."""
        parts, start = [np.zeros((2, 0), dtype=np.int32)], 0
        for piece in pieces(text):
            found = self._tokenizer(
                piece,
                add_special_tokens=False,
                verbose=False,
                return_offsets_mapping=turns is not None,
            )
            ids = np.array(found["input_ids"], dtype=np.int32)
            said = np.ones_like(ids)
            if turns is not None:
                places = np.array(found["offset_mapping"], dtype=np.int64).reshape(-1, 2) + start
                said[:] = 0
                for turn in turns:
                    said |= (places[:, 0] < turn.stop) & (places[:, 1] > turn.start)
            parts.append(np.stack([ids, said]))
            start += len(piece)
        return np.concatenate(parts, axis=1)

    def _checked(self, document: Document) -> np.ndarray:
        """Return the ids that a document brings; raises UserError when the tokenizer has not as many."""
        assert document.ids is not None
        highest = int(document.ids.max(initial=-1))
        if highest > self._highest:
            raise UserError(
                f"text {self.cfg.text.path}, document {document.index}: token id {highest}, but the model's tokenizer "
                f"has ids up to {self._highest}; another one made these: read the text instead (--field)"
            )
        return document.ids

    def _rendered(self, messages: Sequence[Turn]) -> str | None:
        """Return a conversation as the model reads it: by its chat template, else one line a turn; None if refused."""
        if not self._tokenizer.chat_template:
            return as_lines(messages)
        from jinja2.exceptions import TemplateError

        turns = [message._asdict() for message in messages]
        try:
            template = str(self._tokenizer.get_chat_template())
            dated = _DAY + template if "strftime_now" in template else template
            return str(
                self._tokenizer.apply_chat_template(
                    turns, chat_template=dated, tokenize=False, date_string=_TODAY
                )
            )
        except (TemplateError, ValueError, TypeError, KeyError) as error:  # what a template raises
            self._refused += 1
            self._reason = " ".join(str(error).split())[:80]
            return None

    def _sequence(self, tokens: Int[np.ndarray, "2 tokens"], after: Position) -> TokenSequence:
        out = np.full(self.cfg.seq_len, self._pad, dtype=np.int32)
        first, length = len(self._start), len(self._start) + tokens.shape[1]
        out[:length] = [*self._start, *tokens[0]]
        said = None
        if self.cfg.roles is not None:
            said = np.zeros(self.cfg.seq_len, dtype=bool)
            said[first:length] = tokens[1] == 1
        return TokenSequence(out, length, after, said=said)


def refuse_unable_to_mask(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise UserError for a tokenizer with which nobody's words in a conversation can be told from another's."""
    if not tokenizer.chat_template:
        raise UserError(
            "--roles: the model's tokenizer has no chat template, so it does not say how turns are written; leave the "
            "flag out, or save the tokenizer with a template"
        )
    if not tokenizer.is_fast:
        raise UserError(
            f"--roles: a {type(tokenizer).__name__} does not say where in a text its tokens lie; save it as "
            "tokenizer.json"
        )


def pieces(text: str) -> Iterator[str]:
    """Yield a long text in pieces of about `PIECE` characters, each beginning with the white space of a word."""
    start = 0
    while len(text) - start > PIECE:
        spaces = _BEFORE_WORD.finditer(text, start + PIECE - PIECE // 64, start + PIECE)
        cut = next((found.start() for found in spaces), start + PIECE)
        yield text[start:cut]
        start = cut
    if start < len(text):
        yield text[start:]


def automatic_bos(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return [begin-of-text id] when the tokenizer puts it before any text, else []."""
    ids = tokenizer("a", verbose=False)["input_ids"]
    bos = _one_id(tokenizer.bos_token_id)
    return bos if len(ids) > 1 and ids[:1] == bos else []


def _one_id(token: object) -> list[int]:
    return [token] if isinstance(token, int) else []
