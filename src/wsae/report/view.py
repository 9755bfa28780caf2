"""What the page's template shows: plain values built from a run, no markup."""

import json
from dataclasses import dataclass

import numpy as np

from wsae.report import charts
from wsae.report.charts import Figure
from wsae.report.rundata import RunData, find, finite, is_control
from wsae.report.words import (
    METRICS,
    OTHER,
    Judgement,
    clause,
    digits,
    direction,
    interval,
    judge,
    judgements,
    main_member,
    method,
    metric_name,
    number,
    verdict,
    weighting,
)
from wsae.run import Json

# The parts of the page that score latents: interpretability and classes, beside their controls, and
# who was scored.
#
# The formulas are in `wsae.evals.autointerp.summary` and `wsae.evals.classes.score`; here is
# only what a run says.

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
class ScoreCell:
    """A mean score with its interval, its comparison with the twin, and what the other comparisons say."""

    value: str
    bounds: str
    judged: Judgement | None
    also: list[str]


@dataclass(frozen=True)
class ScoreRow:
    """One score over all columns."""

    key: str
    name: str
    tip: str
    way: str
    cells: list[ScoreCell]


@dataclass(frozen=True)
class Fact:
    """One line of counts over all columns."""

    name: str
    cells: list[str]


@dataclass(frozen=True)
class ScoresView:
    """What the page shows of one hook."""

    columns: list[Column]
    rows: list[ScoreRow]
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
        rows=[_score_row(glossary, found, columns, score) for score in scores],
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


def _score_row(glossary: Json, found: Json, columns: list[Column], score: str) -> ScoreRow:
    entry = glossary.get(score, {})
    tip = "; ".join(str(entry[part]) for part in ("formula", "direction") if entry.get(part))
    judged = _judgements(glossary, found, score)
    cells = [_score_cell(column, score, judged) for column in columns]
    return ScoreRow(score, str(entry.get("name") or score_name(score)), tip, "higher", cells)


def _judgements(glossary: Json, found: Json, score: str) -> dict[tuple[str, str], Judgement]:
    """Return the comparisons of one score by (member, way)."""
    lines = [line for line in found.get("comparisons", []) if line.get("metric") == score]
    pairs = [(line, judge(line, glossary)) for line in lines]
    return {(str(line.get("a")), str(line.get("over"))): j for line, j in pairs if j is not None}


def _score_cell(column: Column, score: str, judged: dict[tuple[str, str], Judgement]) -> ScoreCell:
    record = column.entry.get("summary", {}).get(score, {})
    value, low, high = (finite(record.get(part)) for part in ("value", "low", "high"))
    shown, _, bounds = interval(value, low, high).partition(" ")
    also = [
        f"{words}: {judged[column.name, way].text or 'the same'}"
        for way, words in OTHER_WAYS.items()
        if (column.name, way) in judged
    ]
    return ScoreCell(shown, bounds, judged.get((column.name, COMPARED)), also)


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


HEAVIEST = 8
MATCHING = {
    "n_pairs": "latents paired one-to-one with the twin's",
    "decoder_cosine_mean": "mean cosine of a pair (1: the same direction)",
    "frac_above_0.9": "share of pairs that are near-copies (cosine above 0.9)",
    "frac_above_0.7": "share of pairs that are alike (cosine above 0.7)",
    "random_cosine_mean": "mean cosine that chance alone would give",
}
WITHOUT_MASK = {
    "cosine": "cosine of γ with and without the mask",
    "weight_moved": "share of the loss weight that would move",
    "largest_change_dimension": "dimension whose γ would change most",
    "largest_change_factor": "its γ would change by a factor of",
    "top_share_masked": "heaviest dimension's share, as trained",
    "top_share_unmasked": "heaviest dimension's share, without the mask",
}
FACTS = {
    "normalise": "normalisation",
    "robust": "made robust by",
    "effective_dimensions": "effective number of dimensions",
    "max_over_median": "largest γ over median γ",
    "tokens": "tokens used",
}
"""Words for the keys of a gamma record and of the matching; others show as they are."""


@dataclass(frozen=True)
class Cell:
    """A metric of one member: value, interval, and its comparison with the plain twin."""

    value: str
    bounds: str
    judged: Judgement | None


