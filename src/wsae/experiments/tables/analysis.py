"""From rows to answers: does weighting raise the score, and is it the weighting, the density or the FVU?

Four differences from the plain twin stand side by side: over all latents, over matched latents, over latents of equal
density (all three from the interpretation), and from plain SAEs of equal FVU (`wsae.experiments.tables.matched`).
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from scipy import stats

from wsae.core.seeds import seed_for
from wsae.evals.autointerp.config import InterpretConfig
from wsae.experiments.sweep.table import Mean, mean_interval, select
from wsae.experiments.tables.matched import Point, at_fvu
from wsae.experiments.tables.plan import SAEPlan
from wsae.experiments.tables.rows import Row, on_curve, scores_of, values

FEWER, SLOWER = "fvu, fewer active", "fvu, slower training"
"""The two ways to a plain SAE of higher FVU."""
WAYS = {
    "all": "all latents",
    "matched": "matched latents",
    "density": "equal density",
    FEWER: "equal FVU (plain SAEs with fewer active latents)",
    SLOWER: "equal FVU (plain SAEs trained more slowly)",
}


def add_matched_fvu(rows: list[Row], sae: SAEPlan, cfg: InterpretConfig) -> None:
    """Add to every weighted row its difference from plain SAEs of equal FVU, by score and way.

    The plain SAEs of higher FVU that a further seed lacks are those of the hook's first seed.
    """
    for row in rows:
        if row["rule"] in ("none", "control"):
            continue
        plain = _plain(rows, row)
        curves = {
            FEWER: [p for p in plain if p["lr"] == sae.lr],
            SLOWER: [p for p in plain if p["k"] == sae.k],
        }
        for score in row["scores"]:
            for way, curve in curves.items():
                found = _at_fvu(row, curve, score, cfg)
                if found is not None:
                    row["differences"].setdefault(score, {})[way] = found


def _plain(rows: Sequence[Row], row: Row) -> list[Row]:
    """Return the plain rows of a row's hook and kind, each of its own seed or else of the first."""
    found = select(rows, hook=row["hook"], activation=row["activation"], rule="none")
    first = min((other["seed"] for other in found), default=row["seed"])
    named = {r["member"]: r for seed in (first, row["seed"]) for r in select(found, seed=seed)}
    return list(named.values())


def _at_fvu(
    row: Row, curve: Sequence[Row], score: str, cfg: InterpretConfig
) -> dict[str, Any] | None:
    points = [point for r in curve if (point := _point(r, score)) is not None]
    member = _point(row, score)
    if member is None or len(points) < 2:
        return None
    seed = seed_for(cfg.seed, "matched fvu", row["hook"], row["seed"], row["member"], score)
    return at_fvu(member, points, cfg.draws, cfg.confidence, seed)._asdict()


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
        for score, ways in row["differences"].items():
            for way in WAYS:
                found = [r["differences"].get(score, {}).get(way) for r in same]
                if way in ways and all(part and part["difference"] is not None for part in found):
                    line = {"hook": row["hook"], "member": row["member"], "score": score}
                    out.append(line | {"way": way, **_pooled([part for part in found if part])})
    return out


def _pooled(found: list[dict[str, Any]]) -> dict[str, Any]:
    if len(found) == 1:
        kept = {key: found[0][key] for key in ("difference", "low", "high")}
        return {**kept, "seeds": 1, "interval": "latents"}
    mean = mean_interval([part["difference"] for part in found])
    kept = {"difference": mean.value, "low": mean.low, "high": mean.high}
    return {**kept, "seeds": len(found), "interval": "seeds"}


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
    correlation, _ = stats.spearmanr(np.asarray(plain), np.asarray(gains))
    return float(np.asarray(correlation))


def density_and_fvu(rows: Iterable[Row], sae: SAEPlan) -> list[dict[str, Any]]:
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
