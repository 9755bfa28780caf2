"""From rows to answers: does weighting raise the score, and is it the weighting, the density or the FVU?

Four differences from the plain twin stand side by side: over all latents, over matched latents, over latents of equal
density (all three from the interpretation), and from plain SAEs of equal FVU (`wsae.studies.tables_analysis`).
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64

from wsae.core.seeds import seed_for
from wsae.evals.config import InterpretConfig
from wsae.run import EVALUATION_PART, INTERPRETATION_PART, Run
from wsae.studies.drawing import panels_figure, scatter_figure
from wsae.studies.engine import (
    NONE,
    PART,
    Mean,
    Row,
    Table,
    cell,
    compared,
    mean_interval,
    pooled,
    rank_correlation,
    select,
)
from wsae.studies.reproduce_config import StudyConfig, TableSAEs
from wsae.theory.record import HALF, ONE, PAPER, PLAIN, TableName

# A weighted SAE beside a plain one of the same FVU.
#
# Weights raise the plain FVU, and an SAE that reconstructs less may be easier to read for that
# reason alone. So plain SAEs with a higher FVU are trained too, in two ways: with fewer active
# latents, or with the same number trained too slowly (same density). Along each way, ordered by FVU
# f_1 < f_2 < ..., the plain score is read at the weighted SAE's FVU f in [f_i, f_(i+1)] by linear
# interpolation:
#
# s(f) = (1 - t) s_i + t s_(i+1), t = (f - f_i) / (f_(i+1) - f_i), difference = s_weighted - s(f).
#
# Intervals resample the latents of the three SAEs independently; the FVUs' own errors are a hundred
# times smaller than the gaps between them and are left out.

Scores = Float64[np.ndarray, " latents"]


class Point(NamedTuple):
    """One plain SAE: its FVU and its latents' scores."""

    fvu: float
    scores: Scores
    label: str


class AtFVU(NamedTuple):
    """A weighted SAE's mean score minus the plain one's at the same FVU, with its interval."""

    difference: float | None
    low: float | None
    high: float | None
    n: int
    between: tuple[str, str] | None
    """The plain SAEs on either side; none: no plain SAE here has such an FVU."""
    share: float | None
    """t, the weight of the second."""


def bracket(curve: Sequence[Point], fvu: float) -> tuple[Point, Point, float] | None:
    """Return the neighbours f_i <= fvu <= f_(i+1) on the curve and t; None outside it."""
    ordered = sorted(curve, key=lambda point: point.fvu)
    for left, right in zip(ordered, ordered[1:], strict=False):
        if left.fvu <= fvu <= right.fvu:
            gap = right.fvu - left.fvu
            return left, right, (fvu - left.fvu) / gap if gap > 0 else 0.0
    return None


def at_fvu(
    member: Point, curve: Sequence[Point], draws: int, confidence: float, seed: int
) -> AtFVU:
    """Return member minus the curve at the member's FVU, with a percentile bootstrap interval over latents."""
    found = bracket(curve, member.fvu)
    if found is None:
        return AtFVU(None, None, None, len(member.scores), None, None)
    left, right, t = found
    parts = [(member.scores, 1.0), (left.scores, t - 1.0), (right.scores, -t)]
    parts = [(scores, weight) for scores, weight in parts if weight]
    names = (left.label, right.label)
    if not all(len(scores) for scores, _ in parts):
        return AtFVU(None, None, None, len(member.scores), names, t)
    value = sum(weight * float(scores.mean()) for scores, weight in parts)
    if not all(len(scores) > 1 for scores, _ in parts):
        return AtFVU(value, None, None, len(member.scores), names, t)
    rng = np.random.default_rng(seed)
    picks = [rng.integers(0, len(scores), size=(draws, len(scores))) for scores, _ in parts]
    spread = sum(
        weight * scores[pick].mean(axis=1)
        for pick, (scores, weight) in zip(picks, parts, strict=True)
    )
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.asarray(spread), [tail, 1 - tail])
    return AtFVU(value, float(low), float(high), len(member.scores), names, t)


# One row per SAE: what it is, how well it reconstructs, how interpretable its latents are. JSON-
# ready.

METRICS = ("fvu", "fvu_weighted", "l0", "dead_frac", "ev_dim_mean", "density_mean")
ROW_WAYS = ("all", "matched", "density")
"""Over which latents an interpretation compares a member with its twin: all, matched ones, ones of equal density."""


