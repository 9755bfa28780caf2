"""`wsae evaluate`: what a run's SAEs are worth on held-out tokens."""

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import tyro

from wsae.acts.hooknames import among
from wsae.cli.flags import Common, CommonFlags, MaybeName, MaybePlace, config_flags, config_values
from wsae.cli.live import at_hook, behind, labelled, reopen
from wsae.cli.ui import UI
from wsae.core.artifact import EVALUATION_PART, MANIFEST, kind_of
from wsae.core.config import FLAGS, Config
from wsae.core.errors import UserError
from wsae.core.files import write_json
from wsae.core.hub import local_folder
from wsae.core.progress import Progress
from wsae.evals.classes.config import ClassesConfig
from wsae.evals.config import EvalConfig
from wsae.run import SINGLE, Run

if TYPE_CHECKING:
    from wsae.acts.stream import ActivationSource
    from wsae.sae import SparseAutoencoder

# `wsae evaluate` of one SAE's directory (imported, exported and back, or from the hub) instead of a
# run's.


def is_sae(path: Path) -> bool:
    """Return whether a path, or a hub address, is one SAE: a directory of ours, an export, or another tool's files."""
    folder = local_folder(path)
    if (folder / MANIFEST).is_file():
        return kind_of(folder) in ("sae", "export")
    from wsae.interop.convert import readable

    return readable(folder)


def evaluate_sae(
    path: Path, source: str | None, cfg: EvalConfig, device: str, progress: Progress
) -> dict[str, Any]:
    """Measure one SAE on a store's or an array's held-out rows, beside random directions.

    Returns {"sae": path, "hooks": {hook: {"members": {name: {"metrics": ...}}}}, "notes": [...]}; notes say what speaks
    against the scores. A directory of ours is a run of one member and keeps the evaluation, as `evaluate_run` writes
    it; another tool's folder, or one that cannot be written to, is left alone. Raises UserError without a source, or
    for one that does not fit.
    """
    from wsae.evals.control import CONTROL
    from wsae.evals.run import doubts, evaluate, evaluate_run

    sae, data, hook, ours, notes = open_sae(path, source, device)
    if ours:
        seen = None
        try:
            seen = behind(data, device, language=cfg.splice_tokens > 0)
        except UserError as error:
            notes.append(f"not spliced into the model: {error}")
        written = evaluate_run(path, data, cfg, seen, progress, device)
        found = written["hooks"][hook]["members"]
        members = {"random" if name == CONTROL else name: found[name] for name in found}
        notes += written.get("notes", [])
    else:
        scored = evaluate(sae.to(device), data, cfg, progress)
        names = {"metrics": SINGLE, "control": "random"}
        members = {name: {"metrics": scored[key]} for key, name in names.items() if key in scored}
        notes += doubts({hook: {"members": members}})
    return {"sae": str(path), "hooks": {hook: {"members": members}}, "notes": notes}


class OpenedSae(NamedTuple):
    """One SAE and the data to measure it on."""

    sae: "SparseAutoencoder"
    data: "ActivationSource"
    hook: str
    ours: bool
    """Whether its folder is one of ours that results can be written to."""
    notes: list[str]


def open_sae(path: Path, source: str | None, device: str) -> OpenedSae:
    """Open one SAE of ours or another tool's with its data; raises UserError without data, or where they do not fit."""
    from wsae.interop.convert import load

    loaded = load(path)
    ours = loaded.format == "wsae" and path.is_dir() and os.access(path, os.W_OK)
    if ours:
        data = reopen(path, device, source)
    elif source is not None:
        data = at_hook(source, loaded.about.hook)
    else:
        raise UserError(
            f"{path}: a single SAE knows no data; name a store or an array with --source"
        )
    ((hook, width),) = data.hooks.items()
    if width != loaded.sae.cfg.d_in:
        trained = f" (trained at {loaded.about.hook})" if loaded.about.hook else ""
        raise UserError(
            f"{path}: takes activations of width {loaded.sae.cfg.d_in}{trained}, and {source} has {width} at {hook}; "
            "give activations of the SAE's model and hook"
        )
    notes = [*loaded.about.notes, *strangers(loaded.about.model, loaded.about.hook, data)]
    return OpenedSae(loaded.sae, data, hook, ours, notes)


def strangers(model: str | None, hook: str | None, data: "ActivationSource") -> list[str]:
    """Return what speaks against an SAE of this model and hook on these activations; nothing for arrays."""
    place = data.describe()
    theirs = _model_of(place)
    if theirs is None:
        return []
    notes = []
    (here, *_) = data.hooks
    if hook is not None and among(hook, [here]) is None:
        notes.append(
            f"the SAE was trained at {hook}, these activations are of {here}: unless that is the same place in the "
            "model, the scores say nothing of the SAE"
        )
    if model is not None and _model(model) != _model(str(theirs)):
        notes.append(
            f"the SAE was trained on {model}, these activations are of {theirs}: unless that is the same model, the "
            "scores say nothing of the SAE"
        )
    return notes


def _model_of(source: dict[str, Any]) -> str | None:
    """Return the model that a run's source is of, None for arrays."""
    return source.get("model") or source.get("harvest", {}).get("model")


def _model(name: str) -> str:
    """Return a model's name without owner and place, in the words of the hub where TransformerLens has others."""
    last = name.rstrip("/").rsplit("/", 1)[-1].lower()
    return "gpt2" if last == "gpt2-small" else last


ABOUT = """\
Measure every SAE of a run on held-out data, with intervals, into RUN/evaluation. Where the data have classes, its
latents are scored against them too, into RUN/classes."""
SHOWN = ("fvu", "fvu_weighted", "l0", "dead_frac", "ce_loss_recovered_zero")


