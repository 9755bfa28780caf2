"""Shapes and types of tensors are checked at the first calls, in a test, of every function that states them; checking
all calls would take as long as the tests themselves, and what states no tensor is the static type checker's."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any, get_args

import jaxtyping
from jaxtyping import AbstractArray

CALLS = 3
"""Checked of each function in each test."""
_jaxtyped = jaxtyping.jaxtyped
_begun: list[list[int]] = []
"""How many calls are still checked, of each function that was called in this test."""


def install(*packages: str) -> None:
    """Check the functions of packages that are imported from now on."""
    jaxtyping.jaxtyped = _first_calls  # which the hook writes above every function and class
    jaxtyping.install_import_hook(packages, "beartype.beartype")


def again() -> None:
    """Check every function's first calls anew."""
    for left in _begun:
        left[0] = CALLS
    _begun.clear()


def _first_calls(fn: Callable | None = None, *, typechecker: Callable) -> Callable:
    if fn is None:
        return functools.partial(_first_calls, typechecker=typechecker)
    if inspect.isclass(fn):
        if is_dataclass(fn):
            fn.__init__ = _first_calls(fn.__init__, typechecker=typechecker)
        return fn
    if not any(map(_states_tensors, fn.__annotations__.values())):
        return fn
    made = functools.cache(lambda: _jaxtyped(fn, typechecker=typechecker))  # most are never called
    left = [CALLS]

    @functools.wraps(fn)
    def counting(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if not left[0]:
            return fn(*args, **kwargs)
        if left[0] == CALLS:
            _begun.append(left)
        left[0] -= 1
        return made()(*args, **kwargs)

    return counting


def _states_tensors(annotation: object) -> bool:
    if isinstance(annotation, str):
        return "[Tensor," in annotation or "[np.ndarray," in annotation
    if isinstance(annotation, type) and issubclass(annotation, AbstractArray):
        return True
    return any(map(_states_tensors, get_args(annotation)))
