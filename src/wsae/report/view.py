"""What a run says: numbers in words, verdicts, tables of scores beside their controls, the setup. No markup.

A verdict claims no more than its interval shows. The report draws it; an index of the browser keeps it as JSON of
these forms and draws it again. The formulas of the scores are in `wsae.evals.glossary`; here is only what a run says.
"""

import json
import math
from collections.abc import Iterable, Iterator
from typing import Annotated

from pydantic import BeforeValidator, Field, model_validator

from wsae.acts.config import model_title
from wsae.evals.glossary import CLASS_SCORES, HEADINGS, SCORES
from wsae.evals.glossary import METRICS as FORMULAS
from wsae.report.rundata import RunData, find, finite, is_control
from wsae.run import ComparisonForm, Form, Json, Text

METRICS = {key: (FORMULAS[key].name, heading) for heading, keys in HEADINGS.items() for key in keys}
"""metric -> (name, heading), in the order a reader wants them."""
OTHER = "Other"
NBSP = "\N{NO-BREAK SPACE}"
_SMALL, _LARGE = 1e-3, 1e5


class Judgement(Form):
    """A paired comparison in words; `line`: its numbers, `difference` = member a - twin b."""

    outcome: Text
    """better | worse | higher | lower | none (the interval covers 0) | unknown (no interval)."""
    mark: Text
    """Text marker, so that colour is never the only sign."""
    text: Text
    """Difference and interval, signed; nothing when both are exactly 0."""
    how: Text
    """What was resampled."""
    line: ComparisonForm = Field(default=ComparisonForm(), exclude=True)


def score_name(score: str) -> str:
    """Return the reader's name of a score."""
    known = SCORES | CLASS_SCORES
    return known[score].name if score in known else score.replace("_", " ")


def metric_name(metric: str) -> str:
    """Return the reader's name of a metric key."""
    return METRICS[metric][0] if metric in METRICS else metric.replace("_", " ")


def direction(metric: str, glossary: Json) -> str:
    """Return 'lower', 'higher' (is better) or '' (neither); the evaluation's glossary overrules ours."""
    entry = glossary.get(metric)
    said = str(entry.get("direction", "")).lower() if isinstance(entry, dict) else ""
    said = said or (FORMULAS[metric].direction if metric in METRICS else "")
    return next((way for way in ("lower", "higher") if f"{way} is better" in said), "")


def number(value: float | None, signed: bool = False) -> str:
    """Format one number with three significant digits; '–' when there is none."""
    if value is None:
        return "–"
    sign = "+" if signed else ""
    if value == 0:
        return "0"
    if abs(value) < _SMALL or abs(value) >= _LARGE:
        return f"{value:{sign}.2e}".replace("-", "−")
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:{sign},.{decimals}f}".replace("-", "−")


def interval(
    value: float | None, low: float | None, high: float | None, signed: bool = False
) -> str:
    """Format `value [low, high]` with as many decimals as the interval's width carries."""
    if value is None or low is None or high is None:
        return number(value, signed)
    decimals = digits(low, high)
    if decimals is None:
        return f"{number(value, signed)} [{number(low, signed)},{NBSP}{number(high, signed)}]"
    sign = "+" if signed else ""
    texts = [f"{v:{sign},.{decimals}f}".replace("-", "−") for v in (value, low, high)]
    return f"{texts[0]} [{texts[1]},{NBSP}{texts[2]}]"


def digits(low: float, high: float) -> int | None:
    """Return decimals that show two digits of the width, four of the ends at most; None without a fixed point."""
    width, size = high - low, max(abs(low), abs(high))
    if not 1e-5 < width < _LARGE:
        return None
    return max(0, min(1 - math.floor(math.log10(width)), 3 - math.floor(math.log10(size))))


def judge(comparison: Json, glossary: Json) -> Judgement | None:
    """Turn one entry of `comparisons` into a judgement; None when it carries no finite difference."""
    numbers = ("difference", "low", "high", "effect_size")
    line = ComparisonForm(**{**comparison, **{key: finite(comparison.get(key)) for key in numbers}})
    difference, low, high = line.difference, line.low, line.high
    if difference is None:
        return None
    way, risen = direction(line.metric, glossary), "higher" if difference > 0 else "lower"
    outcome = ("better" if way == risen else "worse") if way else risen
    mark = f"{'▲' if difference > 0 else '▼'} {outcome}"
    text = interval(difference, low, high, True)
    if low is None or high is None:
        outcome, mark = "unknown", "no interval"
    elif difference == low == high == 0:
        outcome, mark, text = "none", "= the same", ""
    elif low <= 0 <= high:
        outcome, mark = "none", "≈ no difference shown"
    kind = "paired" if line.paired else "unpaired"
    how = f"{kind} bootstrap over {line.n or '?'} {line.unit}s"
    return Judgement(outcome=outcome, mark=mark, text=text, how=how, line=line)


def judgements(run: RunData, hook: str) -> dict[tuple[str, str], Judgement]:
    """Return the comparisons with the plain twin by (member, metric)."""
    glossary = run.evaluation.get("glossary", {})
    found = (judge(entry, glossary) for entry in run.evaluated(hook).get("comparisons", []))
    kept = [j for j in found if j is not None and not is_control(j.line.a)]
    return {(j.line.a, j.line.metric): j for j in kept if j.line.b == run.twin_of(hook, j.line.a)}


