"""What stops a run in the middle, as Ctrl-C does: a source at a given step, and a progress in the second training."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from jaxtyping import Float
from torch import Tensor

from wsae.acts.source import ArraySource
from wsae.core.progress import Tick, quiet


class Halting(ArraySource):
    """Rows that serve `stop` batches and send SIGINT with the last."""

    def __init__(self, rows: Float[Tensor, "rows d_in"], stop: int) -> None:
        super().__init__(rows)
        self.stop = stop

    def stream(self, batch_size, seed, state=None):  # noqa: ANN001, ANN202
        inner, served = super().stream(batch_size, seed, state), 0
        forward = inner.next

        def counting():  # noqa: ANN202
            nonlocal served
            served += 1
            if served == self.stop:
                os.kill(os.getpid(), signal.SIGINT)
            return forward()

        inner.next = counting  # type: ignore[method-assign]
        return inner


class HaltingProgress:
    """Progress that raises KeyboardInterrupt at the fifth report of the second run's training."""

    def __init__(self) -> None:
        self.trainings = 0

    @contextmanager
    def __call__(self, task: str, total: int | None, unit: str, done: int = 0) -> Iterator[Tick]:
        self.trainings += task == "train"
        with quiet(task, total, unit, done) as tick:
            yield self.stopping() if task == "train" and self.trainings == 2 else tick

    @staticmethod
    def stopping() -> Tick:
        ticks = 0

        def tick(*_: object, **__: object) -> None:
            nonlocal ticks
            ticks += 1
            if ticks == 5:
                raise KeyboardInterrupt

        return tick
