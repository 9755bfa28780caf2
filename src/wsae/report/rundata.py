"""A run directory as the report sees it: what is there is read and checked, what is missing is noted, not invented.

Needed: `config.json`. Optional: `metrics.jsonl`, `gamma.json`, `evaluation/` and `interpretation/` (refused when cut or
altered).
"""

import math
from pathlib import Path

import numpy as np
from jaxtyping import Float
from pydantic import Field, field_validator

from wsae.core.errors import UserError, understood
from wsae.evals.compare import fronts
from wsae.run import (
    CLASSES_PART,
    CONTEXTS_FILE,
    EVALUATION_PART,
    INTERPRETATION_PART,
    METRICS_FILE,
    PROBING_PART,
    Count,
    Form,
    Json,
    Run,
)
from wsae.train.config import CONTROLS

SHOWN = ("consistency_top", "consistency_corrected", "information")
"""Class scores beside each latent in the browser."""
TWIN_NAME = "plain"
COLOURS = 7
"""Members whose names start like this were not trained: a floor, no competitors."""


class RunData:
    """Everything that is shown of a run, by hook and member; empty containers stand for missing parts.

    Raises UserError when a part is damaged, or there is nothing to show yet.
    """

    def __init__(self, run: Run) -> None:
        self.path, self.config, self.thumbnails = run.path, run.record, run.thumbnails
        self.weights = run.weights
        self.manifest: Json = run.manifest.to_dict() if run.finished else {}
        self.single = run.single
        if run.single:
            run.evaluation_record  # noqa: B018  (the only thing there is to show)
        self.metrics, self.gamma = run.metrics, run.gamma_record
        evaluated, interpreted, labelled = (
            run.has(part) for part in (EVALUATION_PART, INTERPRETATION_PART, CLASSES_PART)
        )
        self.evaluation: Json = run.evaluation_record if evaluated else {}
        with understood(run.path / EVALUATION_PART):
            self.fronts = {
                hook: fronts(entry.get("members", {}))
                for hook, entry in self.evaluation.get("hooks", {}).items()
            }
            """hook -> metric -> the members of a grid against L0 (`wsae.evals.compare.fronts`)."""
        self.arrays = run.numbers(EVALUATION_PART) if evaluated else {}
        self.interpretation: Json = run.interpretation_record if interpreted else {}
        self.classes: Json = _as_interpretation(run.class_record) if labelled else {}
        """Latents against class labels, in the form of `interpretation`."""
        self.probing: Json = run.probing_record if run.has(PROBING_PART) else {}
        self.by_class = run.numbers(CLASSES_PART) if labelled else {}
        """Their scores by "hook|member|name"."""
        with understood(run.path / EVALUATION_PART / CONTEXTS_FILE):
            self.contexts = _merged(
                run.context_record if evaluated else {},
                run.interpreted_contexts if interpreted else {},
                self.by_class,
            )
            """hook -> member -> latents; those that were interpreted have `explanation` and `scores` too."""
        has_contexts = any(
            latents for named in self.contexts.values() for latents in named.values()
        )
        self.contexts = self.contexts if has_contexts or not evaluated else {}
        lacks_metrics = not (run.path / METRICS_FILE).is_file()
        notes = {
            "Training has not finished: the run has no manifest yet.": not run.finished,
            "No evaluation on held-out data yet: this page shows training only. "
            "Run wsae evaluate, then wsae report again.": not evaluated,
            "No contexts: the data are arrays or no latent was sampled.": self.evaluation
            and not has_contexts,
            f"No training metrics: the run has no {METRICS_FILE}.": lacks_metrics
            and not run.single,
            f"The last line of {METRICS_FILE} is cut off (the run was stopped while writing it).": run.metrics_cut,
        }
        self.notes = [note for note, applies in notes.items() if applies]
        """What is missing and what that means, one sentence each, shown on the page."""
        if not self.hooks:
            raise UserError(
                f"{run.path}: has no metrics, gamma or evaluation yet; train it before reporting"
            )

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

    def kind(self, hook: str, member: str) -> str:
        """Return the colour class of a member: `s0` for the plain twin alone, then in order, over and over."""
        place = self.members(hook).index(member)
        return f"s{place if place < COLOURS else 1 + (place - 1) % (COLOURS - 1)}"

    def is_plain(self, hook: str, member: str) -> bool:
        """Return whether a trained member is neither weighted nor preconditioned: by its record, else by its name."""
        record = self.gamma_record(hook, member)
        rule = member == TWIN_NAME if record.get("rule") is None else record["rule"] == "none"
        return rule and record.get("precondition") is None and not is_control(member)

    @property
    def weighted(self) -> bool:
        """Whether some member is weighted or preconditioned, so that it stands beside a plain twin."""
        return any(
            not is_control(member) and not self.is_plain(hook, member)
            for hook in self.hooks
            for member in self.members(hook)
        )

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
    return RunData(run if isinstance(run, Run) else Run(run))


