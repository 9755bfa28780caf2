"""Token sequences from documents: packed end to end or one document each, with an exact position to resume from."""

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from wsae.acts.config import HarvestConfig
from wsae.acts.text import Document, documents, is_heldout
from wsae.acts.tokens import TokenTable


class Position(NamedTuple):
    """Where the next sequence begins: a document of the stream, how many of its tokens are used up, its own number."""

    document: int = 0
    token: int = 0
    sequence: int = 0


START = Position()


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
        """Yield sequences from a position on."""
        return self._packed(start) if self.cfg.pack else self._single(start)

    def _documents(self, start: int) -> Iterator[Document]:
        for document in documents(self.cfg.text, start):
            if is_heldout(document.index, self.cfg.seed, self.cfg.heldout_fraction) == self.heldout:
                yield document

    def _packed(self, start: Position) -> Iterator[Sequence]:
        room = self.cfg.seq_len - len(self._start)
        parts: list[np.ndarray] = []
        have, number = 0, start.sequence
        after = start.document
        for document in self._documents(start.document):
            ids = self._ids(document.text, self._end)
            used = start.token if document.index == start.document else 0
            while len(ids) - used >= room - have:
                parts.append(ids[used : used + room - have])
                used += room - have
                number += 1
                yield self._sequence(np.concatenate(parts), Position(document.index, used, number))
                parts, have = [], 0
            parts.append(ids[used:])
            have += len(ids) - used
            after = document.index + 1
        if have:
            yield self._sequence(np.concatenate(parts), Position(after, 0, number + 1))

    def _single(self, start: Position) -> Iterator[Sequence]:
        room, number = self.cfg.seq_len - len(self._start), start.sequence
        for document in self._documents(start.document):
            ids = self._ids(document.text, [])[:room]
            if len(ids):
                number += 1
                yield self._sequence(ids, Position(document.index + 1, 0, number))

    def _ids(self, text: str, end: list[int]) -> np.ndarray:
        ids = (
            self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            if text
            else []
        )
        return np.array(ids + end if ids else [], dtype=np.int32)

    def _sequence(self, ids: np.ndarray, after: Position) -> Sequence:
        out = np.full(self.cfg.seq_len, self._pad, dtype=np.int32)
        length = len(self._start) + len(ids)
        out[:length] = [*self._start, *ids]
        return Sequence(out, length, after)


def automatic_bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return [begin-of-text id] when the tokenizer puts it before any text, else []."""
    ids = tokenizer("a", verbose=False)["input_ids"]
    bos = _one_id(tokenizer.bos_token_id)
    return bos if len(ids) > 1 and ids[:1] == bos else []


def _one_id(token: object) -> list[int]:
    return [token] if isinstance(token, int) else []
