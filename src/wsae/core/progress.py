"""Progress as a callback: library code reports, the command line draws. `quiet` is the default everywhere."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, runtime_checkable


@runtime_checkable
class Tick(Protocol):
    """Report `n` more units done; `fields` are shown beside the bar (loss=0.12, ...)."""

    def __call__(self, n: int, **fields: float | str) -> None:
        """Report."""
        ...


@runtime_checkable
class Progress(Protocol):
    """`with progress("harvest", total, "tokens") as tick: tick(n)`; `total` None means unknown."""

    def __call__(
        self, task: str, total: int | None, unit: str, done: int = 0
    ) -> AbstractContextManager[Tick]:
        """Begin a task, `done` units of which are done already."""
        ...


@contextmanager
def quiet(task: str, total: int | None, unit: str, done: int = 0) -> Iterator[Tick]:  # noqa: ARG001
    """Report nothing."""
    yield lambda n, **fields: None  # noqa: ARG005
