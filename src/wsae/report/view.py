"""What a run says as a whole: verdicts, tables of scores beside their controls, the setup. Plain values, no markup.

The report's page draws it; an index of the browser keeps it as JSON of these forms and draws it again. The formulas of
the scores are in `wsae.evals.glossary`; here is only what a run says.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Annotated

from pydantic import BeforeValidator, Field, model_validator

from wsae.acts.config import model_title
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
    score_name,
    verdict,
    weighting,
)
from wsae.run import Form, Json, Text

FROM_JSON = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
"""JSON has lists where a form has a tuple."""


class CellForm(Form):
    """A value in words, its comparison with the twin, and what other comparisons say."""

    value: Text
    bounds: Text
    judged: Judgement | None
    also: list[Text] = Field(default=[], exclude=True)


class RowForm(Form):
    """A line of a table: a cell for each column."""

    key: Text = Field(default="", exclude=True)
    name: Text
    tip: Text
    way: Text
    cells: list[CellForm]


class HeadForm(Form):
    """The head of a column: a member, its colour class and weighting, or a control."""

    name: Text
    kind: Text
    text: Text


class MemberHead(HeadForm):
    """The head of a member's column."""

    control: bool = False


class ScoresForm(Form):
    """Scores of members and controls, who judged them, and the counts behind the means."""

    columns: list[HeadForm]
    rows: list[RowForm]
    judges: list[Annotated[tuple[Text, Text], FROM_JSON]] = []
    facts: list[tuple[Text, list[Text]]] = Field(default=[], exclude=True)

    @model_validator(mode="after")
    def _square(self) -> "ScoresForm":
        if any(len(row.cells) != len(self.columns) for row in self.rows):
            raise ValueError("should have a cell for each column")
        return self


class OverviewHook(Form):
    """What is said of a hook."""

    name: Text
    verdict: Text
    method: Text
    members: list[MemberHead]
    groups: list[Annotated[tuple[Text, list[RowForm]], FROM_JSON]]
    scores: ScoresForm | None
    classes: ScoresForm | None
    probed: list[tuple[Text, ScoresForm]] = Field(default=[], exclude=True)
    """What is told apart by a few latents: a heading and its scores."""

    @model_validator(mode="after")
    def _square(self) -> "OverviewHook":
        if any(len(row.cells) != len(self.members) for _, rows in self.groups for row in rows):
            raise ValueError("should have a cell for each member")
        return self


class OverviewForm(Form):
    """The run as a whole."""

    hooks: list[OverviewHook]
    cards: list[Annotated[tuple[Text, Text], FROM_JSON]]
    notes: list[Text]


def overview(run: RunData) -> OverviewForm:
    """Return verdicts, the members' metrics side by side, the scores and the setup."""
    hooks = [hook_form(run, hook) for hook in run.hooks]
    return OverviewForm(hooks=hooks, cards=cards(run), notes=run.notes)


def hook_form(run: RunData, hook: str) -> OverviewHook:
    """Return what is said of one hook."""
    return OverviewHook(
        name=hook,
        verdict=verdict(run, hook),
        method=method(run, hook),
        members=[_member(run, hook, name) for name in run.members(hook)],
        groups=_groups(run, hook),
        scores=scores_form(run, hook, run.interpretation),
        classes=scores_form(run, hook, run.classes),
        probed=[*_probed(run, hook)],
    )


def _probed(run: RunData, hook: str) -> Iterator[tuple[str, ScoresForm]]:
    """Yield what was probed at a hook: token tasks by rule, documents with labels."""
    for kind in ("tokens", "documents"):
        found = run.probing.get(kind, {})
        form = scores_form(run, hook, found, "tasks")
        if form is not None:
            parts = [f"{n:,} {what}" for what, n in found.get("counts", {}).items()]
            if found.get("skipped"):
                parts.append(f"{len(found['skipped'])} classes left out, with too few")
            yield f"Labelled {kind}: {', '.join(parts)}", form


