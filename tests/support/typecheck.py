"""Types of arguments and results are checked at the first calls of every function in a test; checking all would take
as long as the tests themselves."""

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

from beartype import beartype

CHECKS = 20
"""Of each function in each test: a call has two, of its arguments and of its result."""
_counts: dict[tuple[str, str], int] = {}
_unchecked: list[Callable] = []


def first_calls(fn: Callable) -> Callable:
    """Check as beartype does, and tell jaxtyping to leave the function alone once it was checked CHECKS times."""
    key = (fn.__module__, fn.__qualname__)
    made = functools.cache(lambda: beartype(fn))  # at the first call: most functions have none

    @functools.wraps(fn)
    def counting(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        result = made()(*args, **kwargs)
        _counts[key] = _counts.get(key, 0) + 1
        if _counts[key] == CHECKS and (found := _function(*key)):
            found.__no_type_check__ = True  # type: ignore[attr-defined]
            _unchecked.append(found)
        return result

    return counting


def again() -> None:
    """Check every function's first calls anew."""
    for fn in _unchecked:
        del fn.__no_type_check__  # type: ignore[attr-defined]
    _unchecked.clear()
    _counts.clear()


def _function(module: str, qualname: str) -> Callable | None:
    """Return the function of that name; none for one inside another function, which stays checked."""
    found: Any = sys.modules.get(module)
    for name in qualname.split("."):
        found = inspect.getattr_static(found, name, None)
    if isinstance(found, (staticmethod, classmethod)):
        found = found.__func__
    elif isinstance(found, property):
        found = found.fget
    return found if inspect.isfunction(found) else None
