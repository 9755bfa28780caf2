"""What goes wrong, in one line: bad input, and memory that ran out. The command line prints it and exits with 2."""

import contextlib
import difflib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import NamedTuple


class UserError(ValueError):
    """Bad input: the message names the value, the place and the fix, in one line.

    What a stranger's file puts into it cannot break the line or steer a terminal: white space becomes a space, other
    characters that do not print are spelled out.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """Return text in which what does not print is spelled out: a file's name cannot steer a terminal."""
    return text if text.isprintable() else "".join(map(_shown, text))


def _shown(char: str) -> str:
    if char.isprintable():
        return char
    return " " if char.isspace() else ascii(char)[1:-1]


def reason(error: BaseException, limit: int = 300) -> str:
    """Return what a library's exception says, its lines as one, cut at a word; its type where it says nothing."""
    text = " ".join(str(error).split()).rstrip(" :")
    if not text:
        return type(error).__name__
    return text if len(text) <= limit else f"{text[:limit].rsplit(' ', 1)[0].rstrip(' ,:;(')} ..."


def first_line(error: BaseException) -> str:
    """Return the first line of what a library's exception says; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def named(names: Sequence[str], n: int = 3) -> str:
    """Return the first names, and how many there are in all where that is more."""
    more = f", ...: {len(names):,} in all" if len(names) > n else ""
    return ", ".join(names[:n]) + more


def nearest(word: str, choices: Iterable[str], n: int = 3, least: float = 0.55) -> str:
    """Return ' (nearest: a, b)' for the choices closest to `word`, or that hold it; '' when nothing is close.

    Likeness is difflib's ratio, without leading dashes: at least `least`, and not far below the best.
    """
    bare = word.lstrip("-")
    likeness = {
        choice: max(
            difflib.SequenceMatcher(None, choice.lstrip("-"), bare).ratio(),
            least * (len(bare) > 2 and bare in choice),
        )
        for choice in choices
    }
    enough = max(least, max(likeness.values(), default=0) - 0.25)
    close = sorted((c for c in likeness if likeness[c] >= enough), key=lambda c: -likeness[c])[:n]
    return f" (nearest: {', '.join(close)})" if close else ""


@contextlib.contextmanager
def understood(path: PathLike[str] | str) -> Iterator[None]:
    """Turn what reading a file of another form raises inside into a UserError naming `path`.

    For content that is whole, by its checksum, and yet not what wsae writes: made by hand or by an attacker.
    """
    try:
        yield
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, StopIteration) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise UserError(
            f"{path}: not of the form that this wsae writes ({reason}); make it again"
        ) from error


# Sizes and times as people read them.


def duration(seconds: int | float) -> str:
    """Return seconds as `0.4 s`, `45 s`, `4 min 05 s` or `2 h 10 min`."""
    whole = round(seconds)
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(n_bytes: int | float) -> str:
    """Return bytes as `512 B`, `1.5 KB`, `340 MB` or `2.1 GB` (powers of 1000)."""
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if n_bytes >= step:
            value = n_bytes / step
            return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}"
    return f"{n_bytes:.0f} B"


_UNITS = {unit: 1024**power for power, unit in enumerate(("", "K", "M", "G", "T", "P"))}
_WANTED = re.compile(r"allocate (?P<number>[\d.]+) ?(?P<unit>[KMGTP]?)i?B?(?:ytes)?", re.IGNORECASE)
_SAYS = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "bad_alloc",
    "storage size calculation overflowed",
)
_NEAR = 0.03
"""A request this near to a buffer's size is for it (allocators round up, a message rounds to two digits)."""


class Buffer(NamedTuple):
    """A tensor that work needs: name, shape, bytes per value, and the setting to lower."""

    name: str
    shape: tuple[int, ...]
    width: int
    lower: str

    @property
    def bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.width

    def __str__(self) -> str:
        """Return it as `pre-activations [4096, 24576], 403 MB`."""
        return f"{self.name} {list(self.shape)}, {size(self.bytes)}"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception of Python, NumPy or PyTorch (CPU or GPU) means that memory ran out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _SAYS)


def proc(name: str) -> dict[str, int]:
    """Return the sizes in a file of Linux's /proc ("meminfo", "self/status") in bytes; raises OSError elsewhere."""
    lines = Path("/proc", name).read_text(encoding="utf-8").splitlines()
    return {
        line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if line.endswith(" kB")
    }


def most_memory() -> int:
    """Return the bytes that all processes of this Linux machine (or container) can hold together, swap included.

    Raises OSError where the system does not tell.
    """
    found = proc("meminfo")
    total = found["MemTotal"] + found.get("SwapTotal", 0)
    with contextlib.suppress(OSError, ValueError):  # no such group, or "max"
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return total


@contextlib.contextmanager
def explained(
    doing: str, buffers: Callable[[], Iterable[Buffer]], lower: str = "--batch-size"
) -> Iterator[None]:
    """Turn running out of memory inside into a UserError that names the buffer; other errors pass.

    `buffers` lists what the work allocates, asked for only then: the one of the refused size is named with its setting,
    else the largest with `lower`.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(_message(doing, list(buffers()), lower, str(error))) from error


def _message(doing: str, buffers: list[Buffer], lower: str, text: str) -> str:
    hint = "(`wsae doctor` estimates the need)"
    wanted = _wanted(text)
    fits = [b for b in buffers if wanted and abs(b.bytes - wanted) <= _NEAR * wanted]
    if fits:
        best = min(fits, key=lambda b: abs(b.bytes - (wanted or 0)))
        return f"out of memory while {doing}: no room for {best}; lower {best.lower} {hint}"
    what = f"{size(wanted)} more" if wanted else "what comes next"
    largest = max(buffers, key=lambda b: b.bytes, default=None)
    known = f" (its largest buffer is {largest})" if largest else ""
    lower = largest.lower if largest else lower
    return f"out of memory while {doing}: no room for {what}{known}; lower {lower} {hint}"


def _wanted(text: str) -> float | None:
    """Return the bytes that an allocator's message says were refused."""
    found = _WANTED.search(text)
    return float(found["number"]) * _UNITS[found["unit"].upper()] if found else None