def _as_interpretation(record: Json) -> Json:
    """Return what classes.json says in the form of an interpretation."""

    def entry(member: Json, least: int) -> Json:
        coverage = member["coverage"]
        total = int(coverage["latents"])
        alive, supported = (round(total * coverage[key]) for key in ("alive", "supported"))
        skipped = {
            "never active": total - alive,
            f"active on under {least} images": alive - supported,
        }
        counts = {"sampled": total, "scored": supported, "skipped": skipped}
        return {"summary": member["scores"], "density": member["density"], "counts": counts}

    hooks = {
        hook: {
            **{
                kind: {n: entry(m, found["config"]["min_support"]) for n, m in found[kind].items()}
                for kind in ("members", "controls")
            },
            "comparisons": found["comparisons"],
        }
        for hook, found in record["hooks"].items()
    }
    return {"hooks": hooks, "glossary": record.get("glossary", {})}


def _merged(evaluated: Json, interpreted: Json, by_class: dict[str, np.ndarray]) -> Json:
    """Return the latents of both, once each, with their class scores among their other scores.

    What both say comes from the evaluation, the scores from the other.
    """
    out: Json = {hook: dict(members) for hook, members in evaluated.items()}
    for hook, members in interpreted.items():
        named = out.setdefault(hook, {})
        for member, latents in members.items():
            known = {entry["latent"]: entry for entry in named.get(member, [])}
            known |= {e["latent"]: {**e, **known.get(e["latent"], {})} for e in latents}
            named[member] = list(known.values())
    for hook, members in out.items():
        for member, latents in members.items():
            scores = {name: by_class.get(f"{hook}|{member}|{name}") for name in SHOWN}
            known = {name: values for name, values in scores.items() if values is not None}
            for entry in latents if known else []:
                found = {n: finite(float(values[entry["latent"]])) for n, values in known.items()}
                entry["scores"] = {**entry.get("scores", {}), **found}
    return out


def is_control(member: str) -> bool:
    """Return whether a member is an untrained control."""
    return member.startswith(CONTROLS)


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


DENSITY_EDGES = [-7.0 + 0.25 * i for i in range(29)]
"""The bins in which a member's densities are counted, as powers of ten."""


class DensityForm(Form):
    """A member's densities, counted."""

    edges: list[float]
    counts: list[Count] = Field(min_length=28, max_length=28)
    dead: Count

    @field_validator("edges")
    @classmethod
    def _ours(cls, edges: list[float]) -> list[float]:
        if edges != DENSITY_EDGES:
            raise ValueError("should be the edges of wsae's bins")
        return edges


def counted(density: Float[np.ndarray, " d_sae"]) -> DensityForm:
    """Count how many latents fire how often."""
    edges = np.array(DENSITY_EDGES)
    alive = np.clip(np.log10(density[density > 0]), edges[0], edges[-1] - 1e-9)
    counts, dead = np.histogram(alive, edges)[0].tolist(), int((density <= 0).sum())
    return DensityForm(edges=DENSITY_EDGES, counts=counts, dead=dead)
