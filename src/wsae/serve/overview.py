"""The run as a whole, as the report words it, in JSON: the overview page is drawn from this without the run."""

from wsae.report import interpretation, view
from wsae.report.rundata import Json, RunData
from wsae.report.words import Judgement


def overview(run: RunData) -> Json:
    """Return verdicts, the members' metrics side by side, the scores, the setup and the glossary."""
    views = [view.hook_view(run, hook, index) for index, hook in enumerate(run.hooks)]
    hooks = [
        {
            "name": found.name,
            "verdict": found.verdict,
            "method": found.method,
            "members": [
                {"name": m.name, "kind": m.kind, "text": m.text, "control": m.is_control}
                for m in found.members
            ],
            "groups": [[name, [_row(row) for row in rows]] for name, rows in found.groups],
            "scores": _scores(found.interpretation),
            "classes": _scores(found.classes),
        }
        for found in views
    ]
    told = [[key, name, str(entry.get("formula", ""))] for key, name, entry in view.glossary(run)]
    return {"hooks": hooks, "cards": view.cards(run), "notes": run.notes, "glossary": told}


def _row(row: view.Row | interpretation.Row) -> Json:
    cells = [{"value": c.value, "bounds": c.bounds, "judged": _judged(c.judged)} for c in row.cells]
    return {"name": row.name, "tip": row.tip, "way": row.way, "cells": cells}


def _judged(judged: Judgement | None) -> Json | None:
    if judged is None:
        return None
    return {"outcome": judged.outcome, "mark": judged.mark, "text": judged.text, "how": judged.how}


def _scores(found: interpretation.ScoresView | None) -> Json | None:
    if found is None:
        return None
    columns = [{"name": c.name, "kind": c.kind, "text": c.text} for c in found.columns]
    return {"columns": columns, "rows": [_row(row) for row in found.rows], "judges": found.judges}