def weighting(record: Json, member: str) -> str:
    """Name a member's weighting in words: 'variance weighting (α = 1)', 'whitened input (power 0.5)'."""
    rule, inside = record.get("rule"), record.get("precondition")
    alpha = finite(record.get("alpha"))
    if not rule:
        return f"member {member}"
    found = []
    if inside:
        found.append(f"{str(inside['kind']).rstrip('e')}ed input (power {inside['power']:g})")
    if rule != "none" or not found:
        of = f" (α = {alpha:g})" if alpha is not None else ""
        found.append(f"{str(rule).replace('_', ' ')} weighting{of}")
    return " with ".join(found)


def verdict(run: RunData, hook: str) -> str:
    """One sentence on the main weighted member against its plain twin, from the numbers alone; "" without one."""
    judged = judgements(run, hook)
    main = main_member(run, hook)
    if not run.evaluation:
        return "Training only: nothing has been measured on held-out data yet, so no verdict."
    if main is None:
        none = "No weighted member was compared with a plain twin, so there is no verdict."
        return none if run.weighted else ""
    mine = [judged[main, metric] for metric in HEADLINE if (main, metric) in judged]
    mine = (mine or [j for (member, _), j in judged.items() if member == main])[:3]
    subject = weighting(run.gamma_record(hook, main), main)
    *firsts, last = (clause(run, hook, j) for j in mine)
    said = ", ".join(firsts) + ", and " + last if firsts else last
    return f"On {_where(run)}, {subject} {said}."


HEADLINE = ("fvu", "fvu_weighted", "ce_loss_recovered_zero", "ce_delta", "decoder_cosine_max_mean")


def main_member(run: RunData, hook: str) -> str | None:
    """Name the compared member whose alpha is nearest to 1; None when nothing was compared."""
    names = dict.fromkeys(member for member, _ in judgements(run, hook))
    alphas = {name: finite(run.gamma_record(hook, name).get("alpha")) for name in names}
    away = {name: math.inf if a is None else abs(a - 1) for name, a in alphas.items()}
    return min(away, key=away.__getitem__, default=None)


def clause(run: RunData, hook: str, judged: Judgement) -> str:
    """Say what happened to one metric: 'raised plain FVU from a to b (worse; difference ...)'."""
    name = metric_name(judged.line.metric)
    name = name if name[1:2].isupper() else name[0].lower() + name[1:]
    name = f"mean {name.removesuffix(', mean')}" if name.endswith(", mean") else name
    text = judged.text
    if not text:
        return f"left {name} the same"
    if judged.outcome == "none":
        return f"showed no difference in {name} ({text} covers 0)"
    if judged.outcome == "unknown":
        return f"measured {name} {text} apart (no interval was computed, so this proves nothing)"
    verb = "raised" if (judged.line.difference or 0) > 0 else "lowered"
    worth = f"{judged.outcome}: " if judged.outcome in ("better", "worse") else ""
    return f"{verb} {name}{_from_to(run, hook, judged.line)} ({worth}{text})"


def _from_to(run: RunData, hook: str, line: ComparisonForm) -> str:
    """' from a to b', only when the two reported values are what was compared."""
    members = run.evaluated(hook).get("members", {})
    begin, end = (
        finite(members.get(name, {}).get("metrics", {}).get(line.metric, {}).get("value"))
        for name in (line.b, line.a)
    )
    difference, low, high = line.difference, line.low, line.high
    if begin is None or end is None or difference is None or low is None or high is None:
        return ""
    if abs(end - begin - difference) > 0.1 * abs(difference):
        return ""
    decimals = digits(low, high)
    texts = [number(v) if decimals is None else f"{v:,.{decimals}f}" for v in (begin, end)]
    return f" from {texts[0]} to {texts[1]}"


def _where(run: RunData) -> str:
    tokens = finite(run.evaluation.get("heldout_tokens"))
    sequences = finite(run.evaluation.get("heldout_sequences"))
    kind = {"token": "text", "row": "data"}[run.unit] if run.sequence == "sequence" else "images"
    if not tokens:
        return f"held-out {kind}"
    grouped = sequences is not None and sequences < tokens
    extent = f"{tokens:,.0f} {run.unit}s" + (
        f" in {sequences:,.0f} {run.sequence}s" if grouped else ""
    )
    return f"held-out {kind} ({extent})"


def method(run: RunData, hook: str) -> str:
    """Say where the intervals come from: 'paired bootstrap over 200 sequences'."""
    judged = judgements(run, hook).values()
    if not judged:
        return ""
    counts: dict[str, list[int]] = {}
    for line in (j.line for j in judged):
        if line.n and line.paired:
            counts.setdefault(line.unit, []).append(line.n)
    kinds = []
    for unit, ns in counts.items():
        extent = " to ".join(f"{n:,}" for n in dict.fromkeys((min(ns), max(ns))))
        kinds.append(f"{extent} {run.sequence if unit == 'sequence' else unit}s")
    how = f", by paired bootstrap over {' or '.join(kinds)}" if kinds else ""
    scope = "They cover the choice of held-out data, not of the training seed."
    return f"Brackets: 95 % intervals of the difference{how}. {scope}"


# The tables.

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
    "Training {unit}s": ("tokens",),
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
    asked, batch = (find(run.config, key) for key in ("tokens", "batch_size"))
    if isinstance(asked, int) and isinstance(batch, int):  # steps are whole
        settings[f"Training {run.unit}s"] = max(1, asked // batch) * batch
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
