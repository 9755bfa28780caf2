"""`wsae compare`: differences between members of one run, or between runs evaluated on the same held-out data."""

from pathlib import Path
from typing import NamedTuple

from wsae.core.errors import UserError, understood
from wsae.evals.config import EvalConfig
from wsae.evals.control import CONTROL
from wsae.evals.glossary import glossary
from wsae.evals.run import Json
from wsae.evals.scores import Arrays, ComparedMember, Comparison, across_runs, compare_members
from wsae.run import ARRAYS, EVALUATION, EVALUATION_PART, Run


class Evaluated(NamedTuple):
    """A run's evaluation, read back: its label and, per hook, the data's digest, members' arrays, twins, matchings."""

    label: str
    data: dict[str, str]
    arrays: dict[str, dict[str, Arrays]]
    twins: dict[str, dict[str, str]]
    matching: dict[str, dict[str, Json]]


def compare(runs: list[Path], cfg: EvalConfig = EvalConfig()) -> Json:  # noqa: B008  (frozen)
    """Return {"runs", "hooks": {hook: [comparison, ...]}, "matching", "glossary"} with intervals from `cfg`.

    One run: each weighted member against its plain twin. Several: also each run's members against those of the
    same name in the first run. Raises UserError when a run has no evaluation, two runs share no hook and member,
    or they were evaluated on different held-out data.
    """
    if not runs:
        raise UserError("name at least one run directory to compare")
    read = [read_evaluation(path) for path in runs]
    labels = [one.label for one in read]
    if len(set(labels)) < len(labels):
        read = [one._replace(label=str(path)) for one, path in zip(read, runs, strict=True)]
    several = len(read) > 1
    hooks: dict[str, list[Comparison]] = {}
    for one in read:
        for hook, lines in _within(one, cfg, several).items():
            hooks.setdefault(hook, []).extend(lines)
    for other in read[1:]:
        for hook, lines in _between(other, read[0], cfg).items():
            hooks.setdefault(hook, []).extend(lines)
    return {
        "runs": [str(path) for path in runs],
        "hooks": hooks,
        "matching": _matching(read),
        "glossary": glossary(),
    }


def read_evaluation(run: Path) -> Evaluated:
    """Read RUN/evaluation; raises UserError when it is missing, cut or altered."""
    path = run / EVALUATION_PART
    opened = Run(run)
    if opened.finished:
        opened.manifest  # noqa: B018  (an altered one is refused)
    record, tensors = opened.evaluation_record, opened.arrays
    if not tensors:
        raise UserError(f"{path}: has no {ARRAYS}; run: wsae evaluate {run}")
    arrays: dict[str, dict[str, Arrays]] = {}
    with understood(path / ARRAYS):
        for key, value in tensors.items():
            hook, member, name = key.split("|")
            arrays.setdefault(hook, {}).setdefault(member, {})[name] = value.numpy()
    with understood(path / EVALUATION):
        hooks = record["hooks"]
        data = {hook: entry["data"] for hook, entry in hooks.items()}
        matching = {
            hook: {member: _summary(found) for member, found in entry["matching"].items()}
            for hook, entry in hooks.items()
        }
        twins = {hook: {m: s["with"] for m, s in found.items()} for hook, found in matching.items()}
    return Evaluated(run.resolve().name, data, arrays, twins, matching)


def _summary(found: Json) -> Json:
    """Return how a member's latents match the twin's; raises TypeError or ValueError for another form."""
    cosine, chance = (found[key] for key in ("decoder_cosine_mean", "random_cosine_mean"))
    return {
        "with": str(found["with"]),
        "n_pairs": int(found["n_pairs"]),
        "decoder_cosine_mean": None if cosine is None else float(cosine),
        "random_cosine_mean": None if chance is None else float(chance),
    }


def _matching(read: list[Evaluated]) -> dict[str, dict[str, Json]]:
    """Return {hook: {member: how its latents match the twin's}}, members labelled as in the comparisons."""
    out: dict[str, dict[str, Json]] = {}
    for one in read:
        label = f"{one.label}:" if len(read) > 1 else ""
        for hook, found in one.matching.items():
            out.setdefault(hook, {}).update(
                {f"{label}{m}": {**s, "with": f"{label}{s['with']}"} for m, s in found.items()}
            )
    return out


def _within(one: Evaluated, cfg: EvalConfig, prefix: bool) -> dict[str, list[Comparison]]:
    out = {}
    for hook, twins in one.twins.items():
        lines = []
        for member, twin in twins.items():
            a, b = (ComparedMember(name, name, one.arrays[hook][name]) for name in (member, twin))
            lines += compare_members(a, b, cfg)
        label = f"{one.label}:" if prefix else ""
        out[hook] = [
            line | {"a": f"{label}{line['a']}", "b": f"{label}{line['b']}"} for line in lines
        ]
    return out


def _between(a: Evaluated, b: Evaluated, cfg: EvalConfig) -> dict[str, list[Comparison]]:
    shared = {
        hook: [m for m in a.arrays[hook] if m in b.arrays[hook] and m != CONTROL]
        for hook in a.arrays
        if hook in b.arrays
    }
    if not any(shared.values()):
        raise UserError(f"{a.label} and {b.label} share no hook with a member of the same name")
    out = {}
    for hook, members in shared.items():
        if a.data[hook] != b.data[hook]:
            raise UserError(
                f"{a.label} and {b.label} were evaluated on different held-out data at {hook} "
                f"(digests {a.data[hook][:12]} and {b.data[hook][:12]}); evaluate both on the same data"
            )
        out[hook] = [line for m in members for line in _pair(a, b, hook, m, cfg)]
    return out


def _pair(a: Evaluated, b: Evaluated, hook: str, member: str, cfg: EvalConfig) -> list[Comparison]:
    left, right = (
        ComparedMember(f"{one.label}:{member}", member, one.arrays[hook][member]) for one in (a, b)
    )
    return compare_members(left, across_runs(right, left), cfg)