@dataclass(frozen=True)
class Row:
    """One metric of the summary table."""

    metric: str
    name: str
    tip: str
    way: str
    cells: list[Cell]


@dataclass(frozen=True)
class MemberView:
    """A column head: name, colour class, weighting in words."""

    name: str
    kind: str
    text: str
    is_plain: bool
    is_control: bool


@dataclass(frozen=True)
class GammaView:
    """A weighted member's gamma: settings, its heaviest dimensions, and its movement without the mask."""

    member: MemberView
    facts: list[tuple[str, str]]
    heaviest: list[tuple[str, str, str]]
    without_mask: list[tuple[str, str]]


@dataclass(frozen=True)
class HookView:
    """One hook's part of the page."""

    name: str
    index: int
    verdict: str
    method: str
    others: list[str]
    members: list[MemberView]
    groups: list[tuple[str, list[Row]]]
    weighs: bool
    """Whether weighted FVU was compared, which needs a word of explanation."""
    matching: list[tuple[MemberView, list[tuple[str, str]]]]
    gamma: list[GammaView]
    gamma_figures: list[Figure]
    training: list[Figure]
    density: list[Figure]
    explained: list[Figure]
    interpretation: ScoresView | None
    classes: ScoresView | None


def hook_view(run: RunData, hook: str, index: int) -> HookView:
    """Collect everything shown for one hook."""
    members = [_member(run, hook, name) for name in run.members(hook)]
    by_name = {member.name: member for member in members}
    matching = run.evaluated(hook).get("matching", {})
    return HookView(
        name=hook,
        index=index,
        verdict=verdict(run, hook),
        method=method(run, hook),
        others=_others(run, hook),
        members=members,
        groups=_groups(run, hook),
        weighs=any(metric == "fvu_weighted" for _, metric in judgements(run, hook)),
        matching=[
            (by_name[name], _matching(found)) for name, found in matching.items() if name in by_name
        ],
        gamma=[
            _gamma(member, record)
            for member in members
            if not member.is_plain and (record := run.gamma_record(hook, member.name))
        ],
        gamma_figures=charts.gamma_figures(run, hook),
        training=charts.training_figures(run, hook),
        density=charts.density_figures(run, hook),
        explained=charts.explained_figures(run, hook),
        interpretation=interpretation_view(run, hook),
        classes=classes_view(run, hook),
    )


def _member(run: RunData, hook: str, name: str) -> MemberView:
    plain, control = run.is_plain(hook, name), is_control(name)
    record = run.gamma_record(hook, name)
    text = "untrained: the floor" if control else "no weighting (γ = 1)" if plain else ""
    text = text or (weighting(record, name) if record else "")
    return MemberView(name, charts.kind_of(run, hook, name), text, plain, control)


def _others(run: RunData, hook: str) -> list[str]:
    """One sentence on plain FVU for each weighted member that the verdict leaves out."""
    judged = [j for (_, metric), j in judgements(run, hook).items() if metric == "fvu"]
    main = main_member(run, hook)
    return [f"{j.member} {clause(run, hook, j)}." for j in judged if j.member != main]


def _groups(run: RunData, hook: str) -> list[tuple[str, list[Row]]]:
    found = run.evaluated(hook).get("members", {})
    keys = dict.fromkeys(key for member in found.values() for key in member.get("metrics", {}))
    ordered = [key for key in METRICS if key in keys] + [key for key in keys if key not in METRICS]
    out: dict[str, list[Row]] = {}
    for key in ordered:
        group = METRICS.get(key, ("", OTHER, ""))[1]
        out.setdefault(group, []).append(_row(run, hook, key))
    return list(out.items())


def _row(run: RunData, hook: str, key: str) -> Row:
    glossary, judged = run.evaluation.get("glossary", {}), judgements(run, hook)
    found = run.evaluated(hook).get("members", {})
    entry = glossary.get(key) if isinstance(glossary.get(key), dict) else {}
    tip = "; ".join(str(entry[part]) for part in ("formula", "direction") if entry.get(part))
    cells = [
        _cell(found.get(name, {}).get("metrics", {}).get(key, {}), judged.get((name, key)))
        for name in run.members(hook)
    ]
    return Row(
        key, str(entry.get("name") or metric_name(key)), tip, direction(key, glossary), cells
    )


