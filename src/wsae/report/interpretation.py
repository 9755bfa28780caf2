"""The parts of the page that score latents: interpretability and classes, beside their controls, and who was scored.

The formulas are in `wsae.evals.autointerp.glossary` and `wsae.evals.classes.glossary`; here is only what a run says.
"""

from dataclasses import dataclass

import numpy as np

from wsae.report import charts
from wsae.report.charts import Figure
from wsae.report.rundata import Json, RunData, finite
from wsae.report.words import Judgement, interval, judge, number

ROWS = {
    "embedding": "Embedding detection",
    "surprisal": "Surprisal detection",
    "detection": "Detection",
    "fuzzing": "Fuzzing",
    "simulation": "Simulation",
    "consistency_top": "Consistency, strongest",
    "consistency_corrected": "Consistency above chance",
    "consistency_ncl": "Consistency, NCL",
    "selectivity": "Class selectivity",
    "information": "Class information",
}
"""Score -> its name for readers."""
COUNTED = ("requested", "parsed", "failed", "not_asked")
COMPARED = "matched"
"""The comparison shown under a weighted member: over latents matched with the twin's."""
OTHER_WAYS = {
    "all": "all latents",
    "density": "latents of the same density",
    "adjusted": "density regressed out",
    "within": "within classes",
}


@dataclass(frozen=True)
class Column:
    """A member or a control."""

    name: str
    kind: str
    """Colour class; empty for controls."""
    text: str
    entry: Json


@dataclass(frozen=True)
class Cell:
    """A mean score with its interval, its comparison with the twin, and what the other comparisons say."""

    value: str
    bounds: str
    judged: Judgement | None
    also: list[str]


@dataclass(frozen=True)
class Row:
    """One score over all columns."""

    key: str
    name: str
    tip: str
    way: str
    cells: list[Cell]


@dataclass(frozen=True)
class Fact:
    """One line of counts over all columns."""

    name: str
    cells: list[str]


@dataclass(frozen=True)
class ScoresView:
    """What the page shows of one hook."""

    columns: list[Column]
    rows: list[Row]
    facts: list[Fact]
    judges: list[tuple[str, str]]
    density: list[Figure]


def score_name(score: str) -> str:
    """Return the reader's name of a score."""
    return ROWS.get(score, score.replace("_", " "))


def interpretation_view(run: RunData, hook: str) -> ScoresView | None:
    """Collect everything shown for one hook; None when it was not interpreted."""
    return _view(run, hook, run.interpretation)


def classes_view(run: RunData, hook: str) -> ScoresView | None:
    """Collect what is shown of one hook's latents against class labels; None when they were not scored."""
    return _view(run, hook, run.classes)


def _view(run: RunData, hook: str, scored: Json) -> ScoresView | None:
    found = scored.get("hooks", {}).get(hook)
    if not found:
        return None
    glossary: Json = scored.get("glossary", {})
    columns = _columns(run, hook, found)
    scores = dict.fromkeys(key for column in columns for key in column.entry.get("summary", {}))
    return ScoresView(
        columns=columns,
        rows=[_row(glossary, found, columns, score) for score in scores],
        facts=_facts(columns, list(scores)) + _pairs(columns, found),
        judges=[(score_name(score), str(name)) for score, name in scored.get("judges", {}).items()],
        density=_density_figures(run, hook, found),
    )


def _columns(run: RunData, hook: str, found: Json) -> list[Column]:
    members, controls = found.get("members", {}), found.get("controls", {})
    ordered = [name for name in run.members(hook) if name in members]
    out = [Column(name, charts.kind_of(run, hook, name), "", members[name]) for name in ordered]
    return out + [
        Column(name, "", str(entry.get("about", "")), entry) for name, entry in controls.items()
    ]


def _row(glossary: Json, found: Json, columns: list[Column], score: str) -> Row:
    entry = glossary.get(score, {})
    tip = "; ".join(str(entry[part]) for part in ("formula", "direction") if entry.get(part))
    judged = _judgements(glossary, found, score)
    cells = [_cell(column, score, judged) for column in columns]
    return Row(score, str(entry.get("name") or score_name(score)), tip, "higher", cells)


