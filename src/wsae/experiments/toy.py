"""`wsae toy`: SAEs of several kinds beside their plain twins, on toy models over levels of S, scored with the truth."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from wsae.core.artifact import MANIFEST
from wsae.core.errors import UserError, nearest
from wsae.core.files import locked, write_json
from wsae.core.progress import Progress, quiet
from wsae.evals.glossary import RECOVERY
from wsae.experiments.sweep.config import Method, ToySweepConfig
from wsae.experiments.sweep.run import (
    CLOSED_FORM,
    RANDOM,
    ROWS,
    Row,
    read_rows,
    run_sweep,
    with_true_k,
)
from wsae.experiments.sweep.table import Mean, differences, select, series
from wsae.losses.config import GammaConfig
from wsae.sae.config import Kind
from wsae.toy.config import FeatureConfig
from wsae.train.config import MemberConfig

CHANCE = "chance"
"""Beside mcc_direction: what random directions reach on the same W_p."""
RESULT, TOYS = "toy.json", "toy"
TOP_K = ("topk", "group_topk", "batch_topk")
ONLY = {"tied": "relu", "l1": "relu", "l0": "jumprelu"}
"""Fields of a member that one kind alone takes from the sweep."""
LEAST_ACTIVE = 30
"""A level whose scored rows hold fewer active features than this on average is refused."""


def toy_methods(
    kinds: Iterable[Kind], gammas: Iterable[GammaConfig], k: int | None = None, **fields: Any
) -> tuple[Method, ...]:
    """Return one method per kind and rule, each kind's plain twin first, called "kind rule".

    `k` serves the Top-k kinds; None takes the world's mean number of active features. Of `fields` (those of
    MemberConfig) tied and l1 serve the kind relu alone, l0 the kind jumprelu. Raises UserError for bad values.
    """
    rules = list(dict.fromkeys([GammaConfig(), *gammas]))
    methods = []
    for kind in dict.fromkeys(kinds):
        own = {name: value for name, value in fields.items() if kind == ONLY.get(name, kind)}
        own["activation"] = {"kind": kind}
        own["auxk"] = 0.0
        own["encoder_scale"] = 1.0
        if kind in TOP_K:
            own["activation"] = {"kind": kind, "k": 1 if k is None else k}
            own["auxk"] = MemberConfig().auxk
        for gamma in rules:
            member = MemberConfig.parse({"gamma": gamma, **own}, where="flags")
            guess = kind in TOP_K and k is None
            name = f"{kind} {gamma.label}"
            methods.append(Method(name=name, member=member, k_from_truth=guess))
    return tuple(methods)


def check_toy(cfg: ToySweepConfig, scores: Sequence[str]) -> list[str]:
    """Return what a reader should know of a sweep before it runs; raises UserError for one that cannot run."""
    for level in cfg.sparsities:
        active = cfg.training.rows * cfg.n_features * (1 - level)
        if active < LEAST_ACTIVE:
            raise UserError(
                f"sparsity {level:g}: only about {active:.2g} active features in the {cfg.training.rows:,} rows "
                "scored; use a lower one, or more features"
            )
        features = FeatureConfig(n_features=cfg.n_features, sparsity=level)
        for method in cfg.methods:
            member = with_true_k(method.member, features) if method.k_from_truth else method.member
            member.sae_config(cfg.d_in)
    narrow = _width(cfg) < cfg.n_features
    for score in scores:
        if score not in RECOVERY:
            raise UserError(f"score '{score}' is unknown{nearest(score, RECOVERY)}")
        if narrow and score.startswith("gt_raw"):
            raise UserError(
                f"score {score}: takes latent i as feature i, but d_sae = {_width(cfg)} is below "
                f"n_features = {cfg.n_features}; use gt_matched, or a larger --d-sae"
            )
    return _notes(cfg, narrow)


def run_toy(
    cfg: ToySweepConfig,
    scores: Sequence[str],
    out: Path,
    device: str = "cpu",
    progress: Progress = quiet,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Run the sweep into `out` (toy models, rows.json, toy.json) and return its rows with `summary`.

    A finished sweep of the same settings is read, not run again; its toy models serve other settings that need the
    same ones. Raises UserError, before anything is written, for a sweep that cannot run.
    """
    for note in check_toy(cfg, scores):
        say(f"note: {note}")
    with locked(out):
        if read_rows(cfg.to_dict(), out) is not None:
            say(f"{out} holds this sweep already; it is read")
        elif (out / MANIFEST).exists():
            say(f"{out} holds a sweep of other settings; its rows are replaced")
        rows = run_sweep(cfg, out, device, progress, out / TOYS)
        found = {"config": cfg.to_dict(), **summary(rows, cfg, scores)}
        write_json(out / RESULT, found)
    return {**found, "rows": rows, "files": [str(out / name) for name in (RESULT, ROWS, TOYS)]}


def summary(rows: Sequence[Row], cfg: ToySweepConfig, scores: Sequence[str]) -> dict[str, Any]:
    """Return means over seeds and paired differences from the plain twins, as flat records with intervals.

    `summaries`: one per score, method and level. `differences`: a - b for every method a with weights, b its twin.
    """
    names = [method.name for method in cfg.methods]
    controls = [name for name in (RANDOM, CLOSED_FORM) if select(rows, method=name)]
    summaries, paired = [], []
    for score in scores:
        for name in [*names, *controls]:
            means = series(rows, name, score)
            summaries += [_record(score, level, m, method=name) for level, m in means.items()]
        if score == "mcc_direction":
            chance = series(rows, names[0], "mcc_direction_chance")
            summaries += [_record(score, level, m, method=CHANCE) for level, m in chance.items()]
        for method in cfg.methods:
            twin = twin_of(method, cfg.methods)
            if method.name != twin:
                means = differences(rows, method.name, twin, score)
                paired += [
                    _record(score, level, m, a=method.name, b=twin) for level, m in means.items()
                ]
    falling = max(row.get("loss_still_falling", 0.0) for row in rows)
    return {"summaries": summaries, "differences": paired, "loss_still_falling": falling}


def twin_of(method: Method, methods: Sequence[Method]) -> str:
    """Return the name of the method that is this one without weights."""
    plain = method.member.model_copy(update={"gamma": GammaConfig()})
    return next(other.name for other in methods if other.member == plain)


def _record(score: str, level: float, mean: Mean, **names: str) -> dict[str, Any]:
    return {"score": score, **names, "sparsity": level, **mean._asdict()}


def _width(cfg: ToySweepConfig) -> int:
    return cfg.methods[0].member.width(cfg.d_in)


def _notes(cfg: ToySweepConfig, narrow: bool) -> list[str]:
    notes = []
    if cfg.d_in >= cfg.n_features:
        notes.append(
            f"n_features = {cfg.n_features} fit into d_in = {cfg.d_in} dimensions, so there is no need of superposition"
        )
    if narrow:
        notes.append(
            f"d_sae = {_width(cfg)} is below n_features = {cfg.n_features}: some features have no latent, and there is "
            f"no '{CLOSED_FORM}' to compare with"
        )
    if cfg.seeds == 1:
        notes.append("one seed gives no intervals")
    return notes
