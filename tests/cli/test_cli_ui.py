"""Progress on a terminal and elsewhere, and tables."""

import io
import re
import sys

import numpy as np
import pytest

import wsae
from wsae.cli.common import UI
from wsae.core.errors import duration, size
from wsae.core.progress import Drawn, Lines, Progress, fields_text, rate_text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_off_a_terminal_a_line_says_how_far_how_fast_and_how_long_still():
    err = io.StringIO()
    ui = UI(io.StringIO(), err, every_s=0.0)
    with ui, ui.progress("harvest", 100, "tokens") as tick:
        tick(25, loss=0.123456)
    first, last = err.getvalue().splitlines()
    assert re.fullmatch(
        r"harvest: 25/100 tokens \(25 %\), [\d,.e+]+ tokens/s, [\d.]+ s left, loss=0\.1235", first
    )
    assert "done in" in last


def test_short_work_off_a_terminal_prints_nothing():
    err = io.StringIO()
    ui = UI(io.StringIO(), err)
    with ui, ui.progress("quick", 3, "steps") as tick:
        tick(3)
    assert err.getvalue() == ""


def test_a_resumed_tasks_rate_counts_only_what_was_done_now():
    lines = Lines(Drawn(io.StringIO()), "train", 1000, "tokens", done=900)
    lines.tick(50)
    assert lines.line(lines.start + 10).startswith(
        "train: 950/1,000 tokens (95 %), 5 tokens/s, 10 s left"
    )


def test_an_unknown_total_shows_no_share_and_no_time_left():
    lines = Lines(Drawn(io.StringIO()), "read", None, "rows", done=0)
    lines.tick(30)
    assert lines.line(lines.start + 10) == "read: 30 rows, 3 rows/s"


def test_on_a_terminal_a_bar_is_drawn_and_the_cursor_given_back(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    err = Terminal()
    ui = UI(io.StringIO(), err)
    with ui:
        with ui.progress("train", 10, "tokens") as tick:
            tick(10, fvu=0.5)
        with ui.progress("evaluate", 5, "tokens") as tick:
            tick(5)
        ui.note("[not markup]")
    drawn = err.getvalue()
    assert "train" in drawn
    assert "evaluate" in drawn
    assert "fvu=0.5" in drawn
    assert "[not markup]" in drawn
    assert drawn.rstrip().endswith("\x1b[?25h")
    assert ui._bars is None


def test_an_error_inside_a_task_passes_through_and_ends_the_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    ui = UI(io.StringIO(), Terminal())
    with pytest.raises(RuntimeError, match="inside"), ui, ui.progress("train", 10, "tokens"):
        raise RuntimeError("inside")
    assert ui._bars is None


def test_a_call_from_python_draws_a_bar_with_rate_and_time_left(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", Terminal())
    progress: Progress = wsae.progress
    acts = np.random.default_rng(0).normal(size=(400, 8)).astype(np.float32)
    wsae.fit(acts, k=2, d_sae=16, tokens=4_000, batch_size=200, progress=progress)
    drawn = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", sys.stderr.getvalue())
    assert re.search(r"train .*4000/4000 .*tokens/s .* left", drawn)
    assert sys.stderr.getvalue().rstrip().endswith("\x1b[?25h")


def test_a_table_goes_to_stdout_whole_and_without_markup():
    out = io.StringIO()
    UI(out, io.StringIO()).table(
        "title", ("a", "b"), [("ok", "[bold]kept[/bold]"), ("fail", "x" * 90)]
    )
    text = out.getvalue()
    assert "[bold]kept[/bold]" in text
    assert "x" * 90 in text
    assert "\x1b" not in text


def test_numbers_read_well():
    assert fields_text({"loss": 0.123456, "hook": "h.1"}) == ["loss=0.1235", "hook=h.1"]
    assert [rate_text(r) for r in (0.123, 9.99, 1234.5)] == ["0.12", "10", "1,234"]
    assert [duration(s) for s in (0.44, 45, 61, 3599.6, 7800)] == [
        "0.4 s", "45 s", "1 min 01 s", "1 h 00 min", "2 h 10 min",
    ]  # fmt: skip
    assert [size(b) for b in (12, 1500, 340e6, 2.13e9, 1.2e12)] == [
        "12 B", "1.5 KB", "340 MB", "2.1 GB", "1,200 GB",
    ]  # fmt: skip
