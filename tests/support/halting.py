"""A source that asks its run to stop, as Ctrl-C does, while a given step is being made."""

import os
import signal

from jaxtyping import Float
from torch import Tensor

from wsae.acts.source import ArraySource


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
