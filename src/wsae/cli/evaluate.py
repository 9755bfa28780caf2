"""`wsae evaluate`: what a run's SAEs are worth on held-out tokens."""

import contextlib
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from wsae.acts.config import BUILTIN
from wsae.acts.hooknames import among
from wsae.cli.common import (
    UI,
    Common,
    CommonFlags,
    MaybeName,
    MaybePlace,
    ResultFile,
    config_flags,
    config_values,
    device,
)
from wsae.cli.live import GivenText, ReadingFlags, behind, data_of, labelled
from wsae.core.config import FLAGS, Config
from wsae.core.errors import UserError
from wsae.core.files import write_json
from wsae.core.progress import Progress
from wsae.evals.config import CONTROL, ClassesConfig, EvalConfig
from wsae.evals.glossary import HEADLINES
from wsae.run import CLASSES_PART, EVALUATION_PART, MANIFEST, Run

if TYPE_CHECKING:
    from wsae.acts.stream import ActivationSource

# `wsae evaluate` of one SAE's directory (imported, exported and back, or from the hub) instead of a
# run's.


def measured(target: Path, asked: GivenText, common: Common, ui: UI) -> Run:
    """Return the run that a target names; one SAE alone is measured on the text that is given, unless it was already.

    Raises UserError as `data_of` does.
    """
    from wsae.evals.run import evaluate_run
    from wsae.interop.saes import open_run

    opened = open_run(target)
    if asked.text is None:
        return opened
    where = device(common.device)
    data = data_of(opened, where, None, asked, common.seed)
    same = opened.has(EVALUATION_PART) and opened.source == data.describe()
    if same and opened.record["data"] in (None, data.digest()):
        return opened
    cfg = EvalConfig(seed=common.seed)
    evaluate_run(opened.path, data, cfg, behind(data, where), ui.progress, where)
    return Run(opened.path)


def class_scores(
    run: Path, source: "ActivationSource", cfg: EvalConfig, progress: Progress
) -> dict[str, Any]:
    """Score latents against the data's classes, into RUN/classes; nothing where the data have none."""
    from wsae.evals.classes import labels_of, score_run

    labels = labels_of(source)
    if labels is None:
        return {}
    found = ClassesConfig(draws=cfg.draws, confidence=cfg.confidence, seed=cfg.seed)
    return {"classes": score_run(run, source, labels, found, progress)}


