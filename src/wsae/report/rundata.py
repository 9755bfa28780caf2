"""A run directory as the report sees it: what is there is read and checked, what is missing is noted, not invented.

Needed: `config.json`. Optional: `metrics.jsonl`, `gamma.json`, `evaluation/` and `interpretation/` (refused when cut or
altered).
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from wsae.core.errors import UserError, understood
from wsae.run import (
    ARRAYS,
    CLASSES_PART,
    CONTEXTS_FILE,
    EVALUATION_PART,
    INTERPRETATION_PART,
    METRICS_FILE,
    Json,
    Run,
    formed_arrays,
)

SHOWN = ("consistency_top", "consistency_corrected", "information")
"""Class scores beside each latent in the browser."""
TWIN_NAME = "plain"
BY_CLASS = ("|consistency_top", "|consistency_corrected", "|selectivity", "|information")
"""How the names of the class scores end that are shown."""
CONTROL_PREFIX = "control"
"""Members whose names start like this were not trained: a floor, no competitors."""


@dataclass(frozen=True)
class RunData:
    """Everything the report shows, by hook and member; empty containers stand for missing parts."""

    path: Path
    config: Json
    manifest: Json
    metrics: dict[str, dict[str, list[Json]]]
    """hook -> member -> rows of `metrics.jsonl` in order of step."""
    gamma: dict[str, dict[str, Json]]
    evaluation: Json
    arrays: dict[str, np.ndarray]
    contexts: dict[str, dict[str, list[Json]]]
    """hook -> member -> latents; those that were interpreted have `explanation` and `scores` too."""
    interpretation: Json = field(default_factory=dict)
    classes: Json = field(default_factory=dict)
    """Latents against class labels, in the form of `interpretation`."""
    thumbnails: dict[str, str] = field(default_factory=dict)
    """Image number -> PNG in base64, of the images among the contexts."""
    notes: list[str] = field(default_factory=list)
    """What is missing and what that means, one sentence each, shown on the page."""

    @property
    def unit(self) -> str:
        """What a row of activations is: a token of a text, or simply a row."""
        return "token" if self.contexts and not self.thumbnails else "row"

    @property
    def sequence(self) -> str:
        """What the rows of one sequence number are of."""
        return "image" if self.thumbnails or self.classes else "sequence"

    @property
    def hooks(self) -> list[str]:
        """Hook names in the order first met: evaluation, metrics, gamma."""
        sources = (self.evaluation.get("hooks", {}), self.metrics, self.gamma)
        return list(dict.fromkeys(hook for source in sources for hook in source))

    def evaluated(self, hook: str) -> Json:
        """Return the evaluation of one hook, or an empty object."""
        return self.evaluation.get("hooks", {}).get(hook, {})

    def members(self, hook: str) -> list[str]:
        """Member names of a hook: unweighted ones first, untrained controls last."""
        sources = (
            self.evaluated(hook).get("members", {}),
            self.metrics.get(hook, {}),
            self.gamma.get(hook, {}),
        )
        names = list(dict.fromkeys(name for source in sources for name in source))
        return sorted(names, key=lambda name: (is_control(name), not self.is_plain(hook, name)))

    def is_plain(self, hook: str, member: str) -> bool:
        """Return whether a trained member has no weighting: by its gamma rule, by its name where none is recorded."""
        rule = self.gamma_record(hook, member).get("rule")
        return not is_control(member) and (member == TWIN_NAME if rule is None else rule == "none")

    def twin_of(self, hook: str, member: str) -> str | None:
        """Name the plain twin of a member: the one it was compared with, else the first plain one of the hook."""
        if self.is_plain(hook, member):
            return None
        plain = [name for name in self.members(hook) if self.is_plain(hook, name)]
        lines = self.evaluated(hook).get("comparisons", [])
        compared = [line.get("b") for line in lines if line.get("a") == member]
        return next((name for name in compared if name in plain), plain[0] if plain else None)

    def gamma_record(self, hook: str, member: str) -> Json:
        """Return the gamma record of a member (rule, alpha, heaviest, ...), or an empty object."""
        evaluated = self.evaluated(hook).get("members", {}).get(member, {})
        return self.gamma.get(hook, {}).get(member) or evaluated.get("gamma") or {}

    def array(self, hook: str, member: str, name: str) -> np.ndarray | None:
        """Return one evaluation array, or None when it was not measured."""
        return self.arrays.get(f"{hook}|{member}|{name}")


def read_run(run: Run | Path) -> RunData:
    """Read a run; raises UserError when it is missing, no run, or a part of it is damaged."""
    run = run if isinstance(run, Run) else Run(run)
    path, notes = run.path, []
    manifest: Json = {}
    if run.finished:
        manifest = run.manifest.to_dict()
    else:
        notes.append("Training has not finished: the run has no manifest yet.")
    evaluation, arrays, contexts = _evaluated(run, notes)
    thumbnails = run.thumbnails
    interpretation, interpreted = {}, {}
    if run.has(INTERPRETATION_PART):
        interpretation, interpreted = run.interpretation_record, run.interpreted_contexts
    classes, by_class = read_classes(run)
    with understood(path / EVALUATION_PART / CONTEXTS_FILE):
        contexts = _merged(contexts, interpreted)
        _add_scores(contexts, by_class)
    if evaluation and not any(latents for named in contexts.values() for latents in named.values()):
        notes.append("No contexts: the data are arrays or no latent was sampled.")
        contexts = {}
    config = run.record
    if not (path / METRICS_FILE).is_file():
        notes.append(f"No training metrics: the run has no {METRICS_FILE}.")
    elif run.metrics_cut:
        notes.append(
            f"The last line of {METRICS_FILE} is cut off (the run was stopped while writing it)."
        )
    data = RunData(
        path=path,
        config=config,
        manifest=manifest,
        metrics=run.metrics,
        gamma=run.gamma_record,
        evaluation=evaluation,
        arrays=arrays,
        contexts=contexts,
        interpretation=interpretation,
        classes=classes,
        thumbnails=thumbnails,
        notes=notes,
    )
    if not data.hooks:
        raise UserError(
            f"{path}: has no metrics, gamma or evaluation yet; train it before reporting"
        )
    return data


def _evaluated(run: Run, notes: list[str]) -> tuple[Json, dict[str, np.ndarray], Json]:
    if not run.has(EVALUATION_PART):
        notes.append(
            "No evaluation on held-out data yet: this page shows training only. "
            "Run wsae evaluate, then wsae report again."
        )
        return {}, {}, {}
    arrays = formed_arrays(*_arrays(run, EVALUATION_PART))
    return run.evaluation_record, arrays, run.context_record


def _arrays(run: Run, part: str) -> tuple[dict[str, np.ndarray], Path]:
    tensors, place = run.tensors(part), run.path / part / ARRAYS
    odd = next((name for name, tensor in tensors.items() if tensor.is_complex()), None)
    if odd is not None:
        raise UserError(f"{place}: {odd!r} holds complex numbers; make it again")
    return {name: tensor.double().numpy() for name, tensor in tensors.items()}, place


def read_classes(run: Run) -> tuple[Json, dict[str, np.ndarray]]:
    """Return RUN/classes as an interpretation and its arrays by "hook|member|name"; nothing where it is not there.

    Raises UserError when a part of it is cut or altered.
    """
    if not run.has(CLASSES_PART):
        return {}, {}
    record = run.class_record
    arrays, place = _arrays(run, CLASSES_PART)
    if any(array.ndim != 1 for name, array in arrays.items() if name.endswith(BY_CLASS)):
        raise UserError(f"{place}: holds a score that is no row of numbers; make it again")
    hooks = {hook: _class_hook(found) for hook, found in record["hooks"].items()}
    return {"hooks": hooks, "glossary": record.get("glossary", {})}, arrays


def _class_hook(found: Json) -> Json:
    least = found["config"]["min_support"]
    return {
        "members": {name: _class_entry(entry, least) for name, entry in found["members"].items()},
        "controls": {name: _class_entry(entry, least) for name, entry in found["controls"].items()},
        "comparisons": found["comparisons"],
    }


def _class_entry(entry: Json, least: int) -> Json:
    coverage = entry["coverage"]
    total = int(coverage["latents"])
    alive, supported = (round(total * coverage[key]) for key in ("alive", "supported"))
    skipped = {"never active": total - alive, f"active on under {least} images": alive - supported}
    counts = {"sampled": total, "scored": supported, "skipped": skipped}
    return {"summary": entry["scores"], "density": entry["density"], "counts": counts}


def _add_scores(contexts: Json, arrays: dict[str, np.ndarray]) -> None:
    """Add the class scores of every latent among the contexts to its other scores."""
    for hook, members in contexts.items():
        for member, latents in members.items():
            for name in SHOWN:
                values = arrays.get(f"{hook}|{member}|{name}")
                if values is None:
                    continue
                for entry in latents:
                    value = float(values[entry["latent"]])
                    known = None if np.isnan(value) else value
                    entry["scores"] = {**entry.get("scores", {}), name: known}


def _merged(evaluated: Json, interpreted: Json) -> Json:
    """Return the latents of both, once each: what both say comes from the evaluation, the scores from the other."""
    out: Json = {hook: dict(members) for hook, members in evaluated.items()}
    for hook, members in interpreted.items():
        named = out.setdefault(hook, {})
        for member, latents in members.items():
            known = {entry["latent"]: entry for entry in named.get(member, [])}
            known |= {e["latent"]: {**e, **known.get(e["latent"], {})} for e in latents}
            named[member] = list(known.values())
    return out


def is_control(member: str) -> bool:
    """Return whether a member is an untrained control."""
    return member.startswith(CONTROL_PREFIX)


def find(config: object, key: str) -> object:
    """Return the first value called `key` in nested JSON, breadth first; None when there is none."""
    level = [config]
    while level:
        objects = [item for item in level if isinstance(item, dict)]
        for item in objects:
            if item.get(key) is not None:
                return item[key]
        lists = [item for item in level if isinstance(item, list)]
        level = [value for item in objects for value in item.values()]
        level += [value for item in lists for value in item]
    return None


def finite(value: object) -> float | None:
    """Return a JSON number as a float, or None when it is missing, NaN or infinite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:  # a whole number of more than 308 digits
        return None
    return number if math.isfinite(number) else None
