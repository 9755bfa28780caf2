"""A model as a source: activations are computed while training, mixed in blocks, never written.

A block of rows is filled, handed out in random order and replaced. The position is the place in the text where the
block starts and how much of it is used, so restoring computes one block again.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Generic, NamedTuple, TypeVar, cast

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from wsae.acts.config import HarvestConfig, LiveConfig
from wsae.acts.flow import Flow, Step
from wsae.acts.language import LanguageModel, load_language
from wsae.acts.stream import Batch, Chunk, State, check_batch_size, position, restored
from wsae.acts.tally import SourceStats, Tally
from wsae.acts.text import START, Packer, Position, fingerprint
from wsae.acts.tokens import TokenTable, decode_table
from wsae.core.errors import UserError
from wsae.core.files import digest
from wsae.core.memory import Buffer, explained
from wsae.core.progress import Progress, quiet
from wsae.core.seeds import seed_for

# Work in another thread: items behind a short queue, or one value computed ahead of its use.

T = TypeVar("T")


class Background(Generic[T]):
    """`with Background(work) as worker: worker.put(item)`: calls `work(item)` in order in another thread.

    An exception in `work` is raised by the next `put`, or at the end of the block; nothing after it is worked on.
    With `threaded=False` work is done at once, by the caller: on a CPU the model has every core in use already.
    """

    def __init__(self, work: Callable[[T], None], threaded: bool = True, depth: int = 1) -> None:
        self._work, self._threaded = work, threaded
        self._queue: queue.Queue[T | None] = queue.Queue(depth)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="wsae-writer", daemon=True)

    def put(self, item: T) -> None:
        """Hand over one item; waits while the queue is full."""
        self._raise()
        if self._threaded:
            self._queue.put(item)
        else:
            self._work(item)

    def __enter__(self) -> "Background[T]":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._queue.put(None)
        self._thread.join()
        if error is None:
            self._raise()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._error is not None:
                continue  # drain, so that `put` never blocks for ever
            try:
                self._work(item)
            except BaseException as error:  # handed to the caller's thread
                self._error = error

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error


def leaving() -> bool:
    """Return whether the program is at its end, so that nobody wants a result any more."""
    return not threading.main_thread().is_alive()


class Prefetch(Generic[T]):
    """A value that another thread computes meanwhile; `result` waits for it and raises what `work` raised.

    On a GPU it is computed on `stream`, and there when `result` returns. The interpreter waits for it at its end:
    long work should give up when `leaving()`.
    """

    def __init__(self, work: Callable[[], T], stream: torch.cuda.Stream | None = None) -> None:
        self._work, self._stream = work, stream
        self._value: T | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="wsae-ahead")
        self._thread.start()

    def result(self) -> T:
        """Return the value."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return cast(T, self._value)

    def _run(self) -> None:
        try:
            if self._stream is None:
                self._value = self._work()
            else:
                with torch.cuda.stream(self._stream):
                    self._value = self._work()
                self._stream.synchronize()
        except BaseException as error:  # handed to the caller's thread
            self._error = error


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
        self.language = language or load_language(cfg.model, cfg.dtype, cfg.device)
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
            for step in _limited(self._noted(self.flow.steps(heldout=False)), wanted):
                tally.update(_on_cpu(step.x), _on_cpu(step.skipped), step.counts)
                tick(len(step.seq))
        return tally.result()

    def steps(self, start: Position) -> Iterator[Step]:
        """Yield the training steps from a position on; those that gave the statistics are not run again."""
        head = self._head if start == START else []
        yield from head
        yield from self.flow.steps(heldout=False, start=head[-1].after if head else start)

    def forget(self) -> None:
        """Let go of the rows behind the statistics."""
        self._head = []

    def _noted(self, steps: Iterator[Step]) -> Iterator[Step]:
        """Yield steps and keep those of a first block."""
        have = 0
        for step in steps:
            if have < self.live.shuffle_tokens:
                self._head.append(step._replace(skipped={}))
            have += len(step.seq)
            yield step

    def describe(self) -> dict[str, Any]:
        """Return the harvest this stands for, and how rows are mixed where that is not as always."""
        mixing = {} if self.live == LiveConfig() else {"mixing": self.live.to_dict()}
        return {"kind": "live", "harvest": self.cfg.to_dict(), "hooks": list(self.hooks), **mixing}

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
            pending.append(step._replace(x=_on_cpu(step.x)))
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

    def preview(self) -> Iterator[TokenTable]:
        """Yield the held-out text's sequences in order, a few at a time, without running the model."""
        return self._packer().tables()

    def _packer(self) -> Packer:
        return Packer(self.cfg, self.language.tokenizer, heldout=True)

    def digest(self) -> str:
        """Return a hash of config, model files and text files."""
        return digest([self.cfg.to_dict(), self.language.digest, fingerprint(self.cfg.text)])

    def _table(self, ids: list[Tensor], lengths: list[Tensor]) -> TokenTable:
        joined = torch.cat([torch.empty(0, self.cfg.seq_len, dtype=torch.int32), *ids])
        strings = decode_table(self.language.tokenizer, np.unique(joined.numpy()).tolist())
        empty = torch.empty(0, dtype=torch.int32)
        return TokenTable(joined, torch.cat([empty, *lengths]), strings, self._packer().ends)


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
        self._source, self._batch_size, self._seed, self._block_rows = (
            source,
            batch_size,
            seed,
            rows,
        )
        epoch, self._batch = (0, 0) if state is None else restored(state, batch_size, seed)
        self._place = _Place(epoch)
        if state is not None:
            number, skip, given, *start = _block_state(state)
            self._place = _Place(epoch, number, skip, given, Position(*start))
        self._block: _Block | None = None
        self._ahead: Prefetch[_Block] | None = None
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

    def state(self) -> State:
        """Return the exact position as JSON: the block's start in the text, and the batches used of it."""
        place = self._place
        at = position(self._batch_size, self._seed, place.epoch, self._batch)
        return {**at, "block": [place.number, place.skip, place.given, *place.start]}

    def _take(self, place: _Place) -> _Block:
        """Return the block at `place`, computed now or meanwhile, and start on the one after it."""
        ahead, self._ahead = self._ahead, None
        block = self._fill(place) if ahead is None else ahead.result()
        if self._source.overlap:
            if (
                self._side is not None
            ):  # memory of the side stream must not be reused under our reads
                for tensor in (*block.x.values(), block.order):
                    tensor.record_stream(torch.cuda.current_stream(tensor.device))
            after = self._after(block)
            self._ahead = Prefetch(lambda: self._fill(after), self._side)
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
        hooks = self._source.hooks
        with explained("holding rows to shuffle", lambda: _rows(wanted, hooks)):
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
        return _Block(place, x, self._order(place, have).to(where), end)

    def _order(self, place: _Place, have: int) -> Int[Tensor, " rows"]:
        seed = seed_for(self._seed, "block", place.epoch, place.number)
        order = torch.randperm(have, generator=torch.Generator().manual_seed(seed))
        return order[: have - have % self._batch_size]


def _limited(steps: Iterator[Step], rows: int) -> Iterator[Step]:
    """Yield steps until there are `rows` kept rows, the last one cut."""
    while rows > 0 and (step := next(steps, None)) is not None:
        part = step.head(rows)
        rows -= len(part.seq)
        yield part


def _rows(rows: int, hooks: dict[str, int]) -> list[Buffer]:
    lower = "the number of hooks (--hook)"
    return [Buffer(f"rows of {hook}", (rows, d_in), 4, lower) for hook, d_in in hooks.items()]


def _on_cpu(x: Batch) -> Batch:
    return {hook: rows.cpu() for hook, rows in x.items()}


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