def _cell(record: Json, judged: Judgement | None) -> Cell:
    value, low, high = (finite(record.get(part)) for part in ("value", "low", "high"))
    if value is None or low is None or high is None or digits(low, high) is None:
        return Cell(number(value), "", judged)
    shown, bounds = interval(value, low, high).split(" ", 1)
    return Cell(shown, bounds, judged)


def _matching(found: Json) -> list[tuple[str, str]]:
    pairs = [
        (MATCHING.get(key, key.replace("_", " ")), finite(value)) for key, value in found.items()
    ]
    return [(name, number(value)) for name, value in pairs if value is not None]


def _gamma(member: MemberView, record: Json) -> GammaView:
    facts = [
        (words, _plain(record[key])) for key, words in FACTS.items() if record.get(key) is not None
    ]
    heaviest = [
        (str(row[0]), number(finite(row[1])), _percent(row[2]) if len(row) > 2 else "–")
        for row in record.get("heaviest", [])[:HEAVIEST]
    ]
    moved: Json = record.get("without_mask") or {}
    without = [
        (WITHOUT_MASK.get(key, key.replace("_", " ")), _plain(value))
        for key, value in moved.items()
    ]
    return GammaView(member, facts, heaviest, without)


def _plain(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "–", True: "yes", False: "no"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return number(finite(value))
    return value if isinstance(value, str) else json.dumps(value)


def _percent(value: object) -> str:
    share = finite(value)
    return "–" if share is None else f"{100 * share:.3g} %"


CARDS = (
    ("Model", ("model",)),
    ("Training {unit}s", ("tokens", "train_tokens")),
    ("Learning rate", ("lr",)),
    ("Seed", ("seed",)),
)


def cards(run: RunData) -> list[tuple[str, str]]:
    """Return the setup as (name, value) pairs; what the run does not say is left out."""
    hooks = run.hooks
    out: list[tuple[str, object]] = [
        ("Hook point" if len(hooks) == 1 else "Hook points", ", ".join(hooks))
    ]
    for name, keys in CARDS:
        found = [find(run.config, key) for key in keys]
        out.append(
            (
                name.format(unit=run.unit),
                next((v for v in found if isinstance(v, str | int | float)), None),
            )
        )
    out[2:2] = [
        ("Latents (d_sae)", _widths(run)),
        (f"Active per {run.unit} (k)", _distinct(run, "k")),
    ]
    for key, name in (
        ("heldout_tokens", f"Held-out {run.unit}s"),
        ("heldout_sequences", f"Held-out {run.sequence}s"),
    ):
        out.append((name, run.evaluation.get(key)))
    out.append(("wsae version", run.manifest.get("wsae_version")))
    return [(name, _plain(value)) for name, value in out if value is not None]


def _distinct(run: RunData, key: str) -> str | None:
    """Join the values a setting takes over the members."""
    members = find(run.config, "members")
    found = [
        find(member, key) for member in (members if isinstance(members, list) else [run.config])
    ]
    values = dict.fromkeys(_plain(value) for value in found if isinstance(value, int | float))
    return ", ".join(values) or None


def _widths(run: RunData) -> str | None:
    """Join the dictionary sizes: measured ones where there are any, else the configured ones."""
    sizes = [len(array) for name, array in run.arrays.items() if name.endswith("|density")]
    return ", ".join(f"{size:,}" for size in dict.fromkeys(sizes)) or _distinct(run, "d_sae")


def glossary(run: RunData) -> list[tuple[str, str, Json]]:
    """Return (key, name, entry) of every metric the evaluation explains."""
    parts = (run.evaluation, run.interpretation, run.classes)
    entries: Json = {
        key: entry for part in parts for key, entry in part.get("glossary", {}).items()
    }
    explained = [(key, entry) for key, entry in entries.items() if isinstance(entry, dict)]
    return [(key, str(entry.get("name") or metric_name(key)), entry) for key, entry in explained]
