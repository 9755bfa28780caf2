"""Shapes and types of tensors are checked at the first calls, in a test, of every function that states them; checking
all calls would take as long as the tests themselves, and what states no tensor is the static type checker's."""

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, get_args

from beartype import beartype
from jaxtyping import AbstractArray

CHECKS = 20
"""Of each function in each test: a call has two, of its arguments and of its result."""
_counts: dict[tuple[str, str], int] = {}
_unchecked: list[Callable] = []


def first_calls(fn: Callable) -> Callable:
    """Check as beartype does, and tell jaxtyping to leave the function alone once it was checked CHECKS times."""
    key = (fn.__module__, fn.__qualname__)
    if not any(map(_states_tensors, fn.__annotations__.values())):
        return _left_alone(fn, key)
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


def _left_alone(fn: Callable, key: tuple[str, str]) -> Callable:
    """Tell jaxtyping at the first call to leave the function alone for good."""

    @functools.cache
    def tell() -> None:
        if found := _function(*key):
            found.__no_type_check__ = True  # type: ignore[attr-defined]

    @functools.wraps(fn)
    def telling(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        tell()
        return fn(*args, **kwargs)

    return telling


def _states_tensors(annotation: object) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, AbstractArray):
        return True
    return any(map(_states_tensors, get_args(annotation)))


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
