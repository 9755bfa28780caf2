"""Numbers as words: formats, metric names, and verdicts that claim no more than their intervals show."""

import math

from pydantic import Field

from wsae.evals.glossary import CLASS_SCORES, HEADINGS, SCORES
from wsae.evals.glossary import METRICS as FORMULAS
from wsae.report.rundata import RunData, finite, is_control
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
    mark, text = (
        f"{'▲' if difference > 0 else '▼'} {outcome}",
        interval(difference, low, high, True),
    )
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
    rule, alpha, inside = (
        record.get("rule"),
        finite(record.get("alpha")),
        record.get("precondition"),
    )
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
    """One sentence on the main weighted member against its plain twin, from the numbers alone."""
    judged = judgements(run, hook)
    main = main_member(run, hook)
    if not run.evaluation:
        return "Training only: nothing has been measured on held-out data yet, so no verdict."
    if main is None:
        return "No weighted member was compared with a plain twin, so there is no verdict."
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
        return f"measured {name} {text} apart (no interval was computed, so nothing is shown)"
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
