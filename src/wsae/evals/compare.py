"""Members' metrics with intervals, and differences between members of one run or of several (`wsae compare`).

Arrays in, numbers out: nothing here reads a model. Differences are a - b on the same held-out data.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from wsae.acts.hooknames import among
from wsae.core.errors import UserError, understood
from wsae.evals.config import CONTROL, EvalConfig
from wsae.evals.glossary import COMPARED, MATCHING, METRICS, glossary
from wsae.evals.intervals import (
    Column,
    Difference,
    Estimate,
    Ratio,
    estimates,
    mean,
    paired_difference,
    unpaired_difference,
)
from wsae.run import ARRAYS, EVALUATION, EVALUATION_PART, PROBING_PART, SINGLE, Json, Run
from wsae.sae.config import SAEConfig
from wsae.train.config import MemberConfig, told_apart

Arrays = dict[str, np.ndarray]
"""One member's arrays by name (`arrays.safetensors` without the hook and member prefix)."""
Comparison = dict[str, str | float | int | bool | None]
"""One line of `comparisons`: a, b, metric, difference, low, high, effect_size, unit, n, paired."""
UNPAIRED = {"dead_frac", "dense_frac"}
"""Shares over all latents: matched pairs (live in both) could not show a difference in dead ones."""


def fvu(arrays: Arrays, suffix: str = "") -> Ratio | None:
    """Return FVU as a ratio over sequences: plain, under member M's Gamma ("@M") or of source S ("[S]")."""
    if f"seq_sse{suffix}" not in arrays:
        return None
    seen = arrays["seq_rows"] > 0
    return Ratio(arrays[f"seq_sse{suffix}"][seen], arrays[f"seq_var{suffix}"][seen])


def by_sequence(arrays: Arrays, under: str) -> dict[str, Ratio]:
    """Return the metrics whose independent unit is the sequence, as ratios of sums; absent arrays give no metric.

    fvu[S] is that of a crosscoder's source S alone, as is what ends so of those below (not ce_clean, in which nothing
    is spliced); fvu_weighted is under the Gamma of member `under`; cross-entropies are over the scored tokens of
    spliced sequences.
    """
    out: dict[str, Ratio] = {}
    if (plain := fvu(arrays)) is not None:
        out["fvu"] = plain
    for key in arrays:
        name, bracket, source = key.partition("[")
        if name == "seq_sse" and bracket and (one := fvu(arrays, f"[{source}")) is not None:
            out[f"fvu[{source}"] = one
    if "seq_l0" in arrays:
        seen = arrays["seq_rows"] > 0
        out["l0"] = Ratio(arrays["seq_l0"][seen], arrays["seq_rows"][seen])
    out |= _of_predictions(arrays)
    if (weighted := fvu(arrays, f"@{under}")) is not None:
        out["fvu_weighted"] = weighted
    return out


def _of_predictions(arrays: Arrays) -> dict[str, Ratio]:
    """Return what splicing does to the model's predictions, of all of a crosscoder's sources and of each alone."""
    out: dict[str, Ratio] = {}
    for end in (key.removeprefix("splice_kl") for key in arrays if key.startswith("splice_kl")):
        if f"splice_ce{end}" in arrays:
            clean, spliced = arrays["splice_ce_clean"], arrays[f"splice_ce{end}"]
            for key, nats in (("spliced", spliced), ("delta", spliced - clean)):
                out[f"ce_{key}{end}"] = Ratio(nats, arrays["splice_targets"])
            for ablation in ("zero", "mean"):
                ablated = arrays[f"splice_ce_{ablation}{end}"]
                out[f"ce_loss_recovered_{ablation}{end}"] = Ratio(
                    ablated - spliced, ablated - clean
                )
        out[f"kl{end}"] = Ratio(arrays[f"splice_kl{end}"], arrays["splice_targets"])
    if "splice_ce_clean" in arrays:
        out["ce_clean"] = Ratio(arrays["splice_ce_clean"], arrays["splice_targets"])
    return out


def by_latent(arrays: Arrays, cfg: EvalConfig) -> dict[str, Column]:
    """Return per-latent values of the metrics that are means over latents; absent arrays give no metric."""
    out: dict[str, Column] = {}
    if "density" in arrays:
        density = arrays["density"]
        out["dead_frac"] = (density == 0).astype(np.float64)
        out["dense_frac"] = (density > cfg.dense_threshold).astype(np.float64)
        out["density_mean"] = density
    if "variance" in arrays:
        out["latent_variance_mean"] = arrays["variance"]
    cosine = arrays.get("decoder_max_cosine")
    if cosine is not None and not np.isnan(cosine).any():
        out["decoder_cosine_max_mean"] = cosine.astype(np.float64)
    return out


