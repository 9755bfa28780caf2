"""`wsae evaluate`: what a run's SAEs are worth on held-out tokens."""

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import tyro

from wsae.acts.config import BUILTIN
from wsae.acts.hooknames import among
from wsae.cli.flags import (
    Common,
    CommonFlags,
    MaybeCount,
    MaybeName,
    MaybePlace,
    config_flags,
    config_values,
)
from wsae.cli.live import behind, labelled, of_single, on_text, refuse, reopen
from wsae.cli.runner import device
from wsae.cli.ui import UI
from wsae.core.artifact import CLASSES_PART, EVALUATION_PART, MANIFEST, kind_of
from wsae.core.config import FLAGS, Config
from wsae.core.errors import UserError
from wsae.core.files import write_json
from wsae.core.hub import local_folder
from wsae.core.progress import Progress
from wsae.evals.classes.config import ClassesConfig
from wsae.evals.config import EvalConfig
from wsae.run import SINGLE, Run
from wsae.sae.config import Provenance

if TYPE_CHECKING:
    from wsae.acts.stream import ActivationSource
    from wsae.sae import SAE

# `wsae evaluate` of one SAE's directory (imported, exported and back, or from the hub) instead of a
# run's.


def is_sae(path: Path) -> bool:
    """Return whether a path, or a hub address, is one SAE: a directory of ours, an export, or another tool's files."""
    folder = local_folder(path)
    if (folder / MANIFEST).is_file():
        return kind_of(folder) in ("sae", "export")
    from wsae.interop.convert import readable

    return readable(folder)


