"""`wsae evaluate`: what a run's SAEs are worth on held-out tokens."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import tyro

from wsae.cli.flags import Common, CommonFlags, Count, MaybeCount, MaybeName, MaybePlace, Number
from wsae.cli.live import behind, labelled, reopen
from wsae.cli.single import evaluate_sae, is_sae
from wsae.cli.ui import UI
from wsae.core.artifact import read_manifest
from wsae.core.config import Config
from wsae.core.files import write_json
from wsae.evals.classes.config import ClassesConfig
from wsae.evals.config import EvalConfig

ABOUT = """\
Measure every SAE of a run on held-out data, with intervals, into RUN/evaluation. Where the data have classes, its
latents are scored against them too, into RUN/classes."""
DEFAULTS = EvalConfig()
SHOWN = ("fvu", "fvu_weighted", "l0", "dead_frac", "ce_loss_recovered_zero")


class Flags(Config):
    """Flags of `wsae evaluate`."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A finished run's directory, or one SAE's (with --source), or hub:owner/name."""
    out: MaybePlace = None
    """Write the result as JSON here too."""
    source: MaybeName = None
    """Store or array to measure on; none means the run's own data."""
    labels: MaybePlace = None
    """For arrays: a .npy file with the class of every row, numbered from 0; stores of images have their own."""
    batch_size: Count = DEFAULTS.batch_size
    """Held-out rows encoded at once."""
    rows: MaybeCount = None
    """Held-out rows measured at most; none means all. Needs --splice-tokens 0."""
    draws: Count = DEFAULTS.draws
    """Bootstrap resamples behind each interval."""
    confidence: Number = DEFAULTS.confidence
    """Coverage of the intervals."""
    n_latents: Count = DEFAULTS.n_latents
    """Latents per SAE whose contexts are collected for the report; 0 skips them."""
    n_contexts: Count = DEFAULTS.n_contexts
    """Contexts per latent."""
    splice_tokens: Count = DEFAULTS.splice_tokens
    """Held-out tokens run through the model with reconstructions in place; 0 skips it."""
    common: CommonFlags = Common()
    """Flags of every command."""


def run(flags: Flags, ui: UI) -> dict[str, Any]:
    """Evaluate and return the content of evaluation.json, with the run's path."""
    own = ("batch_size", "rows", "draws", "confidence", "n_latents", "n_contexts", "splice_tokens")
    data = {name: getattr(flags, name) for name in own} | {"seed": flags.common.seed}
    cfg = EvalConfig.parse(data, where="flags")
    from wsae.cli.runner import device

    if is_sae(flags.run):
        where = device(flags.common.device)
        alone = evaluate_sae(flags.run, flags.source, cfg, where, ui.progress)
        if flags.out is not None:
            write_json(flags.out, alone)
        return alone
    read_manifest(flags.run, "run", verify=False)
    from wsae.evals.classes.labels import labels_of
    from wsae.evals.classes.run import score_run
    from wsae.evals.run import evaluate_run

    where = device(flags.common.device)
    source = labelled(reopen(flags.run, where, flags.source), flags.labels)
    seen = behind(source, where, language=cfg.splice_tokens > 0)
    record = evaluate_run(flags.run, source, cfg, seen, ui.progress)
    labels = labels_of(source)
    if labels is not None:
        found = ClassesConfig(draws=cfg.draws, confidence=cfg.confidence, seed=cfg.seed)
        record["classes"] = score_run(flags.run, source, labels, found, ui.progress)
    if flags.out is not None:
        write_json(flags.out, record)
    return {"run": str(flags.run), **record}


def show(result: dict[str, Any], ui: UI) -> None:
    """Print the scores and what to do next."""
    show_scores(result, ui)
    if "sae" in result:
        return
    for hook, found in result.get("classes", {}).get("hooks", {}).items():
        show_classes(hook, found, ui)
    place = shlex.quote(result["run"])
    ui.say(f"next: wsae compare {place}; wsae report {place}")


def show_scores(result: dict[str, Any], ui: UI) -> None:
    """Print a table per hook: one row per metric, one column per member."""
    for note in result.get("notes", ()):
        ui.say(f"note: {note}")
    for hook, found in result["hooks"].items():
        members = found["members"]
        rows = [
            [key, *(interval(member["metrics"].get(key)) for member in members.values())]
            for key in SHOWN
        ]
        known = [row for row in rows if set(row[1:]) != {"-"}]
        ui.table(f"{hook}: held-out data", ("metric", *members), known)


def show_classes(hook: str, found: dict[str, Any], ui: UI) -> None:
    """Print the class scores of members and controls, one row each."""
    scored = found["members"] | found["controls"]
    scores = list(next(iter(scored.values()))["scores"])
    rows = [
        [name, *(interval(entry["scores"][score]) for score in scores)]
        for name, entry in scored.items()
    ]
    ui.table(f"{hook}: latents against {len(found['class_totals'])} classes", ("", *scores), rows)


def interval(score: Any) -> str:
    """Return `value [low, high]`, or a dash where it was not measured."""
    if isinstance(score, int | float):
        score = {"value": score}
    if not isinstance(score, dict) or score.get("value") is None:
        return "-"
    if score.get("low") is None or score["low"] == score.get("high"):
        return f"{score['value']:.3g}"
    return f"{score['value']:.3g} [{score['low']:.3g}, {score['high']:.3g}]"
