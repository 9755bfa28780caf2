"""What the page's template shows: plain values built from a run, no markup."""

import json
from dataclasses import dataclass

from wsae.report import charts
from wsae.report.charts import Figure
from wsae.report.interpretation import ScoresView, classes_view, interpretation_view
from wsae.report.rundata import Json, RunData, find, finite, is_control
from wsae.report.words import (
    METRICS,
    OTHER,
    Judgement,
    clause,
    digits,
    direction,
    interval,
    judgements,
    main_member,
    method,
    metric_name,
    number,
    verdict,
    weighting,
)

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
