"""A model as a source: activations are computed while training, mixed in blocks, never written.

A block of rows is filled, handed out in random order and replaced. The position is the place in the text where the
block starts and how much of it is used, so restoring computes one block again.
"""

from collections.abc import Iterator
from concurrent.futures import Future
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from wsae.acts.config import HarvestConfig, LiveConfig
from wsae.acts.flow import Flow, SourceStats, Step, Tally, TokenBatch, stacked
from wsae.acts.language import LanguageModel, language_for
from wsae.acts.stream import (
    Batch,
    HeldoutRows,
    State,
    ahead,
    check_batch_size,
    leaving,
    position,
    restored,
)
from wsae.acts.text import START, Packer, Position, TokenSequence, fingerprint
from wsae.acts.tokens import TokenTable, decode_table
from wsae.core.errors import Buffer, UserError, explained
from wsae.core.files import digest
from wsae.core.progress import Progress, quiet
from wsae.core.seeds import seed_for


class LiveSource:
    """The rows that `harvest` would store (`cfg.tokens` of them a pass), straight from the model.

    Statistics come from the first `stats_tokens` training rows, which are kept to be the first block (the model reads
    them once). Rows stay on the model's device. `overlap` computes a block while the one before is trained on: by
    default on a GPU only, where it runs on a stream of its own; on a CPU model and training want the same cores.
    Raises UserError as `harvest` does.
    """

    def __init__(
        self,
        cfg: HarvestConfig,
        live: LiveConfig | None = None,
        language: LanguageModel | None = None,
        overlap: bool | None = None,
    ) -> None:
        self.cfg, self.live = cfg, live or LiveConfig()
        self.language = language or language_for(cfg)
        device = self.language.device
        self.overlap = device.type == "cuda" if overlap is None else overlap
        self.flow = Flow(cfg, self.language, device)
        self.flow.calibrate()
        self.hooks = self.flow.hooks
        self._tokens: TokenTable | None = None
        self._head: list[Step] = []

    @property
    def n_rows(self) -> None:
        """None: only a pass over the text would tell."""
        return

    def stats(self, progress: Progress = quiet) -> dict[str, SourceStats]:
        """Return the statistics of the first `stats_tokens` training rows."""
        tally, wanted = Tally(self.hooks), min(self.live.stats_tokens, self.cfg.tokens)
        self._head = []
        with progress("statistics", wanted, "tokens") as tick:
            have = 0
            for step in self.flow.steps(heldout=False):
                if have < self.live.shuffle_tokens:  # it belongs to a first block
                    self._head.append(step._replace(skipped={}))
                part = step.head(wanted - have)
                have += len(step.seq)
                tally.update(_on_cpu(part.x), _on_cpu(part.skipped), part.counts)
                tick(len(part.seq))
                if have >= wanted:
                    break
        return tally.result()

    def steps(self, start: Position) -> Iterator[Step]:
        """Yield the training steps from a position on; those that gave the statistics are not run again."""
        head = self._head if start == START else []
        yield from head
        yield from self.flow.steps(heldout=False, start=head[-1].after if head else start)

    def forget(self) -> None:
        """Let go of the rows behind the statistics."""
        self._head = []

    def describe(self) -> dict[str, Any]:
        """Return the harvest this stands for, and how rows are mixed where that is not as always."""
        mixing = {} if self.live == LiveConfig() else {"mixing": self.live.to_dict()}
        return {"kind": "live", "harvest": self.cfg.to_dict(), "hooks": list(self.hooks), **mixing}

    def stream(self, batch_size: int, seed: int, state: State | None = None) -> "LiveStream":
        """Return training batches from the start or from a state."""
        return LiveStream(self, batch_size, seed, state)

    def heldout(self, batch_size: int) -> Iterator[HeldoutRows]:
        """Compute the held-out rows and yield them in the text's order."""
        empty = torch.empty(0, dtype=torch.int32)
        ids, lengths = [torch.empty(0, self.cfg.seq_len, dtype=torch.int32)], [empty]
        parts: list[HeldoutRows] = []
        for step in _limited(self.flow.steps(heldout=True), self.cfg.heldout_tokens):
            ids.append(step.ids)
            lengths.append(step.lengths)
            parts.append(HeldoutRows(_on_cpu(step.x), step.seq, step.pos))
            if sum(len(part.seq) for part in parts) >= batch_size:
                *full, rest = _recut(parts, batch_size)
                yield from full
                parts = [rest]
        if sum(len(part.seq) for part in parts):
            yield _recut(parts, batch_size)[0]
        if self._tokens is None:
            table, tokenizer = torch.cat(ids), self.language.tokenizer
            strings = decode_table(tokenizer, np.unique(table.numpy()).tolist())
            self._tokens = TokenTable(table, torch.cat(lengths), strings, self._packer().ends)

    def tokens(self) -> TokenTable:
        """Return the held-out sequences' tokens (computed by the first pass over the held-out rows)."""
        if self._tokens is None:
            for _ in self.heldout(batch_size=self.cfg.seq_len):
                pass
        assert self._tokens is not None
        return self._tokens

    def preview(self) -> Iterator[TokenTable]:
        """Yield the held-out text's sequences in order, a few at a time, without running the model."""
        return self._packer().tables()

    def _packer(self) -> Packer:
        return Packer(self.cfg, self.language.tokenizer, heldout=True)

    def digest(self) -> str:
        """Return a hash of config, model files, text files, and how rows are mixed where that is not as always."""
        mixing = [] if self.live == LiveConfig() else [self.live.to_dict()]
        said = [self.cfg.to_dict(), self.language.digest, fingerprint(self.cfg.text)]
        return digest([*said, *mixing])


