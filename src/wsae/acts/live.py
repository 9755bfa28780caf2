"""A model as a source: activations are computed while training, mixed in blocks, never written.

A block of rows is filled, permuted, handed out and replaced. The position is the place in the text where the block
starts and how much of it is used, so restoring computes one block again.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wsae.acts.config import HarvestConfig, LiveConfig
from wsae.acts.decoding import decode_table
from wsae.acts.flow import Flow, Step
from wsae.acts.language import LanguageModel, load_language
from wsae.acts.packing import START, Position
from wsae.acts.stream import Batch, Chunk, State, check_batch_size, position, restored
from wsae.acts.tally import SourceStats, Tally
from wsae.acts.text import fingerprint
from wsae.acts.tokens import TokenTable
from wsae.core.artifact import digest
from wsae.core.errors import UserError
from wsae.core.progress import Progress, quiet
from wsae.core.seeds import seed_for


class LiveSource:
    """The rows that `harvest` would store (`cfg.tokens` of them a pass), straight from the model.

    Statistics come from the first `stats_tokens` training rows. Raises UserError as `harvest` does.
    """

    def __init__(
        self,
        cfg: HarvestConfig,
        live: LiveConfig | None = None,
        language: LanguageModel | None = None,
    ) -> None:
        self.cfg, self.live = cfg, live or LiveConfig()
        self.language = language or load_language(cfg.model, cfg.dtype, cfg.device)
        self.flow = Flow(cfg, self.language)
        self.flow.calibrate()
        self.hooks = self.flow.hooks
        self._tokens: TokenTable | None = None

    @property
    def n_rows(self) -> None:
        """None: only a pass over the text would tell."""
        return

    def stats(self, progress: Progress = quiet) -> dict[str, SourceStats]:
        """Return the statistics of the first `stats_tokens` training rows."""
        tally, wanted = Tally(self.hooks), min(self.live.stats_tokens, self.cfg.tokens)
        with progress("statistics", wanted, "tokens") as tick:
            for step in _limited(self.flow.steps(heldout=False), wanted):
                tally.update(step.x, step.skipped, step.counts)
                tick(len(step.seq))
        return tally.result()

    def describe(self) -> dict[str, Any]:
        """Return the harvest this stands for."""
        return {"kind": "live", "harvest": self.cfg.to_dict(), "hooks": list(self.hooks)}

    def stream(self, batch_size: int, seed: int, state: State | None = None) -> "LiveStream":
        """Return training batches from the start or from a state."""
        return LiveStream(self, batch_size, seed, state)

    def heldout(self, batch_size: int) -> Iterator[Chunk]:
        """Compute the held-out rows and yield them in the text's order."""
        ids, lengths = [], []
        pending: list[Step] = []
        for step in _limited(self.flow.steps(heldout=True), self.cfg.heldout_tokens):
            ids.append(step.ids)
            lengths.append(step.lengths)
            pending.append(step)
            if sum(len(s.seq) for s in pending) >= batch_size:
                *full, rest = _chunks(pending, batch_size)
                yield from (Chunk(*chunk) for chunk in full)
                pending = [step._replace(x=rest[0], seq=rest[1], pos=rest[2])]
        yield from (
            Chunk(*c) for c in (_chunks(pending, batch_size) if pending else []) if len(c[1])
        )
        if self._tokens is None:
            self._tokens = self._table(ids, lengths)

    def tokens(self) -> TokenTable:
        """Return the held-out sequences' tokens (computed by the first pass over the held-out rows)."""
        if self._tokens is None:
            for _ in self.heldout(batch_size=self.cfg.seq_len):
                pass
        assert self._tokens is not None
        return self._tokens

    def digest(self) -> str:
        """Return a hash of config, model files and text files."""
        return digest([self.cfg.to_dict(), self.language.digest, fingerprint(self.cfg.text)])

    def _table(self, ids: list[Tensor], lengths: list[Tensor]) -> TokenTable:
        joined = torch.cat([torch.empty(0, self.cfg.seq_len, dtype=torch.int32), *ids])
        strings = decode_table(self.language.tokenizer, np.unique(joined.numpy()).tolist())
        empty = torch.empty(0, dtype=torch.int32)
        return TokenTable(
            joined, torch.cat([empty, *lengths]), {int(i): s for i, s in strings.items()}
        )