def member_metrics(
    name: str, arrays: Arrays, cfg: EvalConfig
) -> dict[str, dict[str, float | None]]:
    """Return {metric: {value, low, high}} of one member; intervals by sequence or by latent.

    Explained variance over dimensions has no interval: dimensions are not a sample.
    """
    ratios = by_sequence(arrays, name)
    ratios |= {key: mean(values) for key, values in by_latent(arrays, cfg).items()}
    out: dict[str, Estimate] = {}
    for units in {len(ratio.num) for ratio in ratios.values()}:
        group = {key: ratio for key, ratio in ratios.items() if len(ratio.num) == units}
        out |= dict(zip(group, estimates(list(group.values()), cfg), strict=True))
    ev = arrays.get("ev_per_dim")
    if ev is not None and not np.isnan(ev).all():
        out["ev_dim_mean"] = Estimate(float(np.nanmean(ev)), None, None)
        out["ev_dim_min"] = Estimate(float(np.nanmin(ev)), None, None)
    return {key: out[key]._asdict() for key in sorted(out)}


class ComparedMember(NamedTuple):
    """One side of a comparison: its label in the results, its member name in its own run, its arrays."""

    label: str
    member: str
    arrays: Arrays


def compare_members(a: ComparedMember, b: ComparedMember, cfg: EvalConfig) -> list[Comparison]:
    """Compare `a` with `b` on the same held-out data; differences are a - b.

    By sequence, paired: fvu, fvu_weighted (both under a's gamma), l0, cross-entropy and KL. By latent: paired over the
    one-to-one pairs of the two where a has them, else (and always for dead_frac, dense_frac) unpaired.
    """
    out: list[Comparison] = []

    def add(metric: str, found: Difference, unit: str, paired: bool) -> None:
        line = {"a": a.label, "b": b.label, "metric": metric, **found._asdict()}
        out.append(line | {"unit": unit, "paired": paired})

    left, right = (by_sequence(side.arrays, a.member) for side in (a, b))
    spliced = _same(a.arrays, b.arrays, "splice_seq", "splice_targets")
    for metric in left:
        whole = metric.partition("[")[0]  # fvu[S] of a crosscoder's source S: fvu
        wanted = whole in COMPARED if spliced else whole in ("fvu", "l0", "fvu_weighted")
        if wanted and metric in right:
            add(metric, paired_difference(left[metric], right[metric], cfg), "sequence", True)
    of_a, of_b = by_latent(a.arrays, cfg), by_latent(b.arrays, cfg)
    index = a.arrays.get(f"pair_index@{b.member}")
    for metric in sorted(of_a.keys() & of_b.keys()):
        x, y = of_a[metric], of_b[metric]
        if index is None or metric in UNPAIRED:
            add(metric, unpaired_difference(x, y, cfg), "latent", False)
        else:
            x, y = x[index >= 0], y[index[index >= 0]]
            add(metric, paired_difference(mean(x), mean(y), cfg), "latent", True)
    return out


def _same(a: Arrays, b: Arrays, *keys: str) -> bool:
    none = np.zeros(0)
    return all(np.array_equal(a.get(key, none), b.get(key, none)) for key in keys)


def across_runs(b: ComparedMember, a: ComparedMember) -> ComparedMember:
    """Return `b` for comparison with `a` of another run: weighted sums stay only where both have the same gamma."""
    arrays = {key: value for key, value in b.arrays.items() if "@" not in key.partition("[")[0]}
    if "gamma" in b.arrays and _same(a.arrays, b.arrays, "gamma", "gamma_matrix"):
        for key in ("seq_sse", "seq_var"):
            arrays[f"{key}@{a.member}"] = b.arrays[f"{key}@{b.member}"]
    return b._replace(arrays=arrays)


# Which members of a sweep nobody else beats: fit against sparsity.

FRONTS = {"fvu": 1, "ce_loss_recovered_zero": -1}
"""What stands against L0 -> 1 where lower values are better, -1 where higher ones are."""


