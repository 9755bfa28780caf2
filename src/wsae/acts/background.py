"""Work in another thread: items behind a short queue, or one value computed ahead of its use."""

import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar, cast

import torch

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


class Ahead(Generic[T]):
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