def run_rows(cfg: StudyConfig, hooks: Iterable[str], number: int, path: Path) -> list[Row]:
    """Return the rows of one run: what its evaluation and interpretation say, as far as they are there."""
    plan, run = cfg.plan.runs[number], Run(path)
    evaluated = run.evaluation_record["hooks"] if run.has(EVALUATION_PART) else {}
    interpreted = run.interpretation_record["hooks"] if run.has(INTERPRETATION_PART) else {}
    rows = []
    for hook in hooks:
        found, read = evaluated.get(hook, {}), interpreted.get(hook, {})
        for member in plan.members:
            name, gamma = str(member.label), member.gamma
            row: Row = {
                "hook": hook,
                "seed": plan.seed,
                "member": name,
                "activation": member.activation.kind,
                "k": getattr(member.activation, "k", None),
                "rule": gamma.rule,
                "alpha": None if gamma.rule == "none" else gamma.alpha,
                "robust": gamma.robust,
                "lr": member.lr,
            }
            row["twin"] = twin_of(row)
            metrics = found.get("members", {}).get(name, {}).get("metrics", {})
            row["metrics"] = {key: metrics[key] for key in METRICS if key in metrics}
            row |= _interpreted(read.get("members", {}).get(name, {}))
            row["matching"] = read.get("matching", {}).get(name, {})
            lines = read.get("comparisons", [])
            rows.append(row | {"differences": compared(lines, name, ROW_WAYS, (*PART, "b"))})
        for name, entry in read.get("controls", {}).items():
            row = {"hook": hook, "seed": plan.seed, "member": name, "rule": "control", "twin": None}
            rows.append(row | {"metrics": {}, "differences": {}} | _interpreted(entry))
    return rows


def _interpreted(entry: dict[str, Any]) -> Row:
    """Return what an interpretation says of a member or control; empty records where it does not."""
    kept = ("latent", "density", "scores")
    return {
        "scores": entry.get("summary", {}),
        "counts": entry.get("counts", {}),
        "density": entry.get("density", {}),
        "latents": [{key: latent[key] for key in kept} for latent in entry.get("latents", [])],
    }


def twin_of(row: Row) -> str | None:
    """Return the label of the plain member that differs in gamma alone."""
    if row["rule"] == "none":
        return None
    return PLAIN if row["activation"] == "topk" else f"{PLAIN}-group"


def on_curve(row: Row, sae: TableSAEs) -> bool:
    """Return whether a row is a plain SAE made to have a higher FVU."""
    return row["rule"] == "none" and (row["k"] != sae.k or row["lr"] != sae.lr)


def values(row: Row, score: str) -> Float64[np.ndarray, " latents"]:
    """Return a row's score of every latent that has one."""
    found = (latent["scores"].get(score) for latent in row["latents"])
    return np.array([value for value in found if value is not None], dtype=np.float64)


def scores_of(rows: Iterable[Row]) -> list[str]:
    """Return the scores that some row has, in order."""
    return list(dict.fromkeys(score for row in rows for score in row.get("scores", {})))


FEWER, SLOWER = "fvu, fewer active", "fvu, slower training"
"""The two ways to a plain SAE of higher FVU."""
WAYS = {
    "all": "all latents",
    "matched": "matched latents",
    "density": "equal density",
    FEWER: "equal FVU (plain SAEs with fewer active latents)",
    SLOWER: "equal FVU (plain SAEs trained more slowly)",
}


def add_matched_fvu(rows: list[Row], sae: TableSAEs, cfg: InterpretConfig) -> None:
    """Add to every weighted row its difference from plain SAEs of equal FVU, by score and way.

    The plain SAEs of higher FVU that a further seed lacks are those of the hook's first seed.
    """
    for row in rows:
        if row["rule"] in ("none", "control"):
            continue
        found = select(rows, hook=row["hook"], activation=row["activation"], rule="none")
        first = min((other["seed"] for other in found), default=row["seed"])
        named = {r["member"]: r for seed in (first, row["seed"]) for r in select(found, seed=seed)}
        ways = curves(named.values(), sae)
        for score in row["scores"]:
            for way, curve in ways.items():
                points = [point for r in curve if (point := _point(r, score)) is not None]
                member = _point(row, score)
                if member is not None and len(points) >= 2:
                    what = (row["hook"], row["seed"], row["member"], score)
                    seed = seed_for(cfg.seed, "matched fvu", *what)
                    at = at_fvu(member, points, cfg.draws, cfg.confidence, seed)
                    row["differences"].setdefault(score, {})[way] = at._asdict()


