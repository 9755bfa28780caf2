"""Wrong values in every place of a JSON file, for readers that must refuse them or live with them."""

import copy
import itertools
from collections.abc import Callable, Iterator

WRONG: tuple[object, ...] = (
    None, True, -1, 3, 10**400, 1e308, float("nan"), float("-inf"), "x", "\ud800", [], [1], [[]], {},
    {"a": 1}, {"a": {}},
)  # fmt: skip
GONE = object()


def places(value: object, path: tuple = ()) -> Iterator[tuple]:
    """Yield the path of every part of a JSON value: of lists the first two parts stand for all."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places(item, (*path, key))
    elif isinstance(value, list):
        for i, item in enumerate(value[:2]):
            yield from places(item, (*path, i))


def spoiled(value: object, path: tuple, wrong: object) -> object:
    """Return a copy with one part replaced, or taken away."""
    out = copy.deepcopy(value)
    at: object = out
    for key in path[:-1]:
        at = at[key]  # type: ignore[index]
    if wrong is GONE:
        del at[path[-1]]  # type: ignore[attr-defined]
    else:
        at[path[-1]] = wrong  # type: ignore[index]
    return out


def every_spoiled(
    value: object, step: int, changed: Callable[[object], None], wrong: tuple = WRONG
) -> Iterator[str]:
    """Hand a spoiled copy for every `step`th place to `changed`, with the wrong values in turn; yield what it was."""
    turns = itertools.cycle([*wrong, GONE])
    for path in itertools.islice(places(value), 0, None, step):
        bad = next(turns)
        changed(spoiled(value, path, bad))
        yield f"{path} = {'gone' if bad is GONE else repr(bad)[:40]}"