def fronts(members: Mapping[str, Json]) -> dict[str, list[Json]]:
    """Return metric -> the evaluated members by L0: member, group, label, l0, value, low, high, front.

    `front`: no other member has an L0 as low and a value as good, and one of the two better (Pareto). `group` is the
    kind and its weights, `label` what tells members of a group apart. {} where members differ in their weights alone:
    a family is compared by differences. Raises UserError for configurations that are none.
    """
    made = {name: _swept(entry["config"]) for name, entry in members.items() if "config" in entry}
    if len({str(member.shape) for member in made.values()}) < 2:
        return {}
    labels = dict(zip(made, told_apart([*made.values()], numbers=True), strict=True))
    out: dict[str, list[Json]] = {}
    for metric, sign in FRONTS.items():
        points = []
        for name, member in made.items():
            l0, found = (members[name]["metrics"].get(key) or {} for key in ("l0", metric))
            both = (l0.get("value"), found.get("value"))
            if all(value is not None and math.isfinite(value) for value in both):
                kind = member.activation.kind
                parts = [part.removeprefix(kind.replace("_", "-")) for part in labels[name]]
                weights = "" if member.plain else f", {member.weights}"
                about = {"member": name, "group": f"{kind}{weights}"}
                about["label"] = " ".join(part.removeprefix("-") for part in parts if part)
                points.append(about | {"l0": l0["value"], **found})
        at = [(point["l0"], sign * point["value"]) for point in points]
        for point, (x, y) in zip(points, at, strict=True):
            point["front"] = not any(a <= x and b <= y and (a, b) != (x, y) for a, b in at)
        if points:
            out[metric] = sorted(points, key=lambda point: point["l0"])
    return out


def _swept(config: Json) -> MemberConfig:
    """Return how a member was trained; of one SAE alone, what is known of it."""
    if "sae" not in config:
        return MemberConfig.parse(config, where="config of a member")
    shape = SAEConfig.parse(config["sae"], where="config of an SAE")
    return MemberConfig(d_sae=shape.d_sae, activation=shape.activation, tied=shape.tied)


class Evaluated(NamedTuple):
    """A run's evaluation, read back: its label and, per hook, data's digest, members' arrays, matchings, records.

    `dense`: the share of tokens from which on it called a latent dense.
    """

    label: str
    data: dict[str, str]
    arrays: dict[str, dict[str, Arrays]]
    matching: dict[str, dict[str, Json]]
    members: dict[str, dict[str, Json]]
    dense: float

    def side(self, hook: str, member: str, prefix: bool = True) -> ComparedMember:
        """Return a member, labelled with its run or without."""
        label = f"{self.label}:{member}" if prefix else member
        return ComparedMember(label, member, self.arrays[hook][member])


def compare(runs: list[Path], cfg: EvalConfig = EvalConfig()) -> Json:  # noqa: B008  (frozen)
    """Return {"runs", "hooks": {hook: [comparison, ...]}, "matching", "fronts", "probing", "glossary"}.

    Intervals are those of `cfg`, and latents are dense as the first run's evaluation said; `fronts` are those of all
    runs' members together (see `fronts`).

    One run: each weighted member against its plain twin. Several: also each run's members against those of the same
    name in the first run, and one SAE alone against all of a run's. Raises UserError when a run has no evaluation, two
    runs share no hook and member, or they were evaluated on different held-out data.
    """
    if not runs:
        raise UserError("name at least one run directory to compare")
    read = [read_evaluation(path) for path in runs]
    if len({one.label for one in read}) < len(read):
        read = [one._replace(label=str(path)) for one, path in zip(read, runs, strict=True)]
    cfg = cfg.model_copy(update={"dense_threshold": read[0].dense})
    several = len(read) > 1
    hooks: dict[str, list[Comparison]] = {}
    matching: dict[str, dict[str, Json]] = {}
    for one in read:
        label = f"{one.label}:" if several else ""
        for hook, found in one.matching.items():
            lines, named = hooks.setdefault(hook, []), matching.setdefault(hook, {})
            for member, match in found.items():
                a, b = (one.side(hook, name, several) for name in (member, match["with"]))
                lines += compare_members(a, b, cfg)
                named[f"{label}{member}"] = match | {"with": f"{label}{match['with']}"}
    swept: dict[str, dict[str, Json]] = {}
    for one in read:
        for hook, found in one.members.items():
            there = swept.setdefault(among(hook, swept) or hook, {})
            there |= {f"{one.label}:{m}" if several else m: entry for m, entry in found.items()}
    for other in read[1:]:
        for hook, lines in _between(other, read[0], cfg).items():
            hooks.setdefault(hook, []).extend(lines)
    return {
        "runs": [str(path) for path in runs],
        "hooks": hooks,
        "matching": matching,
        "fronts": {hook: found for hook, all_ in swept.items() if (found := fronts(all_))},
        "probing": probed({one.label: path for one, path in zip(read, runs, strict=True)}, cfg),
        "glossary": glossary(METRICS, MATCHING),
    }


