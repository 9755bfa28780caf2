"""`wsae probe`: do a few latents tell classes of tokens or documents apart?"""

import shlex
from pathlib import Path
from typing import Annotated, Any

import tyro

from wsae.acts.config import TextConfig
from wsae.cli.common import (
    UI,
    Common,
    CommonFlags,
    JsonFile,
    MaybeName,
    config_flags,
    config_values,
    device,
)
from wsae.cli.evaluate import foreign, interval, kept, show_differences
from wsae.cli.live import (
    NO_TEXT,
    GivenText,
    HookFlags,
    RoleFlags,
    data_of,
    language_of,
    refuse,
)
from wsae.core.config import FLAGS, Config
from wsae.core.errors import UserError
from wsae.evals.config import ProbeConfig
from wsae.run import Run

ABOUT = """\
Tell classes apart by a few latents, as SAEBench's sparse probing does, into RUN/probing. Without --text the classes are
of tokens and made by rule, from the run's own held-out text. With --text and --label they are of documents, and it is
also measured how well a class is removed by setting latents to 0. Beside every SAE stand the activations themselves and
a random SAE."""
COLUMNS = Annotated[str | None, tyro.conf.arg(metavar="COLUMN", help_behavior_hint="")]


class ProbeFlags(config_flags(ProbeConfig)):
    """What is probed, and how sure the numbers are."""


class LabelFlags(config_flags(TextConfig, omit=("path",))):
    """Text with labels."""

    text: Annotated[str | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """Text of which each record has a label, in any form that `wsae harvest --text` takes."""
    label: COLUMNS = None
    """Key (JSON) or column (tables) with the class of each record: a text, a number or a truth value."""
    spurious: COLUMNS = None
    """Another such column, of what may go with the class by accident: how well is it removed?"""

    def config(self) -> TextConfig | None:
        """Return where the text is, if any is given; raises UserError in one line."""
        if self.text is None:
            for name in ("label", "spurious"):
                value = getattr(self, name)
                if value is not None:
                    raise UserError(
                        f"--{name} {value}: goes with --text FILE, which has the column"
                    )
            return None
        return TextConfig.parse(config_values(self, TextConfig) | {"path": self.text}, where=FLAGS)


class ModelFlags(HookFlags, RoleFlags):
    """What reads --text where the data of one SAE alone are not known."""

    model: MaybeName = None
    """The model that reads --text; default: the one that the SAE's files name."""


class Flags(Config):
    """Flags of `wsae probe`."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A finished run's directory; or one SAE (with --source or --text): its folder, hub:owner/name, RELEASE:ID or
    whatever wsae import reads."""
    reading: tyro.conf.OmitArgPrefixes[ModelFlags] = ModelFlags()
    labels: tyro.conf.OmitArgPrefixes[LabelFlags] = LabelFlags()
    source: MaybeName = None
    """Store whose held-out text, and whose model, is taken; default: the run's own data."""
    probing: tyro.conf.OmitArgPrefixes[ProbeFlags] = ProbeFlags()
    out: JsonFile = None
    """Write the result as JSON here too."""
    common: CommonFlags = Common()


def run(flags: Flags, ui: UI) -> dict[str, Any]:
    """Probe and return the content of probing.json, with the run's path and the kind of labels."""
    data = config_values(flags.probing, ProbeConfig) | {"seed": flags.common.seed}
    cfg, text = ProbeConfig.parse(data, where=FLAGS), flags.labels.config()
    from wsae.evals.probing.reading import read_corpus
    from wsae.evals.probing.run import DOCUMENTS, TOKENS, probe_run
    from wsae.interop.saes import open_run

    where, label, corpus = device(flags.common.device), flags.labels.label, None
    opened = open_run(flags.run)
    if text is not None and label is None and not opened.single:
        raise UserError(f"--text {text.path}: needs --label COLUMN, the class of each record")
    source = data_of(opened, where, flags.source, _asked(flags, text, opened), flags.common.seed)
    if text is not None and label is not None:
        if hasattr(source, "whole"):  # a crosscoder's
            raise UserError(f"--label {label}: is for SAEs of one hook; leave --text and it out")
        corpus = read_corpus(text, label, flags.labels.spurious, cfg, ui.progress)
    language = None if corpus is None else language_of(source, where)
    record = probe_run(opened.path, source, cfg, corpus, language, ui.progress, where)
    notes = foreign(opened, None, source)
    kind = TOKENS if corpus is None else DOCUMENTS
    result = {"run": str(flags.run), **kept(opened, flags.run), "kind": kind, **record}
    return result | ({"notes": notes} if notes else {})


def _asked(flags: Flags, text: TextConfig | None, opened: Run) -> GivenText:
    """Return the text that gives one SAE alone its activations, where --text is that and not labelled alone."""
    reading, known = flags.reading, flags.source is not None or opened.source
    if text is None or not opened.single or (flags.labels.label is not None and known):
        refuse(reading, "goes with --text, for one SAE whose data are not known")
        return NO_TEXT
    if reading.roles and flags.labels.label is not None:
        raise UserError(
            f"--roles {' '.join(reading.roles)}: labelled documents are read whole; leave it out, or --label"
        )
    own = reading.model, reading.hook, reading.seq_len
    return GivenText(text, *own, hook_out=reading.hook_out, roles=reading.roles or None)


def show(result: dict[str, Any], ui: UI) -> None:
    """Print the scores of what was probed, what was left out, and what to do next."""
    for note in result.get("notes", ()):
        ui.say(f"note: {note}")
    if "kept" in result:
        ui.say(f"kept in {result['kept']}")
    found = result[result["kind"]]
    names = found["glossary"]
    for hook, entry in found["hooks"].items():
        entries = {**entry["members"], **entry["controls"]}
        rows = [
            [names[key]["name"], *(_shown(e["summary"].get(key)) for e in entries.values())]
            for key in names
            if any(key in e["summary"] for e in entry["members"].values())
        ]
        title = f"{hook}: {len(entry['tasks'])} classes of {result['kind']} (~: not told from the random SAE)"
        ui.table(title, ("mean over classes", *entries), rows)
        lines = [
            {**line, "unit": line["over"].removesuffix("s")}
            for line in entry["comparisons"]
            if line["b"] in entry["members"]
        ]
        if lines:
            show_differences(hook, lines, ui)
    ui.say(", ".join(f"{n:,} {what}" for what, n in found["counts"].items()))
    for name, why in found["skipped"].items():
        ui.say(f"left out: {name} ({why})")
    ui.say(f"next: wsae report {shlex.quote(result['run'])}")


def _shown(score: dict[str, Any] | None) -> str:
    """Return a value with its interval over classes, marked where it is not told from the random SAE's."""
    return interval(score) + ("" if (score or {}).get("told_from_random", True) else " ~")
