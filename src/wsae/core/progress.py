"""Progress as a callback: library code reports; `quiet`, the default everywhere, and what draws it on a terminal."""

import io
import os
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TextIO, TypeVar, cast, runtime_checkable

from wsae.core.errors import duration, printable

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

EVERY_S = 10.0
"""Seconds between lines of progress where there is no terminal."""
Stream = TextIO | io.TextIOBase
"""What stdout and stderr may be."""


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


@contextmanager
def progress(task: str, total: int | None, unit: str, done: int = 0) -> Iterator[Tick]:
    """Show progress on stderr: a bar with rate and time left on a terminal, elsewhere a line every ten seconds.

    Goes where a call takes `progress`: `wsae.fit(acts, progress=wsae.progress)`.
    """
    with Drawn(sys.stderr) as drawn, drawn.progress(task, total, unit, done) as tick:
        yield tick


D = TypeVar("D", bound="Drawn")


class Drawn:
    """Progress and notes on one stream: bars on a terminal, elsewhere a line every `every_s` seconds."""

    def __init__(self, stderr: Stream, every_s: float = EVERY_S) -> None:
        self.stderr, self.every_s = stderr, every_s
        self._bars: Bars | None = None

    def __enter__(self: D) -> D:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def note(self, text: str) -> None:
        """Tell the user something while work goes on."""
        text = printable_lines(text)
        if self._bars is not None:
            self._bars.console.print(text, markup=False, highlight=False)
        else:
            self.stderr.write(text + "\n")
            self.stderr.flush()

    @contextmanager
    def progress(self, task: str, total: int | None, unit: str, done: int = 0) -> Iterator[Tick]:
        """Show the progress of `task`; see `Progress`."""
        if self.stderr.isatty() and os.environ.get("TERM", "") != "dumb":
            with self._bar(task, total, unit, done) as tick:
                yield tick
        else:
            lines = Lines(self, task, total, unit, done)
            yield lines.tick
            lines.close()

    @contextmanager
    def _bar(self, task: str, total: int | None, unit: str, done: int) -> Iterator[Tick]:
        bars = self._started()
        start = time.monotonic()
        count = done
        key = bars.add_task(task, total=total, completed=done, rate="", note="")

        def tick(n: int, **fields: float | str) -> None:
            nonlocal count
            count += n
            rate = (count - done) / max(time.monotonic() - start, 1e-9)
            text = f"{rate_text(rate)} {unit}/s"
            note: dict[str, Any] = {"note": " ".join(fields_text(fields))} if fields else {}
            bars.update(key, advance=n, rate=text, **note)

        try:
            yield tick
        finally:
            bars.stop_task(key)
            bars.refresh()

    def _started(self) -> "Bars":
        if self._bars is None:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )

            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                console=Console(file=cast(TextIO, self.stderr), highlight=False),
                refresh_per_second=4,
            )
            self._bars.start()
        return self._bars


class Lines:
    """Progress as plain lines: one every `every_s` seconds, and one at the end of anything that long."""

    def __init__(self, drawn: Drawn, task: str, total: int | None, unit: str, done: int) -> None:
        self.drawn, self.task, self.total, self.unit = drawn, task, total, unit
        self.start = self.last = time.monotonic()
        self.first = self.done = done
        self.fields: dict[str, float | str] = {}

    def tick(self, n: int, **fields: float | str) -> None:
        """Count `n` more units and print a line when one is due."""
        self.done += n
        self.fields = fields or self.fields
        now = time.monotonic()
        if now - self.last >= self.drawn.every_s:
            self.last = now
            self.drawn.note(self.line(now))

    def close(self) -> None:
        """Print the last line if any was printed."""
        if self.last > self.start:
            now = time.monotonic()
            self.drawn.note(f"{self.line(now, left=False)}, done in {duration(now - self.start)}")

    def line(self, now: float, left: bool = True) -> str:
        """Return `task: done/total unit (share), rate, time left, fields`."""
        rate = (self.done - self.first) / max(now - self.start, 1e-9)
        parts = [f"{self.task}: {self.done:,}"]
        if self.total:
            parts[0] += f"/{self.total:,} {self.unit} ({100 * self.done / self.total:.0f} %)"
        else:
            parts[0] += f" {self.unit}"
        parts.append(f"{rate_text(rate)} {self.unit}/s")
        if left and self.total and rate > 0:
            parts.append(f"{duration(max(self.total - self.done, 0) / rate)} left")
        return ", ".join([*parts, *fields_text(self.fields)])


def printable_lines(text: str) -> str:
    """Return lines of text in which nothing steers a terminal."""
    return "\n".join(printable(line.replace("\t", "    ")) for line in text.split("\n"))


def fields_text(fields: dict[str, float | str]) -> list[str]:
    """Return fields as `name=value`, numbers to four digits."""
    return [f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in fields.items()]


def rate_text(rate: float) -> str:
    """Return a rate with as many digits as carry meaning."""
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
