"""Tables of a study as header and rows of text, and as Markdown ready to paste. Scores are in percent."""

from collections.abc import Sequence
from typing import Any

from wsae.experiments.sweep.table import mean_interval, select
from wsae.experiments.tables.analysis import WAYS
from wsae.experiments.tables.paper import HALF, ONE, PAPER, PLAIN, PaperTable, TableName
from wsae.experiments.tables.rows import Row, scores_of

Table = dict[str, Any]
"""header and rows, all text."""

NAMES = {PLAIN: "original SAE", HALF: "weighted SAE, alpha 0.5", ONE: "weighted SAE, alpha 1"}
NONE = "-"
"""Stands for what was not measured."""


def paper_table(name: TableName) -> Table:
    """Return the paper's table with the gains and their mean over layers."""
    table = PAPER[name]
    rows = []
    for method, scores in table.scores.items():
        mean = sum(scores) / len(scores)
        rows.append([NAMES[method], *(f"{s:.1f}" for s in scores), f"{mean:.1f}"])
        if method != PLAIN:
            rows.append(
                ["gain", *(f"{g:+.1f}" for g in table.gains(method)), _paper_mean(table, method)]
            )
    return {"header": [f"{table.model}, layer", *map(str, table.layers), "mean"], "rows": rows}


def _paper_mean(table: PaperTable, method: str) -> str:
    mean = mean_interval(table.gains(method))
    return _cell(round(mean.value, 6), mean.low, mean.high, sign=True)  # 3.75 is shown as 3.8


def score_table(rows: Sequence[Row], hooks: Sequence[str], score: str) -> Table:
    """Return member x hook -> mean score over latents of the first seed with its interval, and the mean over hooks."""
    out = []
    for name in dict.fromkeys(row["member"] for row in rows):
        found = [_first(rows, name, hook) for hook in hooks]
        cells = [_of(row["scores"].get(score, {}) if row else {}) for row in found]
        if any(cell != NONE for cell in cells):
            out.append([name, *cells, _mean_cell([_value(row, score) for row in found])])
    return {"header": ["", *hooks, "mean"], "rows": out}


def fvu_table(rows: Sequence[Row], hooks: Sequence[str]) -> Table:
    """Return member x hook -> plain FVU of the first seed."""
    out = []
    for name in dict.fromkeys(row["member"] for row in rows):
        found = [_first(rows, name, hook) for hook in hooks]
        fvus = [row["metrics"].get("fvu", {}).get("value") if row else None for row in found]
        if any(v is not None for v in fvus):
            out.append([name, *(NONE if v is None else f"{v:.3f}" for v in fvus)])
    return {"header": ["", *hooks], "rows": out}


def gain_table(
    lines: Sequence[dict[str, Any]],
    means: Sequence[dict[str, Any]],
    hooks: Sequence[str],
    score: str,
) -> Table:
    """Return (member, way of comparing) x hook -> difference in points with its interval, and the mean over hooks."""
    out = []
    for name in dict.fromkeys(line["member"] for line in lines):
        for way, words in WAYS.items():
            mine = select(lines, member=name, score=score, way=way)
            by_hook = {line["hook"]: line for line in mine}
            if mine:
                cells = [_of(by_hook.get(hook, {}), sign=True) for hook in hooks]
                whole = select(means, member=name, score=score, way=way)
                last = _over_hooks(whole[0], len(hooks)) if whole else NONE
                out.append([name, words, *cells, last])
    return {"header": ["", "compared over", *hooks, "mean over hooks"], "rows": out}


def _over_hooks(line: dict[str, Any], hooks: int) -> str:
    some = f" ({line['hooks']} of {hooks} hooks)" if line["hooks"] < hooks else ""
    return _of(line, sign=True) + some


def tables(
    rows: Sequence[Row],
    lines: Sequence[dict[str, Any]],
    means: Sequence[dict[str, Any]],
    hooks: Sequence[str],
) -> dict[str, Table]:
    """Return every table of our own results, by title."""
    out = {}
    for score in scores_of(rows):
        out[f"{score}: score in % [95 % interval over latents]"] = score_table(rows, hooks, score)
        out[f"{score}: weighted minus plain, points"] = gain_table(lines, means, hooks, score)
    out["plain FVU"] = fvu_table(rows, hooks)
    return {title: table for title, table in out.items() if table["rows"]}


def markdown(titled: dict[str, Table]) -> str:
    """Return tables as Markdown."""
    parts = []
    for title, table in titled.items():
        lines = [table["header"], ["---"] * len(table["header"]), *table["rows"]]
        body = "\n".join(
            f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in lines
        )
        parts.append(f"**{title}**\n\n{body}\n")
    return "\n".join(parts)


def _first(rows: Sequence[Row], name: str, hook: str) -> Row | None:
    found = select(rows, member=name, hook=hook)
    return min(found, key=lambda row: row["seed"]) if found else None


def _value(row: Row | None, score: str) -> float | None:
    return None if row is None else row["scores"].get(score, {}).get("value")


def _of(record: dict[str, Any], sign: bool = False) -> str:
    value = record.get("difference" if sign else "value")
    return (
        NONE if value is None else _cell(value, record.get("low"), record.get("high"), sign, 100.0)
    )


def _cell(
    value: float, low: float | None, high: float | None, sign: bool = False, scale: float = 1.0
) -> str:
    shown = f"{scale * value:{'+' if sign else ''}.1f}"
    if low is None or high is None:
        return shown
    return (
        f"{shown} [{scale * low:{'+' if sign else ''}.1f}, {scale * high:{'+' if sign else ''}.1f}]"
    )


def _mean_cell(found: Sequence[float | None]) -> str:
    kept = [value for value in found if value is not None]
    return f"{100 * sum(kept) / len(kept):.1f}" if len(kept) == len(found) else NONE
