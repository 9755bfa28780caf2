"""The one exception for bad input. The command line prints it as one line and exits with code 2."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator, Sequence
from os import PathLike


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


def nearest(word: str, choices: Iterable[str], n: int = 3) -> str:
    """Return ' (nearest: a, b)' for the choices closest to `word`, or '' when nothing is close."""
    close = difflib.get_close_matches(word, list(choices), n=n, cutoff=0.4)
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