def strangers(
    model: str | None,
    hook: str | None,
    data: "ActivationSource",
    here: str | None = None,
    so: str = "the scores say nothing of the SAE",
) -> list[str]:
    """Return what speaks against an SAE of this model and hook on the activations of `here`; nothing for arrays.

    `here` is by default the data's first hook; `so`: what follows.
    """
    place = data.describe()
    theirs = _model_of(place)
    if theirs is None:
        return []
    notes = []
    here = here or next(iter(data.hooks))
    if hook is not None and among(hook, [here], sure=True) is None:
        most = ", as in most kinds of models," if among(hook, [here]) else ""
        notes.append(
            f"the SAE was trained at {hook}, these activations are of {here}: unless that{most} is the same place in "
            f"the model, {so}"
        )
    if model is not None and _model(model) != _model(str(theirs)):
        notes.append(
            f"the SAE was trained on {model}, these activations are of {theirs}: unless that is the same model, {so}"
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


class EvalFlags(config_flags(EvalConfig)):
    """How held-out data are measured, and how sure the numbers are."""


class Flags(Config):
    """Flags of `wsae evaluate`."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A finished run's directory; or one SAE (with --source or --text): its folder, hub:owner/name, RELEASE:ID or
    whatever wsae import reads."""
    out: ResultFile = None
    """Write the result as JSON here too."""
    source: MaybeName = None
    """Store or array to measure on, of a crosscoder of two A+B; default: the run's own data."""
    reading: tyro.conf.OmitArgPrefixes[ReadingFlags] = ReadingFlags()
    labels: MaybePlace = None
    """For arrays: a .npy file with the class of every row, numbered from 0; stores of images have their own."""
    measured: tyro.conf.OmitArgPrefixes[EvalFlags] = EvalFlags()
    """How held-out data are measured."""
    common: CommonFlags = Common()


def run(flags: Flags, ui: UI) -> dict[str, Any]:
    """Evaluate and return the content of evaluation.json, with the run's path."""
    data = config_values(flags.measured, EvalConfig) | {"seed": flags.common.seed}
    cfg = EvalConfig.parse(data, where=FLAGS)
    from wsae.acts.source import AlignedSource, JoinedSource
    from wsae.evals.run import evaluate_run
    from wsae.interop.saes import open_run

    where, opened = device(flags.common.device), open_run(flags.run)
    asked = flags.reading.asked()
    source = labelled(data_of(opened, where, flags.source, asked, cfg.seed), flags.labels)
    seen, notes = None, []
    whole = source.whole if isinstance(source, JoinedSource) else source
    try:
        seen = behind(whole, where, language=cfg.splice_tokens > 0)
    except UserError as error:
        if not opened.single:
            raise UserError(f"{error} (evaluate does without it: --splice-tokens 0)") from error
        notes.append(f"not spliced into the model: {error}")
    if isinstance(whole, AlignedSource) and cfg.splice_tokens > 0:
        notes.append("not spliced into a model: its rows are of several sources")
    former = None
    with contextlib.suppress(UserError):  # none, or a damaged one
        former = _data(opened.evaluation_record)
    record = evaluate_run(opened.path, source, cfg, seen, ui.progress, where)
    if former not in (None, _data(record)):  # class scores of other data would stand beside it
        (opened.path / CLASSES_PART / MANIFEST).unlink(missing_ok=True)
    notes += [*foreign(opened, flags.source, source), *record.get("notes", [])]
    record |= {"notes": notes} if notes else {}
    record |= class_scores(opened.path, source, cfg, ui.progress)
    if not opened.single:
        result = {"run": str(flags.run), **record}
    else:
        result = {"sae": str(flags.run), **kept(opened, flags.run), **record, "hooks": {}}
        for hook, found in record["hooks"].items():
            members = {"random" if n == CONTROL else n: one for n, one in found["members"].items()}
            result["hooks"][hook] = {"members": members}
    if flags.out is not None:
        write_json(flags.out, result if opened.single else record)
    return result


def _data(record: dict[str, Any]) -> dict[str, str]:
    """Return the digest of the held-out rows of each hook."""
    return {hook: entry["data"] for hook, entry in record["hooks"].items()}


def kept(opened: Run, target: Path) -> dict[str, Any]:
    """Return where results lie, if not in the target itself."""
    return {} if opened.path == target else {"kept": str(opened.path)}


def foreign(opened: Run, elsewhere: str | None, source: "ActivationSource") -> list[str]:
    """Return what speaks against the SAEs on these activations."""
    if opened.single:
        from wsae.interop.saes import about_sae

        about = about_sae(opened.path)
        notes = [*about.notes, *strangers(about.model, about.hook, source)]
        if not (about.inputs or about.dataset or about.model):
            notes.append(
                "nothing says what the SAE was trained on; on these rows, none is held out"
            )
        return notes
    return strangers(_model_of(opened.source), None, source) if elsewhere is not None else []


def show(result: dict[str, Any], ui: UI) -> None:
    """Print the scores and what to do next."""
    show_scores(result, ui)
    for hook, found in result.get("classes", {}).get("hooks", {}).items():
        show_classes(hook, found, ui)
    if "kept" in result:
        ui.say(f"kept in {result['kept']}")
    if "sae" in result:
        place = shlex.quote(result["sae"])
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
        metrics = [member["metrics"] for member in members.values()]
        sources = next(
            (member["sources"] for member in members.values() if "sources" in member), {}
        )
        ends = [f"[{name}]" for name in sources.get("alone", ())]
        keys = (key for one in HEADLINES for key in (one, *(f"{one}{end}" for end in ends)))
        rows = [[key, *(interval(one.get(key)) for one in metrics)] for key in keys]
        known = [row for row in rows if set(row[1:]) != {"-"}]
        ui.table(f"{hook}: held-out data", ("metric", *members), known)
        for name, member in members.items():
            if "sources" in member:
                ui.say(f"{name}: live latents {owners(member['sources'])}")
        show_matching(found.get("matching", {}), ui)


def owners(sources: dict[str, Any]) -> str:
    """Return how many of a crosscoder's live latents are each source's alone, how many of all."""
    alone = [f"{n:,} of {name} alone" for name, n in sources["alone"].items()]
    of_all = sources["of_all"]
    return f"{', '.join(alone)}, {of_all['evenly']:,} of all evenly, {of_all['between']:,} between"


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
    columns = ("a", "b", "metric", "a - b", "interval", "effect", "over")
    ui.table(f"{hook}: differences (*: the interval leaves out 0)", columns, map(_row, lines))


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
        f"{line['n']:,} {line['unit']}s" + ("" if line.get("paired", True) else ", unpaired"),
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
