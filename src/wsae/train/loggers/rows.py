"""Rows of `metrics.jsonl` as the scalars of one step, named as loggers show them."""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from wsae.train.metrics import read_json_lines

METRICS = "metrics.jsonl"
_KEYS = ("step", "hook", "member")


def scalars(rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Return name -> value of one step's rows: `member/metric`, with several hooks `hook/member/metric`."""
    rows = list(rows)
    several = len({row.get("hook") for row in rows}) > 1
    found: dict[str, float] = {}
    for row in rows:
        place = [row["hook"]] if several else []
        place += [row["member"]] if "member" in row else []
        for key, value in row.items():
            if key not in _KEYS and isinstance(value, int | float):
                found["/".join([*place, key])] = float(value)
    return found


def steps_of(run: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield step and scalars of all rows that the run has so far; raises UserError for a damaged line."""
    path = run / METRICS
    rows = read_json_lines(path) if path.exists() else []
    for step, of_step in itertools.groupby(rows, key=lambda row: int(row["step"])):
        yield step, scalars(of_step)
