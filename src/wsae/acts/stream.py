"""What training and evaluation see of any data: the interfaces of sources, and epochs of shuffled rows."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from wsae.acts.flow import SourceStats
from wsae.acts.tokens import TokenTable
from wsae.core.errors import UserError
from wsae.core.progress import Progress, quiet
from wsae.core.seeds import Permutation, seed_for

Batch = dict[str, Float[Tensor, "_ _"]]
"""Rows by hook: one number of rows, a width per hook."""
State = dict[str, int | list[int]]


class HeldoutRows(NamedTuple):
    """Held-out rows by hook in float32, and their sequence (of an array [rows, d_in] the row) and position in it."""

    x: dict[str, Float[Tensor, "rows _"]]
    seq: Int[Tensor, " rows"]
    pos: Int[Tensor, " rows"]


@runtime_checkable
class BatchStream(Protocol):
    """An infinite stream of full batches; each epoch is shuffled anew and its incomplete tail is dropped."""

    def next(self) -> Batch:
        """Return the next batch by hook, float32."""
        ...

    def begin(self) -> None:
        """Begin to read the batch after it in another thread, where that helps."""
        ...

    def state(self) -> State:
        """Return the exact position as JSON; `source.stream(batch_size, seed, state)` continues bit-identically."""
        ...


@runtime_checkable
class ActivationSource(Protocol):
    """Activations at one or several hooks, split into training and held-out rows."""

    hooks: dict[str, int]
    """Hook name -> d_in."""

    @property
    def n_rows(self) -> int | None:
        """Training rows per epoch; none when only a pass over the text would tell."""
        ...

    def stats(self, progress: Progress = quiet) -> dict[str, SourceStats]:
        """Return the statistics of the training rows by hook."""
        ...

    def stream(self, batch_size: int, seed: int, state: State | None = None) -> BatchStream:
        """Return training batches from the start or from a state."""
        ...

    def heldout(self, batch_size: int) -> Iterator[HeldoutRows]:
        """Yield every held-out row once, always in the same order."""
        ...

    def tokens(self) -> TokenTable | None:
        """Return the held-out sequences' tokens; none for arrays."""
        ...

    def digest(self) -> str:
        """Return a name for the data itself."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return where the data come from as JSON: kind (store, array, live), path or harvest, hooks."""
        ...


# What an evaluation sees of them: held-out rows in a fixed order, and the model or the images behind.


@runtime_checkable
class HeldOut(Protocol):
    """The part of an activation source that evaluation uses."""

    hooks: dict[str, int]

    def heldout(self, batch_size: int) -> Iterator[HeldoutRows]:
        """Yield every held-out row once, sequence by sequence."""
        ...

    def tokens(self) -> TokenTable | None:
        """Return the held-out sequences' tokens; None for arrays."""
        ...


@runtime_checkable
class Tokenizer(Protocol):
    """What splicing needs of a tokenizer."""

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of the tokens that are not text."""
        ...


@runtime_checkable
class Language(Protocol):
    """The model behind the activations (`wsae.acts.language.LanguageModel`; not imported: it needs transformers)."""

    @property
    def model(self) -> nn.Module:
        """A causal language model."""
        ...

    @property
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer."""
        ...


@runtime_checkable
class Pictures(Protocol):
    """The images behind the activations (`wsae.acts.images.harvest.Gallery`; not imported: it needs Pillow)."""

    def label(self, image: int) -> str:
        """Return the name of an image's class."""
        ...

    def thumbnail(self, image: int) -> str:
        """Return a small PNG in base64; raises UserError where the image cannot be read."""
        ...


# Epochs of shuffled rows.

T = TypeVar("T")


def leaving() -> bool:
    """Return whether the program is at its end, so that nobody wants a result any more."""
    return not threading.main_thread().is_alive()