class EvalFlags(config_flags(EvalConfig)):
    """How held-out data are measured, and how sure the numbers are."""


class Flags(Config):
    """Flags of `wsae evaluate`."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A finished run's directory, or one SAE's (with --source), or hub:owner/name."""
    out: MaybePlace = None
    """Write the result as JSON here too."""
    source: MaybeName = None
    """Store or array to measure on; default: the run's own data."""
    labels: MaybePlace = None
    """For arrays: a .npy file with the class of every row, numbered from 0; stores of images have their own."""
    measured: tyro.conf.OmitArgPrefixes[EvalFlags] = EvalFlags()
    """How held-out data are measured."""
    common: CommonFlags = Common()
    """Flags of every command."""


def run(flags: Flags, ui: UI) -> dict[str, Any]:
    """Evaluate and return the content of evaluation.json, with the run's path."""
    data = config_values(flags.measured, EvalConfig) | {"seed": flags.common.seed}
    cfg = EvalConfig.parse(data, where=FLAGS)
    from wsae.cli.runner import device

    if is_sae(flags.run):
        where = device(flags.common.device)
        alone = evaluate_sae(flags.run, flags.source, cfg, where, ui.progress)
        if flags.out is not None:
            write_json(flags.out, alone)
        return alone
    from wsae.evals.classes.run import labels_of, score_run
    from wsae.evals.run import evaluate_run

    where = device(flags.common.device)
    source = labelled(reopen(flags.run, where, flags.source), flags.labels)
    seen = behind(source, where, language=cfg.splice_tokens > 0)
    record = evaluate_run(flags.run, source, cfg, seen, ui.progress)
    if flags.source is not None:
        foreign = strangers(_model_of(Run(flags.run).source), None, source)
        record["notes"] = [*record.get("notes", []), *foreign]
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
        place = shlex.quote(result["sae"])
        if Path(result["sae"], EVALUATION_PART).is_dir():
            ui.say(f"next: wsae report {place}; wsae serve {place}")
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
        show_matching(found.get("matching", {}), ui)


def show_matching(matching: dict[str, Any], ui: UI) -> None:
    """Print how many latents of each member are paired with its twin's, and how alike the pairs are."""
    for member, found in matching.items():
        pairs, cosine = found["n_pairs"], found["decoder_cosine_mean"]
        alike = "" if cosine is None else f", {likeness(cosine, found['random_cosine_mean'])}"
        ui.say(f"{member}: {pairs:,} latents matched with {found['with']}'s{alike}")


def likeness(cosine: float, chance: float | None) -> str:
    """Return the mean cosine of matched pairs beside that of random directions."""
    return f"mean cosine {cosine:.2f}" + ("" if chance is None else f" (chance {chance:.2f})")


def show_differences(hook: str, lines: list[dict[str, Any]], ui: UI) -> None:
    """Print differences with their intervals; where an interval leaves out 0 there is a star."""
    columns = ("a", "b", "metric", "a - b", "interval", "effect", "paired by")
    ui.table(
        f"{hook}: paired differences (*: the interval leaves out 0)", columns, map(_row, lines)
    )


def _row(line: dict[str, Any]) -> list[str]:
    low, high = line["low"], line["high"]
    sure = low is not None and (low > 0 or high < 0)
    return [
        line["a"],
        line["b"],
        line["metric"],
        _signed(line["difference"], ".3g") + (" *" if sure else ""),
        "-" if low is None else f"[{low:+.3g}, {high:+.3g}]",
        _signed(line.get("effect_size"), ".2f"),
        f"{line['n']:,} {line['unit']}s",
    ]


def _signed(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:+{form}}"


def show_classes(hook: str, found: dict[str, Any], ui: UI) -> None:
    """Print the class scores of members and controls, one row each."""
    entries = found["members"] | found["controls"]
    scores = list(next(iter(entries.values()))["scores"])
    rows = [
        [name, *(scored(e["scores"][score]) for score in scores), covered(e.get("coverage"))]
        for name, e in entries.items()
    ]
    title = f"{hook}: latents against {len(found['class_totals'])} classes"
    ui.table(title, ("", *scores, "latents"), rows)


def covered(coverage: dict[str, Any] | None) -> str:
    """Return how many latents fire on rows enough to be scored, of all, and how many never fire."""
    if coverage is None:
        return "-"
    total = coverage["latents"]
    enough, alive = (round(coverage[key] * total) for key in ("supported", "alive"))
    return f"{enough:,} of {total:,} ({alive - enough:,} too seldom, {total - alive:,} never fire)"


def scored(summary: Any) -> str:
    """Return a mean score with its interval and the number of latents it is over."""
    n = summary.get("n") if isinstance(summary, dict) else None
    return interval(summary) + ("" if n is None else f", n = {n}")


def counted(counts: dict[str, Any]) -> str:
    """Return 'scored of sampled', with the reasons of those skipped and the latents that never fire."""
    left = [f"{n} {reason}" for reason, n in counts["skipped"].items() if n]
    if counts.get("silent"):
        left.append(f"{counts['silent']:,} of all {counts['d_sae']:,} never fire")
    return f"{counts['scored']} of {counts['sampled']}" + (f" ({'; '.join(left)})" if left else "")


def interval(score: Any) -> str:
    """Return `value [low, high]`, or a dash where it was not measured."""
    if isinstance(score, int | float):
        score = {"value": score}
    if not isinstance(score, dict) or score.get("value") is None:
        return "-"
    if score.get("low") is None or score["low"] == score.get("high"):
        return f"{score['value']:.3g}"
    return f"{score['value']:.3g} [{score['low']:.3g}, {score['high']:.3g}]"