def _judgements(glossary: Json, found: Json, score: str) -> dict[tuple[str, str], Judgement]:
    """Return the comparisons of one score by (member, way)."""
    lines = [line for line in found.get("comparisons", []) if line.get("metric") == score]
    pairs = [(line, judge(line, glossary)) for line in lines]
    return {(str(line.get("a")), str(line.get("over"))): j for line, j in pairs if j is not None}


def _cell(column: Column, score: str, judged: dict[tuple[str, str], Judgement]) -> Cell:
    record = column.entry.get("summary", {}).get(score, {})
    value, low, high = (finite(record.get(part)) for part in ("value", "low", "high"))
    shown, _, bounds = interval(value, low, high).partition(" ")
    also = [
        f"{words}: {judged[column.name, way].text or 'the same'}"
        for way, words in OTHER_WAYS.items()
        if (column.name, way) in judged
    ]
    return Cell(shown, bounds, judged.get((column.name, COMPARED)), also)


def _facts(columns: list[Column], scores: list[str]) -> list[Fact]:
    """Return the counts behind the means; nothing that was left out goes unsaid."""
    out = [
        Fact("latents scored", [_scored(column.entry) for column in columns]),
        Fact("their density, median", [_median(column.entry) for column in columns]),
    ]
    for score in scores:
        cells = [_answers(column.entry.get("summary", {}).get(score, {})) for column in columns]
        if any(cells):
            out.append(Fact(f"{score_name(score)}: answers", cells))
    return out


def _pairs(columns: list[Column], found: Json) -> list[Fact]:
    """Return how many matched latents each comparison with the twin is over, and how alike they are."""
    lines = [
        line for line in found.get("comparisons", []) if finite(line.get("cosine")) is not None
    ]
    out = []
    for score in dict.fromkeys(str(line.get("metric")) for line in lines):
        said = {line.get("a"): _likeness(line) for line in lines if line.get("metric") == score}
        cells = [said.get(column.name, "") for column in columns]
        out.append(Fact(f"{score_name(score)}: matched latents compared", cells))
    return out


def _likeness(line: Json) -> str:
    cosine, chance = number(finite(line.get("cosine"))), number(finite(line.get("chance")))
    return f"{line.get('n')} of {line.get('sampled')}, mean cosine {cosine} (chance {chance})"


def _scored(entry: Json) -> str:
    counts: Json = entry.get("counts", {})
    skipped = {k: n for k, n in counts.get("skipped", {}).items() if n}
    left = "; ".join(f"{n:,} skipped: {reason}" for reason, n in skipped.items())
    text = f"{counts.get('scored', 0):,} of {counts.get('sampled', 0):,}"
    return f"{text} ({left})" if left else text


def _median(entry: Json) -> str:
    quantiles: Json = entry.get("density", {})
    return number(finite(quantiles.get("0.5")))


def _answers(record: Json) -> str:
    """'requested = parsed + failed + not asked' in words; nothing where nothing was asked."""
    if record.get("requested") is None:
        return ""
    requested, *rest = (f"{record.get(key, 0):,} {key.replace('_', ' ')}" for key in COUNTED)
    return f"{requested} = {' + '.join(rest)}"


def _density_figures(run: RunData, hook: str, found: Json) -> list[Figure]:
    """Draw the densities of the scored latents, each weighted member over its twin."""
    pool = {
        name: np.array([finite(latent.get("density")) or 0.0 for latent in entry["latents"]])
        for name, entry in found.get("members", {}).items()
        if entry.get("latents")
    }
    shown = [name for name in pool if not run.is_plain(hook, name)] or list(pool)
    out = []
    for member in shown:
        twin = run.twin_of(hook, member)
        twin = twin if twin in pool else None
        title = f"{member} beside {twin}" if twin else member
        svg = charts.density_chart(run, hook, (twin, member), pool)
        out.append(Figure(title, "", svg))
    return out
