"""Tables of Figures 4 and 5 as header and rows of text; scores in percent, intervals over seeds."""

from collections.abc import Sequence
from typing import Any

from wsae.evals.classes.score import SCORES
from wsae.experiments.sweep.table import Mean, mean_interval, select
from wsae.experiments.vision.figures import over_seeds, places
from wsae.experiments.vision.rows import WAYS, Row

Table = dict[str, Any]
NONE = "-"
COLUMNS = {
    "NCL": "consistency_ncl",
    "one mini-batch": "ncl_minibatch",
    "top": "consistency_top",
    "corrected": "consistency_corrected",
    "selectivity": "selectivity",
    "alive": "share_alive",
    "supported": "share_supported",
}


def tables(rows: Sequence[Row]) -> dict[str, Table]:
    """Return every table by title, backbone by backbone and hook by hook."""
    out = {}
    for backbone, hook in places(rows):
        here = select(rows, backbone=backbone, hook=hook)
        out[f"{backbone}, {hook}: semantic consistency in %, mean over seeds"] = _scores(here)
        out[f"{backbone}, {hook}: weighted minus plain, points (information in bits)"] = _gains(
            here
        )
    return out


def _scores(rows: list[Row]) -> Table:
    body = []
    for name in dict.fromkeys(row["member"] for row in rows):
        cells = [_cell(over_seeds(rows, name, key), 100.0) for key in COLUMNS.values()]
        bits = _cell(over_seeds(rows, name, "information"), 1.0, ".4f")
        trained = "fvu" in select(rows, member=name)[0]
        others = ("fvu", "fvu_weighted", "effective_dimensions")
        shown = [
            _cell(over_seeds(rows, name, key), 1.0, ".4g") if trained else NONE for key in others
        ]
        body.append([name, *cells, bits, *shown])
    header = ["", *COLUMNS, "information, bits", "FVU", "weighted FVU", "effective dimensions"]
    return {"header": header, "rows": body}


def _gains(rows: list[Row]) -> Table:
    body = []
    members = dict.fromkeys(row["member"] for row in rows if row.get("differences"))
    for name in members:
        mine = select(rows, member=name)
        for score in SCORES:
            form = (1.0, "+.4f") if score == "information" else (100.0, "+.1f")
            found = ([row["differences"][score].get(way) for row in mine] for way in WAYS)
            cells = [_over_seeds(list(parts), *form) for parts in found]
            body.append([name, score, *cells])
    return {"header": ["", "score", *WAYS], "rows": body}


def _over_seeds(found: list[Row | None], scale: float, form: str) -> str:
    """Return the mean difference over seeds with Student's interval; one seed keeps its own interval."""
    values = [part["difference"] for part in found if part and part["difference"] is not None]
    if not found or len(values) < len(found):
        return NONE
    if len(values) == 1 and found[0]:
        return _cell(Mean(values[0], found[0]["low"], found[0]["high"], 1), scale, form)
    return _cell(mean_interval(values), scale, form)


def _cell(mean: Mean | None, scale: float, form: str = ".1f") -> str:
    if mean is None:
        return NONE
    shown = f"{scale * mean.value:{form}}"
    if mean.low is None or mean.high is None:
        return shown
    return f"{shown} [{scale * mean.low:{form}}, {scale * mean.high:{form}}]"
