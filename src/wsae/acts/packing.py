"""Token sequences from documents: packed end to end or one document each, with an exact position to resume from."""

import re
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from wsae.acts.config import HarvestConfig
from wsae.acts.text import Document, documents, is_heldout
from wsae.acts.tokens import TokenTable
from wsae.core.errors import UserError

PIECE = 1 << 20
"""Characters tokenised at once: a tokenizer takes 150 bytes for each."""
REFUSED = "conversations that the model's chat template refuses"
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


class Sequence(NamedTuple):
    """One model input: ids [seq_len] int32, how many of them are not padding, and the position after it."""

    ids: np.ndarray
    length: int
    after: Position


class Packer:
    """Sequences of one half of a text ("train" or "heldout").

    Packed: documents joined by the end-of-text token and cut every seq_len tokens, the last piece padded. Else: one
    document a sequence, truncated and padded on the right. Each sequence starts with a begin-of-text token if the
    tokenizer adds one of its own accord. A position is document and token number, so resuming reads no more than that
    one document again.
    """

    def __init__(
        self, cfg: HarvestConfig, tokenizer: PreTrainedTokenizerBase, heldout: bool
    ) -> None:
        self.cfg, self.heldout = cfg, heldout
        self._tokenizer = tokenizer
        self._start = automatic_bos(tokenizer)
        self._end = _one_id(tokenizer.eos_token_id) or _one_id(tokenizer.bos_token_id)
        self._pad = (_one_id(tokenizer.pad_token_id) or self._end or [0])[0]
        self._refused, self._reason = 0, ""
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

    def sequences(self, start: Position = START) -> Iterator[Sequence]:
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

    def _packed(self, start: Position) -> Iterator[Sequence]:
        room = self.cfg.seq_len - len(self._start)
        parts: list[np.ndarray] = []
        have, number = 0, start.sequence
        after = start.document
        for document in self._documents(start.document):
            ids = self._ids(document, self._end)
            used = start.token if document.index == start.document else 0
            while len(ids) - used >= room - have:
                parts.append(ids[used : used + room - have])
                used += room - have
                number += 1
                yield self._sequence(np.concatenate(parts), Position(document.index, used, number))
                parts, have = [], 0
            if used < len(ids):  # nothing is kept of empty documents, however many there are
                parts.append(ids[used:])
                have += len(ids) - used
            after = document.index + 1
        if have:
            yield self._sequence(np.concatenate(parts), Position(after, 0, number + 1))

    def _single(self, start: Position) -> Iterator[Sequence]:
        room, number = self.cfg.seq_len - len(self._start), start.sequence
        for document in self._documents(start.document):
            ids = self._ids(document, [])[:room]
            if len(ids):
                number += 1
                yield self._sequence(ids, Position(document.index + 1, 0, number))

    def refuses(self, document: Document) -> str:
        """Return why a document has no tokens although it is not empty: what its chat template says; else ""."""
        return REFUSED if document.messages and self._rendered(document) is None else ""

    def _ids(self, document: Document, end: list[int]) -> np.ndarray:
        if document.ids is not None:
            ids = self._checked(document)
        else:
            text = self._rendered(document) if document.messages else document.text
            ids = self._tokenised(text or "")
        if document.messages or document.ids is not None:  # these may bring their own
            ids = ids[1:] if self._start and ids[:1].tolist() == self._start else ids
            end = [] if ids[-1:].tolist() == end else end
        return np.concatenate([ids, np.array(end, dtype=np.int32)]) if len(ids) else ids

    def _tokenised(self, text: str) -> np.ndarray:
        parts = [
            self._tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
            for part in pieces(text)
        ]
        return np.concatenate([np.array(part, dtype=np.int32) for part in [*parts, []]])

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

    def _rendered(self, document: Document) -> str | None:
        """Return a conversation as the model reads it: by its chat template, else one line a turn; None if refused."""
        if not self._tokenizer.chat_template:
            return document.text
        from jinja2.exceptions import TemplateError

        turns = [message._asdict() for message in document.messages]
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

    def _sequence(self, ids: np.ndarray, after: Position) -> Sequence:
        out = np.full(self.cfg.seq_len, self._pad, dtype=np.int32)
        length = len(self._start) + len(ids)
        out[:length] = [*self._start, *ids]
        return Sequence(out, length, after)


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


def automatic_bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return [begin-of-text id] when the tokenizer puts it before any text, else []."""
    ids = tokenizer("a", verbose=False)["input_ids"]
    bos = _one_id(tokenizer.bos_token_id)
    return bos if len(ids) > 1 and ids[:1] == bos else []


def _one_id(token: object) -> list[int]:
    return [token] if isinstance(token, int) else []