class _Place(NamedTuple):
    """Where a block starts: its epoch and number in it, rows given before it, rows skipped after `start`."""

    epoch: int = 0
    number: int = 0
    skip: int = 0
    given: int = 0
    start: Position = START


class _Block(NamedTuple):
    """Rows in the text's order, the order they are handed out in (whole batches), and where they end."""

    place: _Place
    x: Batch
    order: Int[Tensor, " rows"]
    end: tuple[Position, int]


class LiveStream:
    """Batches of a live source: blocks of about `shuffle_tokens` rows, each a multiple of the batch size.

    With the source's `overlap` the model computes the next block in another thread while this one is trained on.
    """

    def __init__(self, source: LiveSource, batch_size: int, seed: int, state: State | None) -> None:
        rows = max(1, source.live.shuffle_tokens // batch_size) * batch_size
        check_batch_size(batch_size, source.cfg.tokens)
        self._source, self._batch_size = source, batch_size
        self._seed, self._block_rows = seed, rows
        epoch, self._batch = (0, 0) if state is None else restored(state, batch_size, seed)
        self._place = _Place(epoch)
        if state is not None:
            number, skip, given, *start = _block_state(state)
            self._place = _Place(epoch, number, skip, given, Position(*start))
        self._block: _Block | None = None
        self._ahead: Future[_Block] | None = None
        device = source.flow.keep_on
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._place.start != START:
            source.forget()

    def next(self) -> Batch:
        """Return the next batch by hook, float32."""
        if self._block is None:
            self._block = self._take(self._place)
        while self._batch * self._batch_size >= len(self._block.order):
            self._place, self._batch = self._after(self._block), 0
            self._block = None  # before the next one is made: without overlap one is held at a time
            self._source.forget()
            self._block = self._take(self._place)
        first = self._batch * self._batch_size
        self._batch += 1
        chosen = self._block.order[first : first + self._batch_size]
        return {hook: x[chosen] for hook, x in self._block.x.items()}

    def begin(self) -> None:
        """Do nothing: blocks are computed ahead."""

    def state(self) -> State:
        """Return the exact position as JSON: the block's start in the text, and the batches used of it."""
        place = self._place
        at = position(self._batch_size, self._seed, place.epoch, self._batch)
        return {**at, "block": [place.number, place.skip, place.given, *place.start]}

    def _take(self, place: _Place) -> _Block:
        """Return the block at `place`, computed now or meanwhile, and start on the one after it."""
        begun, self._ahead = self._ahead, None
        block = self._fill(place) if begun is None else begun.result()
        if self._source.overlap:
            if self._side is not None:  # its memory must not be reused under our reads
                for tensor in (*block.x.values(), block.order):
                    tensor.record_stream(torch.cuda.current_stream(tensor.device))
            after = self._after(block)
            self._ahead = ahead(lambda: self._fill(after), self._side)
        return block

    def _after(self, block: _Block) -> _Place:
        """Return where the next block starts: in this epoch, or in the next when no full batch is left in it."""
        place, rows = block.place, len(block.order)
        given = place.given + rows
        if rows == self._block_rows and self._source.cfg.tokens - given >= self._batch_size:
            start, skip = block.end
            return _Place(place.epoch, place.number + 1, skip, given, start)
        if given == 0:
            raise UserError(
                f"batch size {self._batch_size}: the text has fewer training rows; lower --batch-size"
            )
        return _Place(place.epoch + 1)

    def _fill(self, place: _Place) -> _Block:
        """Compute the rows that start `skip` rows after `start`; they are handed out in whole batches."""
        wanted = min(self._block_rows, self._source.cfg.tokens - place.given)
        where = self._source.flow.keep_on
        hooks, lower = self._source.hooks, "the number of hooks (--hook)"
        rows_of = [Buffer(f"rows of {hook}", (wanted, d), 4, lower) for hook, d in hooks.items()]
        with explained("holding rows to shuffle", lambda: rows_of):
            x = {
                hook: torch.empty(wanted, d_in, device=where, dtype=torch.float32)
                for hook, d_in in hooks.items()
            }
        have, skip, end = 0, place.skip, (place.start, 0)
        for step in self._source.steps(place.start):
            rows = min(len(step.seq) - skip, wanted - have)
            for hook, block in x.items():
                block[have : have + rows] = step.x[hook][skip : skip + rows]
            whole = skip + rows == len(step.seq)
            end = (step.after, 0) if whole else (end[0], skip + rows)
            have, skip = have + rows, 0
            if have == wanted or leaving():
                break
        seed = seed_for(self._seed, "block", place.epoch, place.number)
        order = torch.randperm(have, generator=torch.Generator().manual_seed(seed))
        return _Block(place, x, order[: have - have % self._batch_size].to(where), end)


class SequenceStream:
    """Batches of the source's training sequences, as many whole ones as `batch_size` tokens hold, for another pass.

    They are shuffled in blocks of about `shuffle_tokens` tokens; each epoch's and block's order is one of its own.
    """

    def __init__(
        self, source: LiveSource, batch_size: int, seed: int, state: State | None = None
    ) -> None:
        self.source, self._batch_size, self._seed = source, batch_size, seed
        self._size = batch_size // source.cfg.seq_len
        if not self._size:
            raise UserError(
                f"batch size {batch_size}: less than a sequence of {source.cfg.seq_len} tokens; raise --batch-size, "
                "or lower --seq-len"
            )
        self._epoch, self._batch, self._number, self._start = 0, 0, 0, START
        if state is not None:
            self._epoch, self._batch = restored(state, batch_size, seed)
            self._number, *start = _block_state(state, 4)
            self._start = Position(*start)
        self._block: list[TokenSequence] | None = None
        self._end: Position | None = None
        """Where the block after this one begins; none where the text has ended."""

    def next(self) -> TokenBatch:
        """Return the next batch."""
        if self._block is None:
            self._block = self._take()
        while (self._batch + 1) * self._size > len(self._block):
            if self._end is not None:
                self._number, self._start = self._number + 1, self._end
            elif self._start == START and len(self._block) < self._size:
                raise UserError(
                    f"batch size {self._batch_size}: the text has fewer training tokens; lower --batch-size"
                )
            else:
                self._epoch, self._number, self._start = self._epoch + 1, 0, START
            self._batch, self._block = 0, self._take()
        first = self._batch * self._size
        self._batch += 1
        return stacked(self._block[first : first + self._size])

    def state(self) -> State:
        """Return the exact position as JSON."""
        at = position(self._batch_size, self._seed, self._epoch, self._batch)
        return {**at, "block": [self._number, *self._start]}

    def _take(self) -> list[TokenSequence]:
        """Return the block that begins here, in its order, and note where it ends."""
        source = self.source
        count = max(1, source.live.shuffle_tokens // source.cfg.seq_len // self._size) * self._size
        packer = Packer(source.cfg, source.language.tokenizer, heldout=False)
        found = list(islice(packer.sequences(self._start), count))
        self._end = found[-1].after if len(found) == count else None
        seed = seed_for(self._seed, "sequences", self._epoch, self._number)
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
        return [found[place] for place in order.tolist()]


def _limited(steps: Iterator[Step], rows: int) -> Iterator[Step]:
    """Yield steps until there are `rows` kept rows, the last one cut."""
    while rows > 0 and (step := next(steps, None)) is not None:
        part = step.head(rows)
        rows -= len(part.seq)
        yield part


def _on_cpu(x: Batch) -> Batch:
    return {hook: rows.cpu() for hook, rows in x.items()}


def _recut(parts: list[HeldoutRows], size: int) -> list[HeldoutRows]:
    """Join chunks and cut them every `size` rows; the last piece may be short or empty."""
    x = {hook: torch.cat([part.x[hook] for part in parts]) for hook in parts[0].x}
    seq, pos = torch.cat([part.seq for part in parts]), torch.cat([part.pos for part in parts])
    cuts = [slice(first, first + size) for first in range(0, len(seq) + 1, size)]
    return [
        HeldoutRows({hook: v[cut] for hook, v in x.items()}, seq[cut], pos[cut]) for cut in cuts
    ]


def _block_state(state: State, numbers: int = 6) -> list[int]:
    block = state.get("block")
    if not (
        isinstance(block, list) and len(block) == numbers and all(isinstance(n, int) for n in block)
    ):
        raise UserError(f"data position is damaged: block {block!r}; start again")
    return block