def _member(run: RunData, hook: str, name: str) -> MemberHead:
    control, record = is_control(name), run.gamma_record(hook, name)
    text = weighting(record, name) if record else ""
    text = "no weighting (γ = 1)" if run.is_plain(hook, name) else text
    text = "untrained: the floor" if control else text
    return MemberHead(name=name, kind=run.kind(hook, name), text=text, control=control)


def _groups(run: RunData, hook: str) -> list[tuple[str, list[RowForm]]]:
    """Return the rows of the evaluation's metrics by the part of the table they belong to."""
    glossary, judged = run.evaluation.get("glossary", {}), judgements(run, hook)
    found = run.evaluated(hook).get("members", {})
    keys = dict.fromkeys(key for member in found.values() for key in member.get("metrics", {}))
    out: dict[str, list[RowForm]] = {}
    places = {key: place for place, key in enumerate(METRICS)}
    whole = {key: key.partition("[")[0] for key in keys}  # fvu[S] of a crosscoder's source S: fvu
    named = (member["sources"] for member in found.values() if member.get("sources"))
    ends = {f"[{source}]": place for place, source in enumerate(next(named, {}).get("alone", ()))}
    order = {key: ends.get(key.removeprefix(whole[key]), -1) for key in keys}
    for key in sorted(keys, key=lambda key: (places.get(whole[key], len(places)), order[key])):
        cells = []
        for name in run.members(hook):
            record = found.get(name, {}).get("metrics", {}).get(key, {})
            cell = _cell(record, judged.get((name, key)))
            low, high = finite(record.get("low")), finite(record.get("high"))
            if low is None or high is None or digits(low, high) is None:
                cell.bounds = ""
            cells.append(cell)
        group = METRICS.get(whole[key], ("", OTHER))[1]
        row = _row(key, glossary, metric_name(key), direction(key, glossary), cells)
        out.setdefault(group, []).append(row)
    return list(out.items())


def _row(key: str, glossary: Json, name: str, way: str, cells: list[CellForm]) -> RowForm:
    entry = glossary.get(key, {})
    tip, name = meaning(entry), str(entry.get("name") or name)
    return RowForm(key=key, name=name, tip=tip, way=way, cells=cells)


def meaning(entry: Json) -> str:
    """Return what an entry of a glossary says of formula and direction."""
    return "; ".join(str(entry[part]) for part in ("formula", "direction") if entry.get(part))


def _cell(record: Json, judged: Judgement | None, also: Iterable[str] = ()) -> CellForm:
    value, low, high = (finite(record.get(part)) for part in ("value", "low", "high"))
    shown, _, bounds = interval(value, low, high).partition(" ")
    return CellForm(value=shown, bounds=bounds, judged=judged, also=[*also])


COUNTED = ("requested", "parsed", "failed", "not_asked")
COMPARED = "matched"
"""The comparison shown under a weighted member: over latents matched with the twin's."""
OTHER_WAYS = {
    "all": "all latents",
    "density": "latents of the same density",
    "adjusted": "density regressed out",
    "within": "within classes",
    "sequences": "sequences resampled",
    "documents": "documents resampled",
}