def curves(plain: Iterable[Row], sae: TableSAEs) -> dict[str, list[Row]]:
    """Return, for each way to a higher FVU, the plain SAEs along it."""
    plain = list(plain)
    return {
        FEWER: [row for row in plain if row["lr"] == sae.lr],
        SLOWER: [row for row in plain if row["k"] == sae.k],
    }


def _point(row: Row, score: str) -> Point | None:
    fvu = row["metrics"].get("fvu", {}).get("value")
    return None if fvu is None else Point(fvu, values(row, score), row["member"])


def over_seeds(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return, by hook, member, score and way, the mean difference over seeds with its Student interval.

    Only where every seed has the difference; one seed keeps its interval over latents.
    """
    out = []
    for row in rows:
        first = min(r["seed"] for r in select(rows, hook=row["hook"], member=row["member"]))
        if row["seed"] != first or not row.get("differences"):
            continue
        same = select(rows, hook=row["hook"], member=row["member"])
        for score in row["differences"]:
            for way in WAYS:
                mean = pooled([r["differences"].get(score, {}).get(way) for r in same])
                if mean is not None:
                    line = {"hook": row["hook"], "member": row["member"], "score": score}
                    line |= {"way": way, **_interval(mean), "seeds": mean.n}
                    out.append(line | {"interval": "latents" if mean.n == 1 else "seeds"})
    return out


def over_hooks(lines: Sequence[dict[str, Any]], hooks: int) -> list[dict[str, Any]]:
    """Return, by member, score and way, the mean over the hooks that have it, with its Student interval.

    Hooks are the units. `hooks` is how many there are: not all have plain SAEs of other FVU, or ones poor enough.
    """
    out = []
    keys = dict.fromkeys((line["member"], line["score"], line["way"]) for line in lines)
    for member, score, way in keys:
        found = select(lines, member=member, score=score, way=way)
        if len(found) > 1 or hooks == 1:
            mean = mean_interval([line["difference"] for line in found])
            positive = sum(line["difference"] > 0 for line in found)
            line = {"member": member, "score": score, "way": way, "hooks": len(found)}
            out.append(line | _interval(mean) | {"positive": positive})
    return out


def _interval(mean: Mean) -> dict[str, float | None]:
    return {"difference": mean.value, "low": mean.low, "high": mean.high}


def by_baseline(plain: Sequence[float], gains: Sequence[float]) -> float | None:
    """Return Spearman's rho between the plain SAE's score and the gain over hooks; None for fewer than 3.

    The paper says that the gain is larger where the plain SAE is better. Since the plain score enters both, noise
    alone pulls this towards -1.
    """
    if len(plain) < 3 or len(set(plain)) == 1 or len(set(gains)) == 1:
        return None
    return rank_correlation(plain, gains)


def density_and_fvu(rows: Iterable[Row], sae: TableSAEs) -> list[dict[str, Any]]:
    """Return every member's mean FVU, density and score over its hooks and seeds: what else the weights moved."""
    kept = [row for row in rows if row["rule"] != "control"]
    out = []
    for name in dict.fromkeys(row["member"] for row in kept):
        same = select(kept, member=name)
        line: dict[str, Any] = {"member": name, "curve": on_curve(same[0], sae), "n": len(same)}
        for key in ("fvu", "dead_frac"):
            found = [row["metrics"].get(key, {}).get("value") for row in same]
            line[key] = _mean(found)
        line["density_median"] = _mean([row["density"].get("0.5") for row in same])
        for score in scores_of(same):
            line[score] = _mean([row["scores"].get(score, {}).get("value") for row in same])
        out.append(line)
    return out


def _mean(found: Sequence[float | None]) -> float | None:
    kept = [value for value in found if value is not None]
    return float(np.mean(kept)) if kept and len(kept) == len(found) else None


# Figures of a study: the score by layer, and the score against FVU.

SHOWN = (PLAIN, HALF, ONE, "variance-a0-drop", "variance-a1-drop")
GROUPS = {
    "none": "variance, raw",
    "drop": "outlier dimensions left out",
    "winsor": "variance, winsorised",
    "rank": "variance, ranks",
}


def draw(rows: Sequence[Row], hooks: Sequence[str], sae: TableSAEs, out: Path) -> list[Path]:
    """Draw both figures for the scores there are; returns their paths."""
    paths = []
    scores = scores_of(rows)
    panels = [panel for score in scores for panel in _by_layer(rows, hooks, score)]
    if panels:
        paths += panels_figure(panels, out / "score-by-layer", "hook", 3)
    for score in scores:
        scatter = [_against_fvu(rows, hook, score, sae) for hook in hooks]
        kept = [panel for panel in scatter if panel["points"]]
        if kept:
            paths += scatter_figure(kept, out / f"score-against-fvu-{score}")
    return paths


def _by_layer(rows: Sequence[Row], hooks: Sequence[str], score: str) -> list[dict[str, Any]]:
    """Return a panel of the weights, one of the controls, and one of group Top-k, each beside the plain SAE."""
    controls = dict.fromkeys(row["member"] for row in rows if row["rule"] == "control")
    grouped = [f"{name}-group" for name in (PLAIN, HALF, ONE)]
    choices = {"weights": SHOWN, "controls": (PLAIN, *controls), "group Top-k": (PLAIN, *grouped)}
    ticks = [hook.removeprefix("layers.") for hook in hooks]
    panels = []
    for title, names in choices.items():
        series = [line for name in names if (line := _line(rows, hooks, name, score)) is not None]
        if {line["method"] for line in series} - {PLAIN}:
            about = {"title": f"{score}: {title}", "ylabel": "score", "bottom": 0.5}
            panels.append(about | {"series": series, "ticks": ticks})
    return panels


def _line(
    rows: Sequence[Row], hooks: Sequence[str], name: str, score: str
) -> dict[str, Any] | None:
    found = []
    for place, hook in enumerate(hooks):
        here = [r for r in select(rows, member=name, hook=hook) if r["scores"].get(score)]
        if here:
            first = min(here, key=lambda row: row["seed"])["scores"][score]
            found.append((place, first["value"], first["low"], first["high"]))
    kept = [point for point in found if point[1] is not None]
    if not kept:
        return None
    levels, mean, low, high = (list(column) for column in zip(*kept, strict=True))
    return {"method": name, "levels": levels, "mean": mean, "low": low, "high": high}


def _against_fvu(rows: Sequence[Row], hook: str, score: str, sae: TableSAEs) -> dict[str, Any]:
    here = [row for row in select(rows, hook=hook) if None not in _xy(row, score)]
    here = select(here, seed=min((row["seed"] for row in here), default=0))
    plain = [r for r in here if r["rule"] == "none" and r["activation"] == "topk"]
    lines = []
    for label, curve in curves(plain, sae).items():
        ordered = sorted((_xy(row, score) for row in curve), key=lambda xy: xy[0])
        if len(ordered) > 1:
            x, y = (list(column) for column in zip(*ordered, strict=True))
            lines.append({"label": f"plain: {label.split(', ')[1]}", "x": x, "y": y})
    points = [_named(row, score) for row in here if not on_curve(row, sae)]
    return {"title": hook, "xlabel": "plain FVU", "ylabel": score, "lines": lines, "points": points}


def _xy(row: Row, score: str) -> tuple[Any, Any]:
    """Return the FVU and the score, None where it was not measured."""
    fvu, found = row["metrics"].get("fvu", {}), row["scores"].get(score, {})
    return fvu.get("value"), found.get("value")


def _named(row: Row, score: str) -> dict[str, Any]:
    x, y = _xy(row, score)
    record = row["scores"][score]
    group = GROUPS.get(row["robust"], "")
    if row["rule"] != "variance":
        group = "plain" if row["rule"] == "none" else row["rule"].replace("_", " ")
    return {
        "label": row["member"].removeprefix("variance-"),
        "group": group,
        "x": x,
        "y": y,
        "low": record["low"],
        "high": record["high"],
    }


# Tables of a study as header and rows of text. Scores are in percent.

NAMES = {PLAIN: "original SAE", HALF: "weighted SAE, alpha 0.5", ONE: "weighted SAE, alpha 1"}


def paper_table(name: TableName) -> Table:
    """Return the paper's table with the gains and their mean over layers."""
    table = PAPER[name]
    rows = []
    for method, scores in table.scores.items():
        mean = sum(scores) / len(scores)
        rows.append([NAMES[method], *(f"{s:.1f}" for s in scores), f"{mean:.1f}"])
        if method != PLAIN:
            gains = table.gains(method)
            mean = mean_interval(gains)
            mean = mean._replace(value=round(mean.value, 6))  # 3.75 is shown as 3.8
            rows.append(["gain", *(f"{g:+.1f}" for g in gains), cell(mean, form="+.1f")])
    return {"header": [f"{table.model}, layer", *map(str, table.layers), "mean"], "rows": rows}


def first_seeds(rows: Sequence[Row], hooks: Sequence[str]) -> dict[str, list[Row]]:
    """Return member -> its row of the first seed at each hook, {} where it has none."""
    return {
        name: [
            min(select(rows, member=name, hook=hook), key=lambda row: row["seed"], default={})
            for hook in hooks
        ]
        for name in dict.fromkeys(row["member"] for row in rows)
    }


def score_table(firsts: dict[str, list[Row]], hooks: Sequence[str], score: str) -> Table:
    """Return member x hook -> mean score over latents with its interval, and the mean over hooks."""
    lines = []
    for name, found in firsts.items():
        scored = [row.get("scores", {}).get(score, {}) for row in found]
        mean = _mean([one.get("value") for one in scored])
        lines.append([name, *map(_of, scored), NONE if mean is None else f"{100 * mean:.1f}"])
    return _table([*hooks, "mean"], lines)


def _table(columns: Sequence[str], lines: Iterable[list[str]]) -> Table:
    kept = [line for line in lines if any(cell != NONE for cell in line[1:])]
    return {"header": ["", *columns], "rows": kept}


def _fvu(row: Row) -> str:
    value = row.get("metrics", {}).get("fvu", {}).get("value")
    return NONE if value is None else f"{value:.3f}"


def _sampled(row: Row) -> str:
    """Return the latents scored of those sampled, those left out by reason, and how alike pairs with the twin are."""
    counts = row.get("counts")
    if not counts:
        return NONE
    said = [f"{counts['scored']} of {counts['sampled']}"]
    said += [f"{n} {reason}" for reason, n in counts["skipped"].items() if n]
    pairs = row.get("matching", {})
    if pairs.get("decoder_cosine_mean") is not None:
        chance = pairs["random_cosine_mean"]
        said.append(f"cosine {pairs['decoder_cosine_mean']:.2f} (chance {chance:.2f})")
    return "; ".join(said)


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
                last = NONE
                for line in select(means, member=name, score=score, way=way):
                    n = line["hooks"]
                    some = f" ({n} of {len(hooks)} hooks)" if n < len(hooks) else ""
                    last = _of(line, sign=True) + some
                out.append([name, words, *cells, last])
    return {"header": ["", "compared over", *hooks, "mean over hooks"], "rows": out}


def tables(
    rows: Sequence[Row],
    lines: Sequence[dict[str, Any]],
    means: Sequence[dict[str, Any]],
    hooks: Sequence[str],
) -> dict[str, Table]:
    """Return every table of our own results, by title."""
    out, firsts = {}, first_seeds(rows, hooks)
    for score in scores_of(rows):
        out[f"{score}: score in % [95 % interval over latents]"] = score_table(firsts, hooks, score)
        out[f"{score}: weighted minus plain, points"] = gain_table(lines, means, hooks, score)
    sampled = ([name, *map(_sampled, found)] for name, found in firsts.items())
    out["latents scored, of those sampled; pairs with the plain twin"] = _table(hooks, sampled)
    out["plain FVU"] = _table(hooks, ([name, *map(_fvu, found)] for name, found in firsts.items()))
    return {title: table for title, table in out.items() if table["rows"]}


def _of(record: dict[str, Any], sign: bool = False) -> str:
    value = record.get("difference" if sign else "value")
    mean = None if value is None else Mean(value, record.get("low"), record.get("high"), 0)
    return cell(mean, 100.0, "+.1f" if sign else ".1f")
