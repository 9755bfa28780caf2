"""What the user sees while a command works: bars on a terminal, a line every ten seconds elsewhere.

Everything here goes to stderr; a command's result goes to stdout through `UI.say` and `UI.table`.
"""

import io
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO, cast

from wsae.core.errors import printable
from wsae.core.memory import duration
from wsae.core.progress import Tick

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

EVERY_S = 10.0
WIDE = 10_000
"""Columns where no terminal sets a limit."""


Stream = TextIO | io.TextIOBase
"""What stdout and stderr may be."""


class UI:
    """The terminal: notes and progress on stderr, results on stdout."""

    def __init__(self, stdout: Stream, stderr: Stream, every_s: float = EVERY_S) -> None:
        self.stdout = stdout
        self.stderr = stderr
        self.every_s = every_s
        self.bars: Bars | None = None

    def __enter__(self) -> "UI":
        """Start drawing."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop drawing and give the cursor back."""
        if self.bars is not None:
            self.bars.stop()
            self.bars = None

    def note(self, text: str) -> None:
        """Tell the user something while the command works (stderr)."""
        text = _lines(text)
        if self.bars is not None:
            self.bars.console.print(text, markup=False, highlight=False)
        else:
            self.stderr.write(text + "\n")
            self.stderr.flush()

    def say(self, text: str) -> None:
        """Print a line of the result (stdout)."""
        self.stdout.write(_lines(text) + "\n")

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Print a table of the result (stdout): fitted to a terminal, one line per row elsewhere."""
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        live = self.stdout.isatty()
        text = io.StringIO()
        console = Console(
            file=text, highlight=False, force_terminal=live, width=None if live else WIDE
        )
        table = Table(
            title=printable(title),
            title_justify="left",
            title_style="bold",
            box=None,
            pad_edge=False,
        )
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*(Text(printable(cell), style=_STYLES.get(cell, "")) for cell in row))
        console.print(table)
        self.stdout.write("".join(f"{line.rstrip()}\n" for line in text.getvalue().splitlines()))

    @contextmanager
    def progress(self, task: str, total: int | None, unit: str, done: int = 0) -> Iterator[Tick]:
        """Show the progress of `task`; see wsae.core.progress.Progress."""
        if self.stderr.isatty() and os.environ.get("TERM", "") != "dumb":
            with _bar(self, task, total, unit, done) as tick:
                yield tick
        else:
            lines = Lines(self, task, total, unit, done)
            yield lines.tick
            lines.close()


def _lines(text: str) -> str:
    """Return lines of text in which nothing steers a terminal."""
    return "\n".join(printable(line.replace("\t", "    ")) for line in text.split("\n"))


_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


class Lines:
    """Progress as plain lines: one every `every_s` seconds, and one at the end of anything that long."""

    def __init__(self, ui: UI, task: str, total: int | None, unit: str, done: int) -> None:
        self.ui, self.task, self.total, self.unit = ui, task, total, unit
        self.start = self.last = time.monotonic()
        self.first = self.done = done
        self.fields: dict[str, int | float | str] = {}

    def tick(self, n: int, **fields: int | float | str) -> None:
        """Count `n` more units and print a line when one is due."""
        self.done += n
        self.fields = fields or self.fields
        now = time.monotonic()
        if now - self.last >= self.ui.every_s:
            self.last = now
            self.ui.note(self.line(now))

    def close(self) -> None:
        """Print the last line if any was printed."""
        if self.last > self.start:
            now = time.monotonic()
            self.ui.note(f"{self.line(now, left=False)}, done in {duration(now - self.start)}")

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


@contextmanager
def _bar(ui: UI, task: str, total: int | None, unit: str, done: int) -> Iterator[Tick]:
    bars = _bars(ui)
    start = time.monotonic()
    count = done
    key = bars.add_task(task, total=total, completed=done, rate="", note="")

    def tick(n: int, **fields: int | float | str) -> None:
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


def _bars(ui: UI) -> "Bars":
    if ui.bars is None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        ui.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=Console(file=cast(TextIO, ui.stderr), highlight=False),
            refresh_per_second=4,
        )
        ui.bars.start()
    return ui.bars


def fields_text(fields: dict[str, int | float | str]) -> list[str]:
    """Return fields as `name=value`, numbers to four digits."""
    return [f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in fields.items()]


def rate_text(rate: float) -> str:
    """Return a rate with as many digits as carry meaning."""
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
