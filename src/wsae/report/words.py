"""Numbers as words: formats, metric names, and verdicts that claim no more than their intervals show."""

import math
from dataclasses import dataclass

from wsae.evals.glossary import HEADINGS
from wsae.evals.glossary import METRICS as FORMULAS
from wsae.report.rundata import RunData, finite, is_control
from wsae.run import Json

METRICS = {key: (FORMULAS[key].name, heading) for heading, keys in HEADINGS.items() for key in keys}
"""metric -> (name, heading), in the order a reader wants them."""
OTHER = "Other"
NBSP = "\N{NO-BREAK SPACE}"
_SMALL, _LARGE = 1e-3, 1e5


@dataclass(frozen=True)
class Judgement:
    """One paired comparison in words: `difference` = member - twin, with its interval."""

    metric: str
    member: str
    twin: str
    difference: float
    low: float | None
    high: float | None
    outcome: str
    """better | worse | higher | lower | none (the interval covers 0) | unknown (no interval)."""
    effect_size: float | None
    unit: str
    n: int | None
    paired: bool

    @property
    def how(self) -> str:
        """Say what was resampled."""
        kind = "paired" if self.paired else "unpaired"
        return f"{kind} bootstrap over {self.n or '?'} {self.unit}s"

    @property
    def mark(self) -> str:
        """Text marker, so that colour is never the only sign."""
        if self.difference == self.low == self.high == 0:
            return "= the same"
        arrow = "▲" if self.difference > 0 else "▼"
        named = {"none": "≈ no difference shown", "unknown": "no interval"}
        return named.get(self.outcome) or f"{arrow} {self.outcome}"

    @property
    def text(self) -> str:
        """Difference and interval, signed; nothing when both are exactly 0."""
        if self.difference == self.low == self.high == 0:
            return ""
        return interval(self.difference, self.low, self.high, signed=True)


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
    difference = finite(comparison.get("difference"))
    if difference is None:
        return None
    low, high = finite(comparison.get("low")), finite(comparison.get("high"))
    metric = str(comparison.get("metric", ""))
    count = finite(comparison.get("n"))
    return Judgement(
        metric=metric,
        member=str(comparison.get("a", "")),
        twin=str(comparison.get("b", "")),
        difference=difference,
        low=low,
        high=high,
        outcome=_outcome(difference, low, high, direction(metric, glossary)),
        effect_size=finite(comparison.get("effect_size")),
        unit=str(comparison.get("unit", "sample")),
        n=None if count is None else int(count),
        paired=bool(comparison.get("paired", True)),
    )


def _outcome(difference: float, low: float | None, high: float | None, way: str) -> str:
    if low is None or high is None:
        return "unknown"
    if low <= 0 <= high:
        return "none"
    rose = difference > 0
    if not way:
        return "higher" if rose else "lower"
    return "better" if rose == (way == "higher") else "worse"


def judgements(run: RunData, hook: str) -> dict[tuple[str, str], Judgement]:
    """Return the comparisons with the plain twin by (member, metric)."""
    glossary = run.evaluation.get("glossary", {})
    found = (judge(entry, glossary) for entry in run.evaluated(hook).get("comparisons", []))
    kept = [j for j in found if j is not None and not is_control(j.member)]
    return {(j.member, j.metric): j for j in kept if j.twin == run.twin_of(hook, j.member)}


def weighting(record: Json, member: str) -> str:
    """Name a member's weighting in words: 'variance weighting (α = 1)'."""
    rule, alpha = record.get("rule"), finite(record.get("alpha"))
    if not rule:
        return f"member {member}"
    name = str(rule).replace("_", " ")
    return f"{name} weighting" + (f" (α = {alpha:g})" if alpha is not None else "")


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
    return f"On {_where(run)}, {subject} {_join([clause(run, hook, j) for j in mine])}."


HEADLINE = ("fvu", "fvu_weighted", "ce_loss_recovered_zero", "ce_delta", "decoder_cosine_max_mean")


def main_member(run: RunData, hook: str) -> str | None:
    """Name the compared member whose alpha is nearest to 1; None when nothing was compared."""
    names = dict.fromkeys(member for member, _ in judgements(run, hook))
    return min(
        names, key=lambda name: _distance_from_one(run.gamma_record(hook, name)), default=None
    )


def _distance_from_one(record: Json) -> float:
    alpha = finite(record.get("alpha"))
    return math.inf if alpha is None else abs(alpha - 1)


def clause(run: RunData, hook: str, judged: Judgement) -> str:
    """Say what happened to one metric: 'raised plain FVU from a to b (worse; difference ...)'."""
    name = metric_name(judged.metric)
    name = name if name[1:2].isupper() else name[0].lower() + name[1:]
    name = f"mean {name.removesuffix(', mean')}" if name.endswith(", mean") else name
    text = judged.text
    if not text:
        return f"left {name} the same"
    if judged.outcome == "none":
        return f"showed no difference in {name} ({text} covers 0)"
    if judged.outcome == "unknown":
        return f"measured {name} {text} apart (no interval was computed, so nothing is shown)"
    verb = "raised" if judged.difference > 0 else "lowered"
    worth = f"{judged.outcome}: " if judged.outcome in ("better", "worse") else ""
    return f"{verb} {name}{_from_to(run, hook, judged)} ({worth}{text})"


def _from_to(run: RunData, hook: str, judged: Judgement) -> str:
    """' from a to b', only when the two reported values are what was compared."""
    members = run.evaluated(hook).get("members", {})
    pair = [
        finite(members.get(name, {}).get("metrics", {}).get(judged.metric, {}).get("value"))
        for name in (judged.twin, judged.member)
    ]
    if pair[0] is None or pair[1] is None:
        return ""
    agrees = abs(pair[1] - pair[0] - judged.difference) <= 0.1 * abs(judged.difference)
    if not agrees or judged.low is None or judged.high is None:
        return ""
    decimals = digits(judged.low, judged.high)
    texts = [number(value) if decimals is None else f"{value:,.{decimals}f}" for value in pair]
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


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + ", and " + parts[-1]


def method(run: RunData, hook: str) -> str:
    """Say where the intervals come from: 'paired bootstrap over 200 sequences'."""
    found = [j for j in judgements(run, hook).values() if j.n and j.paired]
    counts = {
        unit: [j.n for j in found if j.unit == unit and j.n]
        for unit in dict.fromkeys(j.unit for j in found)
    }
    kinds = [
        _extent(ns, run.sequence if unit == "sequence" else unit) for unit, ns in counts.items()
    ]
    how = f", by paired bootstrap over {' or '.join(kinds)}" if kinds else ""
    scope = "They cover the choice of held-out data, not of the training seed."
    return (
        f"Brackets: 95 % intervals of the difference{how}. {scope}" if judgements(run, hook) else ""
    )


def _extent(counts: list[int], unit: str) -> str:
    low, high = min(counts), max(counts)
    return f"{low:,} {unit}s" if low == high else f"{low:,} to {high:,} {unit}s"
