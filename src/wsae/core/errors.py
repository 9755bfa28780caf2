"""The one exception for bad input. The command line prints it as one line and exits with code 2."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input: the message names the value, the place and the mend, in one line."""


def nearest(word: str, choices: Iterable[str], n: int = 3) -> str:
    """Return ' (nearest: a, b)' for the choices closest to `word`, or '' when nothing is close."""
    close = difflib.get_close_matches(word, list(choices), n=n, cutoff=0.4)
    return f" (nearest: {', '.join(close)})" if close else ""