def ahead(work: Callable[[], T], stream: torch.cuda.Stream | None = None) -> Future[T]:
    """Return a value that another thread computes meanwhile.

    On a GPU it is computed on `stream`, and there when the result is. The interpreter waits for it at its end: long
    work should give up when `leaving()`.
    """
    value: Future[T] = Future()

    def run() -> None:
        try:
            with nullcontext() if stream is None else torch.cuda.stream(stream):
                found = work()
            if stream is not None:
                stream.synchronize()
            value.set_result(found)
        except BaseException as error:  # handed to the caller's thread
            value.set_exception(error)

    threading.Thread(target=run, name="wsae-ahead").start()
    return value


ORDERED = 65_536
"""Rows whose order is computed at a time: one batch's alone takes five times as long."""


class _Order(NamedTuple):
    """The rows at some positions of an epoch."""

    epoch: int
    first: int
    rows: Int[np.ndarray, " rows"]


class ShuffledStream:
    """Batches of `n_rows` indexed rows, permuted by (seed, epoch); `gather` reads rows at any positions."""

    def __init__(
        self,
        n_rows: int,
        gather: Callable[[Int[np.ndarray, " rows"]], Batch],
        batch_size: int,
        seed: int,
        state: State | None = None,
    ) -> None:
        check_batch_size(batch_size, n_rows)
        self._n_rows, self._gather = n_rows, gather
        self._batch_size, self._seed = batch_size, seed
        self._epoch, self._batch = (0, 0) if state is None else restored(state, batch_size, seed)
        self._order = _Order(-1, 0, np.empty(0, np.int64))
        self._begun: Future[Batch] | None = None

    def next(self) -> Batch:
        """Return the next batch by hook, float32."""
        begun, self._begun = self._begun, None
        batch = self._read(*self._place()) if begun is None else begun.result()
        self._epoch, self._batch = self._place()
        self._batch += 1
        return batch

    def begin(self) -> None:
        """Begin to read the next batch in another thread; `next` gives it, or its error."""
        place = self._place()
        self._begun = self._begun or ahead(lambda: self._read(*place))

    def _place(self) -> tuple[int, int]:
        """Return epoch and number of the next batch."""
        over = self._batch >= self._n_rows // self._batch_size
        return (self._epoch + 1, 0) if over else (self._epoch, self._batch)

    def _read(self, epoch: int, batch: int) -> Batch:
        first, size = batch * self._batch_size, self._batch_size
        order = self._order
        if epoch != order.epoch or not 0 <= first - order.first <= len(order.rows) - size:
            permutation = Permutation(self._n_rows, seed_for(self._seed, "epoch", epoch))
            last = min(first + max(1, ORDERED // size) * size, self._n_rows)
            self._order = order = _Order(epoch, first, permutation(np.arange(first, last)))
        return self._gather(order.rows[first - order.first :][:size])

    def state(self) -> State:
        """Return the exact position as JSON."""
        return position(self._batch_size, self._seed, self._epoch, self._batch)


def position(batch_size: int, seed: int, epoch: int, batch: int) -> State:
    """Return a stream's exact position as JSON; `restored` reads it."""
    return {"batch_size": batch_size, "seed": seed, "epoch": epoch, "batch": batch}


def restored(state: State, batch_size: int, seed: int) -> tuple[int, int]:
    """Return (epoch, batch) of a state; raises UserError when it belongs to another batch size or seed."""
    for name, value in (("batch_size", batch_size), ("seed", seed)):
        if state.get(name) != value:
            raise UserError(
                f"data position was saved with {name} {state.get(name)}, not {value}; resume with the same"
            )
    epoch, batch = state.get("epoch"), state.get("batch")
    if not (isinstance(epoch, int) and isinstance(batch, int) and epoch >= 0 and batch >= 0):
        raise UserError(f"data position is damaged: epoch {epoch!r}, batch {batch!r}; start again")
    return epoch, batch


def check_batch_size(batch_size: int, n_rows: int) -> None:
    """Raise UserError when no batch can be full."""
    if not 1 <= batch_size <= n_rows:
        raise UserError(
            f"batch size {batch_size} with {n_rows} training rows: no full batch; lower --batch-size or give more rows"
        )