_CLASSES = ("tasks", "letters", "pairs")
"""What a score's values by task are of."""


def probed(runs: dict[str, Path], cfg: EvalConfig) -> dict[str, dict[str, list[Comparison]]]:
    """Return kind of labels -> hook -> differences of probes, class by class, of the runs that were probed.

    One run: each weighted member against its twin. Several: members against those of the same name in the first run
    that was probed, where both have the same classes and rows.
    """
    read = {
        label: run.probing_record
        for label, run in ((label, Run(path)) for label, path in runs.items())
        if run.has(PROBING_PART)
    }
    out: dict[str, dict[str, list[Comparison]]] = {}
    if len(runs) == 1:
        for kind, found in (entry for record in read.values() for entry in record.items()):
            for hook, entry in found["hooks"].items():
                lines = [line for line in entry["comparisons"] if line["b"] in entry["members"]]
                named = [{**line, "unit": str(line["over"]).removesuffix("s")} for line in lines]
                out.setdefault(kind, {})[hook] = named
        return out
    first, *others = read or [""]
    for label in others:
        for kind, found in read[label].items():
            against = read[first].get(kind, {})
            same = all(found.get(key) == against.get(key) for key in ("counts", "skipped"))
            for hook in found["hooks"].keys() & against.get("hooks", {}).keys() if same else ():
                both = found["hooks"][hook], against["hooks"][hook]
                if all(both[0].get(key) == both[1].get(key) for key in _CLASSES):
                    sides = list(zip((label, first), both, strict=True))
                    out.setdefault(kind, {}).setdefault(hook, []).extend(
                        _class_by_class(sides, cfg)
                    )
    return out


def _class_by_class(sides: list[tuple[str, Json]], cfg: EvalConfig) -> list[Comparison]:
    """Return the differences of each member that two probed runs share, paired over classes."""
    (a, left), (b, right) = sides
    out: list[Comparison] = []
    for member in [name for name in left["members"] if name in right["members"]]:
        of_a, of_b = (side["members"][member]["summary"] for side in (left, right))
        for metric in [key for key in of_a if key in of_b]:
            x, y = (np.array(of[metric]["by_task"], dtype=np.float64) for of in (of_a, of_b))
            if len(x) == len(y):
                known = ~np.isnan(x) & ~np.isnan(y)
                gap = paired_difference(mean(x[known]), mean(y[known]), cfg)
                names = {"a": f"{a}:{member}", "b": f"{b}:{member}", "metric": metric}
                out.append({**names, **gap._asdict(), "unit": "task", "paired": True})
    return out


def _between(a: Evaluated, b: Evaluated, cfg: EvalConfig) -> dict[str, list[Comparison]]:
    """Return the differences of a's members from those of the same name in b; one SAE alone is compared with all."""
    shared = {
        hook: there
        for hook in a.arrays
        if (there := among(hook, b.arrays)) and _pairs(a.arrays[hook], b.arrays[there])
    }
    if not shared:
        raise UserError(f"{a.label} and {b.label} share no hook with a member of the same name")
    out: dict[str, list[Comparison]] = {}
    for hook, there in shared.items():
        if a.data[hook] != b.data[there]:
            raise UserError(
                f"{a.label} and {b.label} were evaluated on different held-out data at {hook} "
                f"(digests {a.data[hook][:12]} and {b.data[there][:12]}); evaluate both on the same data"
            )
        out[hook] = []
        for mine, other in _pairs(a.arrays[hook], b.arrays[there]):
            left, right = a.side(hook, mine), b.side(there, other)
            out[hook] += compare_members(left, across_runs(right, left), cfg)
    return out


def _pairs(a: Iterable[str], b: Iterable[str]) -> list[list[str]]:
    """Return which members of two runs at one hook are compared."""
    mine, others = ([name for name in names if name != CONTROL] for names in (a, b))
    alone = SINGLE in (*mine, *others)
    return [[m, o] for m in mine for o in others if m == o or alone]


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
        members = {hook: entry["members"] for hook, entry in hooks.items()}
        dense = float(record["config"]["dense_threshold"])
    return Evaluated(run.resolve().name, data, arrays, matching, members, dense)


def _summary(found: Json) -> Json:
    """Return how a member's latents match the twin's; raises TypeError or ValueError for another form."""
    cosine, chance = (found[key] for key in ("decoder_cosine_mean", "random_cosine_mean"))
    return {
        "with": str(found["with"]),
        "n_pairs": int(found["n_pairs"]),
        "decoder_cosine_mean": None if cosine is None else float(cosine),
        "random_cosine_mean": None if chance is None else float(chance),
    }