def scores_form(
    run: RunData, hook: str, scored: Json, compared: str = COMPARED
) -> ScoresForm | None:
    """Return everything shown of a hook's scores, of interpretability or labels; None when it has none.

    `compared` is what the difference shown below a member is over.
    """
    found = scored.get("hooks", {}).get(hook)
    if not found:
        return None
    glossary, members = scored.get("glossary", {}), found.get("members", {})
    trained = {name: members[name] for name in run.members(hook) if name in members}
    entries = trained | found.get("controls", {})
    columns = [HeadForm(name=name, kind=run.kind(hook, name), text="") for name in trained] + [
        HeadForm(name=name, kind="", text=str(entry.get("about", "")))
        for name, entry in found.get("controls", {}).items()
    ]
    scores = dict.fromkeys(key for entry in entries.values() for key in entry.get("summary", {}))
    rows = []
    for score in scores:
        lines = [line for line in found.get("comparisons", []) if line.get("metric") == score]
        pairs = [(line, judge(line, glossary)) for line in lines]
        judged = {(line.get("a"), line.get("over")): j for line, j in pairs if j is not None}
        cells = []
        for name, entry in entries.items():
            also = [
                f"{words}: {judged[name, way].text or 'the same'}"
                for way, words in OTHER_WAYS.items()
                if (name, way) in judged
            ]
            record = entry.get("summary", {}).get(score, {})
            if record.get("told_from_random") is False:
                also.append("not told from the random SAE")
            cells.append(_cell(record, judged.get((name, compared)), also))
        way = direction(score, glossary) or "higher"
        rows.append(_row(score, glossary, score_name(score), way, cells))
    return ScoresForm(
        columns=columns,
        rows=rows,
        judges=[(score_name(score), str(name)) for score, name in scored.get("judges", {}).items()],
        facts=(_counts(entries, [*scores]) if compared == COMPARED else [])
        + _pairs([*entries], found.get("comparisons", [])),
    )


def _counts(entries: dict[str, Json], scores: list[str]) -> list[tuple[str, list[str]]]:
    """Return the counts behind the means, a line a fact; nothing that was left out goes unsaid."""

    def scored(entry: Json) -> str:
        counts = entry.get("counts", {})
        skipped = {k: n for k, n in counts.get("skipped", {}).items() if n}
        left = "; ".join(f"{n:,} skipped: {reason}" for reason, n in skipped.items())
        text = f"{counts.get('scored', 0):,} of {counts.get('sampled', 0):,}"
        return f"{text} ({left})" if left else text

    def answers(record: Json) -> str:
        """'requested = parsed + failed + not asked' in words; nothing where nothing was asked."""
        if record.get("requested") is None:
            return ""
        requested, *rest = (f"{record.get(key, 0):,} {key.replace('_', ' ')}" for key in COUNTED)
        return f"{requested} = {' + '.join(rest)}"

    found = entries.values()
    medians = [number(finite(entry.get("density", {}).get("0.5"))) for entry in found]
    out = [
        ("latents scored", [scored(entry) for entry in found]),
        ("their density, median", medians),
    ]
    for score in scores:
        cells = [answers(entry.get("summary", {}).get(score, {})) for entry in found]
        if any(cells):
            out.append((f"{score_name(score)}: answers", cells))
    return out


def _pairs(names: list[str], comparisons: list[Json]) -> list[tuple[str, list[str]]]:
    """Return how many matched latents each comparison with the twin is over, and how alike they are."""
    said: dict[str, dict[str, str]] = {}
    for line in comparisons:
        cosine, chance = finite(line.get("cosine")), number(finite(line.get("chance")))
        if cosine is not None:
            of = f"{line.get('n')} of {line.get('sampled')}"
            text = f"{of}, mean cosine {number(cosine)} (chance {chance})"
            said.setdefault(str(line.get("metric")), {})[str(line.get("a"))] = text
    return [
        (f"{score_name(score)}: matched latents compared", [told.get(name, "") for name in names])
        for score, told in said.items()
    ]


# What the report says of a hook beside that.

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


def others(run: RunData, hook: str) -> list[str]:
    """Return one sentence on plain FVU for each weighted member that the verdict leaves out."""
    judged = [j for (_, metric), j in judgements(run, hook).items() if metric == "fvu"]
    main = main_member(run, hook)
    return [f"{j.line.a} {clause(run, hook, j)}." for j in judged if j.line.a != main]


def weighs(run: RunData, hook: str) -> bool:
    """Return whether weighted FVU was compared, which needs a word of explanation."""
    return any(metric == "fvu_weighted" for _, metric in judgements(run, hook))


