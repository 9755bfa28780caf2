"""One row per SAE: what it is, how well it reconstructs, how interpretable its latents are. JSON-ready."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from wsae.core.artifact import MANIFEST
from wsae.core.files import read_json
from wsae.experiments.tables.config import StudyConfig
from wsae.experiments.tables.paper import PLAIN
from wsae.experiments.tables.plan import SAEPlan
from wsae.train.config import MemberConfig

Row = dict[str, Any]
METRICS = ("fvu", "fvu_weighted", "l0", "dead_frac", "ev_dim_mean", "density_mean")
WAYS = ("all", "matched", "density")
"""Over which latents an interpretation compares a member with its twin: all, matched ones, ones of equal density."""


def run_rows(cfg: StudyConfig, hooks: Iterable[str], number: int, path: Path) -> list[Row]:
    """Return the rows of one run: what its evaluation and interpretation say, as far as they are there."""
    plan = cfg.plan.runs[number]
    evaluated = _record(path / "evaluation", "evaluation.json")
    interpreted = _record(path / "interpretation", "interpretation.json")
    rows = []
    for hook in hooks:
        found, read = (part.get("hooks", {}).get(hook, {}) for part in (evaluated, interpreted))
        for member in plan.members:
            name = str(member.label)
            row = {"hook": hook, "seed": plan.seed, "member": name, **describe(member)}
            row["twin"] = twin_of(row)
            metrics = found.get("members", {}).get(name, {}).get("metrics", {})
            row["metrics"] = {key: metrics[key] for key in METRICS if key in metrics}
            rows.append(row | _scores(read, name))
        rows += _controls(read, hook, plan.seed)
    return rows


def describe(member: MemberConfig) -> Row:
    """Return what a member is, as labels."""
    gamma = member.gamma
    return {
        "activation": member.activation.kind,
        "k": getattr(member.activation, "k", None),
        "rule": gamma.rule,
        "alpha": None if gamma.rule == "none" else gamma.alpha,
        "robust": gamma.robust,
        "lr": member.lr,
    }


def twin_of(row: Row) -> str | None:
    """Return the label of the plain member that differs in gamma alone."""
    if row["rule"] == "none":
        return None
    return PLAIN if row["activation"] == "topk" else f"{PLAIN}-group"


def on_curve(row: Row, sae: SAEPlan) -> bool:
    """Say whether a row is a plain SAE made to have a higher FVU."""
    return row["rule"] == "none" and (row["k"] != sae.k or row["lr"] != sae.lr)


def values(row: Row, score: str) -> Float64[np.ndarray, " latents"]:
    """Return a row's score of every latent that has one."""
    found = (latent["scores"].get(score) for latent in row["latents"])
    return np.array([value for value in found if value is not None], dtype=np.float64)


def scores_of(rows: Iterable[Row]) -> list[str]:
    """Return the scores that some row has, in order."""
    return list(dict.fromkeys(score for row in rows for score in row.get("scores", {})))


def _record(place: Path, name: str) -> dict[str, Any]:
    return read_json(place / name) if (place / MANIFEST).exists() else {}


def _scores(read: dict[str, Any], name: str) -> Row:
    entry = read.get("members", {}).get(name, {})
    differences: dict[str, dict[str, Any]] = {}
    for line in read.get("comparisons", []):
        if line["a"] == name and line.get("over") in WAYS:
            part = {key: line[key] for key in ("difference", "low", "high", "n")}
            differences.setdefault(line["metric"], {})[line["over"]] = part | {"b": line["b"]}
    return _entry(entry) | {"differences": differences}


def _entry(entry: dict[str, Any]) -> Row:
    return {
        "scores": entry.get("summary", {}),
        "counts": entry.get("counts", {}),
        "density": entry.get("density", {}),
        "latents": list(_latents(entry)),
    }


def _latents(entry: dict[str, Any]) -> Iterator[Row]:
    for latent in entry.get("latents", []):
        yield {key: latent[key] for key in ("latent", "density", "scores")}


def _controls(read: dict[str, Any], hook: str, seed: int) -> list[Row]:
    rows = []
    for name, entry in read.get("controls", {}).items():
        row = {"hook": hook, "seed": seed, "member": name, "rule": "control", "twin": None}
        rows.append(row | {"metrics": {}, "differences": {}} | _entry(entry))
    return rows