class LiveStream:
    """Batches of a live source: blocks of about `shuffle_tokens` rows, each a multiple of the batch size."""

    def __init__(self, source: LiveSource, batch_size: int, seed: int, state: State | None) -> None:
        rows = max(1, source.live.shuffle_tokens // batch_size) * batch_size
        check_batch_size(batch_size, source.cfg.tokens)
        self._source, self._batch_size, self._seed, self._block_rows = (
            source,
            batch_size,
            seed,
            rows,
        )
        self._epoch, self._batch = (0, 0) if state is None else restored(state, batch_size, seed)
        self._number, self._skip, self._given = 0, 0, 0
        self._start = START
        if state is not None:
            self._number, self._skip, self._given, *start = (int(n) for n in _block_state(state))
            self._start = Position(*start)
        self._block: Batch | None = None
        self._next: tuple[Position, int] = (START, 0)

    def next(self) -> Batch:
        """Return the next batch by hook, float32."""
        if self._block is None:
            self._fill()
        while self._batch * self._batch_size >= self._rows():
            self._advance()
            self._fill()
        assert self._block is not None
        first = self._batch * self._batch_size
        self._batch += 1
        return {
            hook: x[first : first + self._batch_size].clone() for hook, x in self._block.items()
        }

    def state(self) -> State:
        """Return the exact position as JSON: the block's start in the text, and the batches used of it."""
        at = position(self._batch_size, self._seed, self._epoch, self._batch)
        return {**at, "block": [self._number, self._skip, self._given, *self._start]}

    def _rows(self) -> int:
        assert self._block is not None
        return len(next(iter(self._block.values())))

    def _advance(self) -> None:
        """Move to the next block of this epoch, or to the next epoch when this one has no full batch left."""
        full = self._rows() == self._block_rows
        self._given += self._rows()
        self._number, self._batch = self._number + 1, 0
        self._start, self._skip = self._next
        if not full or self._source.cfg.tokens - self._given < self._batch_size:
            self._new_epoch()

    def _new_epoch(self) -> None:
        if self._given == 0:
            raise UserError(
                f"batch size {self._batch_size}: the text has fewer training rows; lower --batch-size"
            )
        self._epoch, self._number, self._given, self._skip, self._start = (
            self._epoch + 1,
            0,
            0,
            0,
            START,
        )

    def _fill(self) -> None:
        """Compute the block that starts `skip` rows after `start` and permute it; its length is whole batches."""
        wanted = min(self._block_rows, self._source.cfg.tokens - self._given)
        parts, have, skip = [], 0, self._skip
        position = self._start
        for step in self._source.flow.steps(heldout=False, start=self._start):
            rows = len(step.seq) - skip
            parts.append({hook: x[skip : skip + wanted - have] for hook, x in step.x.items()})
            if have + rows > wanted:
                self._next = (position, skip + wanted - have)
                have = wanted
                break
            have, skip, position = have + rows, 0, step.after
            self._next = (position, 0)
            if have == wanted:
                break
        self._block = self._permuted(parts, have - have % self._batch_size)

    def _permuted(self, parts: list[Batch], rows: int) -> Batch:
        generator = torch.Generator().manual_seed(
            seed_for(self._seed, "block", self._epoch, self._number)
        )
        have = sum(len(next(iter(part.values()))) for part in parts)
        order = torch.randperm(have, generator=generator)[:rows]
        return {
            hook: torch.cat([torch.empty(0, d_in), *(part[hook] for part in parts)])[order]
            for hook, d_in in self._source.hooks.items()
        }


def _limited(steps: Iterator[Step], rows: int) -> Iterator[Step]:
    """Yield steps until there are `rows` kept rows, the last one cut."""
    while rows > 0 and (step := next(steps, None)) is not None:
        part = step.head(rows)
        rows -= len(part.seq)
        yield part


def _chunks(steps: list[Step], size: int) -> list[tuple[Batch, Tensor, Tensor]]:
    """Join steps and cut them every `size` rows; the last piece may be short or empty."""
    x = {hook: torch.cat([s.x[hook] for s in steps]) for hook in steps[0].x}
    seq, pos = torch.cat([s.seq for s in steps]), torch.cat([s.pos for s in steps])
    starts = range(0, len(seq) + 1, size)
    return [
        ({hook: v[a : a + size] for hook, v in x.items()}, seq[a : a + size], pos[a : a + size])
        for a in starts
    ]


def _block_state(state: State) -> list[int]:
    block = state.get("block")
    if not (isinstance(block, list) and len(block) == 6 and all(isinstance(n, int) for n in block)):
        raise UserError(f"data position is damaged: block {block!r}; start again")
    return block
