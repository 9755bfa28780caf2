"""One row per SAE or control: what it is, how well it reconstructs, how its latents go with the classes. JSON-ready."""

from pathlib import Path
from typing import Any

from wsae.core.files import read_json
from wsae.experiments.vision.plan import PLAIN, RunPlan, Weighting

Row = dict[str, Any]
WAYS = ("all", "matched", "density", "adjusted", "within", "images")
"""Over what a member is compared with the plain one (`wsae.evals.classes.comparing`)."""


def run_rows(planned: RunPlan, path: Path) -> list[Row]:
    """Return the rows of one finished run: its members, then its controls."""
    hook = planned.hook
    gamma = read_json(path / "gamma.json")[hook]
    metrics = read_json(path / "evaluation" / "evaluation.json")["hooks"][hook]["members"]
    scores = read_json(path / "classes" / "classes.json")["hooks"][hook]
    base = {"backbone": planned.backbone, "hook": hook, "seed": planned.seed}
    rows = []
    for weighting in planned.weightings:
        name = weighting.label
        found = metrics[name]["metrics"]
        row = base | _about(weighting) | _flat(scores["members"][name])
        row |= {"fvu": found["fvu"]["value"], "fvu_weighted": found["fvu_weighted"]["value"]}
        row["effective_dimensions"] = gamma[name]["effective_dimensions"]
        rows.append(row | {"differences": _differences(scores["comparisons"], name)})
    for name, entry in scores["controls"].items():
        rows.append(base | {"member": name, "proxy": "control"} | _flat(entry))
    return rows


def _about(weighting: Weighting) -> Row:
    alpha = 0.0 if weighting.proxy == "none" else weighting.alpha
    return {"member": weighting.label, "proxy": weighting.proxy, "alpha": alpha}


def _flat(entry: Row) -> Row:
    """Return the means of the scores by name, beside the whole entry."""
    means = {name: score["value"] for name, score in entry["scores"].items()}
    coverage = {f"share_{key}": value for key, value in entry["coverage"].items()}
    return means | coverage | {"ncl_minibatch": entry["ncl"]["minibatch"], "classes": entry}


def _differences(lines: list[Row], member: str) -> dict[str, dict[str, Row]]:
    """Return score -> way -> the member minus the plain one."""
    out: dict[str, dict[str, Row]] = {}
    for line in lines:
        if line["a"] == member and line["b"] == PLAIN and line["over"] in WAYS:
            part = {key: line[key] for key in ("difference", "low", "high", "n")}
            out.setdefault(line["metric"], {})[line["over"]] = part
    return out