def matching(run: RunData, hook: OverviewHook) -> list[tuple[MemberHead, list[tuple[str, str]]]]:
    """Return how the latents of each member pair with its twin's, as (name, value)."""
    heads, out = {member.name: member for member in hook.members}, []
    for name, found in run.evaluated(hook.name).get("matching", {}).items():
        values = {key: finite(value) for key, value in found.items()}
        told = [
            (MATCHING.get(key, key.replace("_", " ")), number(value))
            for key, value in values.items()
            if value is not None
        ]
        out += [(heads[name], told)] if name in heads else []
    return out


def gamma_cards(run: RunData, hook: OverviewHook) -> list[Json]:
    """Return each weighted member's gamma: settings, its heaviest dimensions, and its movement without the mask."""
    out = []
    for member in hook.members:
        record = run.gamma_record(hook.name, member.name)
        if not record or run.is_plain(hook.name, member.name):
            continue
        heaviest = []
        for row in record.get("heaviest", [])[:HEAVIEST]:
            share = finite(row[2]) if len(row) > 2 else None
            percent = "–" if share is None else f"{100 * share:.3g} %"
            heaviest.append((str(row[0]), number(finite(row[1])), percent))
        moved: Json = record.get("without_mask") or {}
        without = [
            (WITHOUT_MASK.get(k, k.replace("_", " ")), _plain(value)) for k, value in moved.items()
        ]
        facts = [(w, _plain(record[k])) for k, w in FACTS.items() if record.get(k) is not None]
        out.append(
            {"member": member, "facts": facts, "heaviest": heaviest, "without_mask": without}
        )
    return out


def _plain(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "–", True: "yes", False: "no"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return number(finite(value))
    return value if isinstance(value, str) else json.dumps(value)


CARDS = {
    "Model": ("model",),
    "Training {unit}s": ("tokens", "train_tokens"),
    "Learning rate": ("lr",),
    "Seed": ("seed",),
}


def cards(run: RunData) -> list[tuple[str, str]]:
    """Return the setup as (name, value) pairs; what the run does not say is left out."""
    members = find(run.config, "members")
    configs = members if isinstance(members, list) else [run.config]

    def distinct(key: str) -> str | None:
        """Join the values a setting takes over the members."""
        found = [find(member, key) for member in configs]
        values = dict.fromkeys(_plain(value) for value in found if isinstance(value, int | float))
        return ", ".join(values) or None

    settings: dict[str, object] = {}
    for name, keys in CARDS.items():
        found = [find(run.config, key) for key in keys]
        value = next((v for v in found if isinstance(v, str | int | float)), None)
        settings[name.format(unit=run.unit)] = (
            model_title(value) if isinstance(value, str) else value
        )
    sizes = [len(array) for name, array in run.arrays.items() if name.endswith("|density")]
    measured = ", ".join(f"{size:,}" for size in dict.fromkeys(sizes))
    goals = find(run.config, "hook_out")  # of transcoders
    out: dict[str, object] = {
        "Hook point" if len(run.hooks) == 1 else "Hook points": ", ".join(run.hooks),
        "Predicts": ", ".join(map(str, goals.values())) if isinstance(goals, dict) else goals,
        "Model": settings.pop("Model"),
        "Latents (d_sae)": measured or distinct("d_sae"),
        f"Active per {run.unit} (k)": distinct("k"),
        **settings,
        f"Held-out {run.unit}s": run.evaluation.get("heldout_tokens"),
        f"Held-out {run.sequence}s": run.evaluation.get("heldout_sequences"),
        "wsae version": run.manifest.get("wsae_version"),
    }
    return [(name, _plain(value)) for name, value in out.items() if value is not None]


def glossary(run: RunData) -> list[tuple[str, str, Json]]:
    """Return (key, name, entry) of every metric the run explains."""
    parts = (run.evaluation, run.interpretation, run.classes, *run.probing.values())
    entries: Json = {
        key: entry for part in parts for key, entry in part.get("glossary", {}).items()
    }
    return [
        (key, str(entry.get("name") or metric_name(key)), entry) for key, entry in entries.items()
    ]
