"""A run directory as the report sees it: what is there is read and checked, what is missing is noted, not invented.

Needed: `config.json`. Optional: `metrics.jsonl`, `gamma.json`, `evaluation/` and `interpretation/` (refused when cut or
altered).
"""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from wsae.core.artifact import MANIFEST, check_file, read_manifest
from wsae.core.errors import UserError, understood
from wsae.core.files import parse_json, read_json, read_lines
from wsae.core.tensors import load_tensors
from wsae.report.classdata import Json, add_scores, read_classes

_BASE64 = re.compile(r"[A-Za-z0-9+/]+={0,2}")
TWIN_NAME = "plain"
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
        """Say whether a trained member has no weighting: by its gamma rule, by its name where none is recorded."""
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


def read_run(path: Path) -> RunData:
    """Read a run directory; raises UserError when it is missing, no run, or a part of it is damaged."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(
            f"{path}: no such run directory; give the --out of a `wsae train` or `wsae demo`"
        )
    if not (path / "config.json").is_file():
        raise UserError(f"{path}: has no config.json, so it is not a wsae run directory")
    notes: list[str] = []
    manifest = _read_run_manifest(path, notes)
    evaluation, arrays, contexts = _read_evaluation(path / "evaluation", notes)
    thumbnails = _read_thumbnails(path / "evaluation")
    interpretation, interpreted = _read_interpretation(path / "interpretation")
    classes, by_class = read_classes(path / "classes")
    with understood(path / "evaluation" / "contexts.json"):
        contexts = _merged(contexts, interpreted)
        add_scores(contexts, by_class)
    if evaluation and not any(latents for named in contexts.values() for latents in named.values()):
        notes.append("No contexts: the data are arrays or no latent was sampled.")
        contexts = {}
    run = RunData(
        path=path,
        config=_object(path / "config.json"),
        manifest=manifest,
        metrics=_read_metrics(path / "metrics.jsonl", notes),
        gamma=_object(path / "gamma.json") if (path / "gamma.json").is_file() else {},
        evaluation=evaluation,
        arrays=arrays,
        contexts=contexts,
        interpretation=interpretation,
        classes=classes,
        thumbnails=thumbnails,
        notes=notes,
    )
    if not run.hooks:
        raise UserError(
            f"{path}: has no metrics, gamma or evaluation yet; train it before reporting"
        )
    return run


def _object(path: Path) -> Json:
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: a JSON object is needed here, this is a {type(value).__name__}")
    return value


def _read_run_manifest(path: Path, notes: list[str]) -> Json:
    if not (path / MANIFEST).is_file():
        notes.append("Training has not finished: the run has no manifest yet.")
        return {}
    manifest = read_manifest(path, "run", verify=False)
    for name in ("config.json", "gamma.json", "metrics.jsonl"):  # the page shows these, not weights
        if name in manifest.files:
            check_file(path, name, manifest.files[name])
    return manifest.to_dict()


def _read_evaluation(path: Path, notes: list[str]) -> tuple[Json, dict[str, np.ndarray], Json]:
    if not (path / MANIFEST).is_file():
        notes.append(
            "No evaluation on held-out data yet: this page shows training only. "
            "Run wsae evaluate, then wsae report again."
        )
        return {}, {}, {}
    files = read_manifest(path, "evaluation").files
    arrays: dict[str, np.ndarray] = {}
    if "arrays.safetensors" in files:
        tensors = load_tensors(path / "arrays.safetensors")
        arrays = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    contexts = _object(path / "contexts.json") if "contexts.json" in files else {}
    return _object(path / "evaluation.json"), arrays, contexts


def _read_thumbnails(path: Path) -> dict[str, str]:
    """Return image number -> PNG in base64; nothing else may reach an address on the page."""
    name = "thumbnails.json"
    listed = (path / MANIFEST).is_file() and name in read_manifest(path, "evaluation", False).files
    found = _object(path / name) if listed else {}
    for number, data in found.items():
        if not (number.isdigit() and isinstance(data, str) and _BASE64.fullmatch(data)):
            raise UserError(
                f"{path / name}: image {number} is not a picture in base64; evaluate the run again"
            )
    return found


def _read_interpretation(path: Path) -> tuple[Json, Json]:
    """Return the scores, and the contexts of the scored latents with explanation and scores beside them."""
    if not (path / MANIFEST).is_file():
        return {}, {}
    read_manifest(path, "interpretation")
    return _object(path / "interpretation.json"), _object(path / "contexts.json")


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


def _read_metrics(path: Path, notes: list[str]) -> dict[str, dict[str, list[Json]]]:
    if not path.is_file():
        notes.append("No training metrics: the run has no metrics.jsonl.")
        return {}
    lines = list(read_lines(path))
    out: dict[str, dict[str, list[Json]]] = {}
    for number, line in enumerate(lines, 1):
        try:
            row = parse_json(line)
            out.setdefault(row["hook"], {}).setdefault(row["member"], []).append(row)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if number < len(lines):
                raise UserError(
                    f"{path}: line {number} is not a metrics row ({error!r})"
                ) from error
            notes.append(
                "The last line of metrics.jsonl is cut off (the run was stopped while writing it)."
            )
    return out


def is_control(member: str) -> bool:
    """Say whether a member is an untrained control."""
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
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