class ReadingFlags(Config):
    """A text for the model of one SAE alone."""

    text: Annotated[str | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """For one SAE alone, in place of --source: a text for its model, as in `wsae harvest`, or "builtin"."""
    model: MaybeName = None
    """The model that reads --text; default: the one that the SAE's files name."""
    hook: MaybeName = None
    """The module whose activations the SAE takes; default: the one that its files name."""
    seq_len: MaybeCount = None
    """Tokens per sequence of --text; default: as in the SAE's training, at most 256."""

    def opened(self, about: Provenance, seed: int, device: str) -> "ActivationSource":
        """Return what the model gives on the text at the SAE's hook."""
        assert self.text is not None
        said = {name: value for name in ("model", "hook") if (value := getattr(self, name))}
        length = {} if self.seq_len is None else {"seq_len": self.seq_len}
        about = about.model_copy(update=said)
        return on_text(self.text, about, seed=seed, device=device, **length)


def evaluate_sae(
    flags: "Flags", cfg: EvalConfig, device: str, progress: Progress
) -> dict[str, Any]:
    """Measure one SAE on held-out rows of a store, an array or a model on --text, beside random directions.

    Returns {"sae": path, "hooks": {hook: {"members": {name: {"metrics": ...}}}}, "notes": [...]}, and `classes` where
    the data have them; notes say what speaks against the scores. A directory of ours is a run of one member and keeps
    the evaluation, as `evaluate_run` writes it; another tool's folder, or one that cannot be written to, is left alone.
    Raises UserError without data, or for data that do not fit.
    """
    from wsae.evals.control import CONTROL
    from wsae.evals.run import doubts, evaluate, evaluate_run

    path = flags.run
    sae, data, hook, ours, notes = open_sae(
        path, flags.source, device, flags.reading, flags.common.seed
    )
    if not ours:
        if flags.labels is not None:
            raise UserError(
                f"--labels: the scores by class are kept beside the SAE, and {path} is another tool's or read-only; "
                "make a directory of it with wsae import"
            )
        scored = evaluate(sae.to(device), data, cfg, progress)
        names = {"metrics": SINGLE, "control": "random"}
        members = {name: {"metrics": scored[key]} for key, name in names.items() if key in scored}
        notes += doubts({hook: {"members": members}})
        return {"sae": str(path), "hooks": {hook: {"members": members}}, "notes": notes}
    data, seen = labelled(data, flags.labels), None
    try:
        seen = behind(data, device, language=cfg.splice_tokens > 0)
    except UserError as error:
        notes.append(f"not spliced into the model: {error}")
    written = evaluate_run(path, data, cfg, seen, progress, device)
    found = written["hooks"][hook]["members"]
    members = {"random" if name == CONTROL else name: found[name] for name in found}
    notes += written.get("notes", [])
    classes = class_scores(path, data, cfg, progress)
    return {"sae": str(path), "hooks": {hook: {"members": members}}, "notes": notes, **classes}


class OpenedSae(NamedTuple):
    """One SAE and the data to measure it on."""

    sae: "SAE"
    data: "ActivationSource"
    hook: str
    ours: bool
    """Whether its folder is one of ours that results can be written to."""
    notes: list[str]


def open_sae(
    path: Path,
    source: str | None,
    device: str,
    reading: ReadingFlags = ReadingFlags(),  # noqa: B008  (frozen)
    seed: int = 0,
) -> OpenedSae:
    """Open one SAE of ours or another tool's with its data; raises UserError without data, or where they do not fit."""
    from wsae.interop.convert import load

    loaded = load(path)
    ours = loaded.format == "wsae" and path.is_dir() and os.access(path, os.W_OK)
    if reading.text is not None:
        data = reading.opened(loaded.about, seed, device)
    elif ours:
        data = reopen(path, device, source)
    else:
        data = of_single(path, loaded.about, source)
    ((hook, width),) = data.hooks.items()
    if width != loaded.sae.cfg.d_in:
        trained = f" (trained at {loaded.about.hook})" if loaded.about.hook else ""
        place = source or reading.text or "the data it was measured on before"
        raise UserError(
            f"{path}: takes activations of width {loaded.sae.cfg.d_in}{trained}, and {place} has {width} at {hook}; "
            "give activations of the SAE's model and hook"
        )
    notes = [*loaded.about.notes, *strangers(loaded.about.model, loaded.about.hook, data)]
    return OpenedSae(loaded.sae, data, hook, ours, notes)


def class_scores(
    run: Path, source: "ActivationSource", cfg: EvalConfig, progress: Progress
) -> dict[str, Any]:
    """Score latents against the data's classes, into RUN/classes; nothing where the data have none."""
    from wsae.evals.classes.run import labels_of, score_run

    labels = labels_of(source)
    if labels is None:
        return {}
    found = ClassesConfig(draws=cfg.draws, confidence=cfg.confidence, seed=cfg.seed)
    return {"classes": score_run(run, source, labels, found, progress)}


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
    if name in BUILTIN:
        return BUILTIN[0]
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
    """A finished run's directory, or one SAE's (with --source or --text), or hub:owner/name."""
    out: MaybePlace = None
    """Write the result as JSON here too."""
    source: MaybeName = None
    """Store or array to measure on; default: the run's own data."""
    reading: tyro.conf.OmitArgPrefixes[ReadingFlags] = ReadingFlags()
    """A text for the model of one SAE alone."""
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
    where, text = device(flags.common.device), flags.reading.text
    if text is None:
        refuse(flags.reading, "goes with --text")
    elif flags.source is not None:
        raise UserError(f"--source {flags.source} and --text {text}: give one of them")
    if is_sae(flags.run):
        alone = evaluate_sae(flags, cfg, where, ui.progress)
        if flags.out is not None:
            write_json(flags.out, alone)
        return alone
    if text is not None:
        raise UserError(
            f"--text {text}: is for one SAE alone; a run is measured on its own data, or on --source"
        )
    from wsae.evals.run import evaluate_run

    source = labelled(reopen(flags.run, where, flags.source), flags.labels)
    seen = behind(source, where, language=cfg.splice_tokens > 0)
    record = evaluate_run(flags.run, source, cfg, seen, ui.progress)
    if flags.source is not None:
        foreign = strangers(_model_of(Run(flags.run).source), None, source)
        record["notes"] = [*record.get("notes", []), *foreign]
    record |= class_scores(flags.run, source, cfg, ui.progress)
    if flags.out is not None:
        write_json(flags.out, record)
    return {"run": str(flags.run), **record}


def show(result: dict[str, Any], ui: UI) -> None:
    """Print the scores and what to do next."""
    show_scores(result, ui)
    for hook, found in result.get("classes", {}).get("hooks", {}).items():
        show_classes(hook, found, ui)
    if "sae" in result:
        place = shlex.quote(result["sae"])
        if Path(result["sae"], EVALUATION_PART).is_dir():
            ui.say(f"next: wsae report {place}; wsae serve {place}")
        return
    place = shlex.quote(result["run"])
    ui.say(f"next: wsae compare {place}; wsae report {place}")


def interrupted(flags: Flags, words: list[str], error: KeyboardInterrupt) -> str:  # noqa: ARG001
    """Say what is kept and how to go on."""
    parts = (EVALUATION_PART, CLASSES_PART)
    kept = [part for part in parts if (flags.run / part / MANIFEST).is_file()]
    whole = f"{flags.run} keeps its {' and '.join(kept)}; " if kept else "nothing was written; "
    return f"{whole}the same command measures again"


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
