"""`wsae reproduce`: a figure or table of the paper, measured again."""

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro

from wsae.cli.common import UI, Common, CommonFlags, MaybeName, MaybePlace, Place, device
from wsae.core.config import Config
from wsae.core.errors import UserError
from wsae.evals.config import LOCAL, Control, LlmConfig, Score
from wsae.studies.reproduce_config import (
    FigureName,
    Name,
    StageName,
    StudyName,
    TableChoices,
    VisionChoices,
)

ABOUT = """\
Measure a figure or table of the paper again and print its statement beside what was found.
figure2, figure3: SAEs and WSAEs on toy models of superposition, many seeds (Section 5.1).
readings: Figure 3 under every reading of what the paper leaves open in training.
worlds: Figure 3 under other readings of the toy world: sizes and importances, one W_p for all S, noise.
figure4, figure5: semantic consistency of SAEs and WSAEs on a pretrained ResNet-18 (Section 5.2.2).
recovery: which methods and loss weights recover the truth, over several kinds of worlds.
noise: which loss weights recover the truth where the activations are noisy, beside those that know the noise.
table1, table2, table3: auto-interpretability of SAEs and WSAEs on a language model (Section 5.2.1, Appendix B.1).
language: the same with every gamma rule, both Top-k variants, several seeds, and the score at equal FVU and density.
remedy: does any loss weight or preconditioner make latents better? Judged by a plan written before (docs/remedy.md).
What is finished in OUT is not run again."""

LLM = LlmConfig()
STUDIES, VISION = get_args(StudyName), get_args(FigureName)


class StudyFlags(Config):
    """For the tables, language and remedy: what to use in place of the preset's."""

    model: MaybeName = None
    """Hub id, local directory, .gguf file or "builtin"; default: the preset's: a tiny one made here, builtin, or the
    paper's."""
    text: Annotated[str | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """Text for the model, as in `wsae harvest`; default: the shipped one (paper: OpenWebText from the hub)."""
    hook: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="PATTERN ...", help_behavior_hint="")
    ] = ()
    """Modules to read, in the table's order; default: the preset's."""
    store: MaybePlace = None
    """A finished store to use in place of a harvest."""
    score: Annotated[
        tuple[Score, ...], tyro.conf.arg(metavar="NAME ...", help_behavior_hint="")
    ] = ()
    """Scores, as in `wsae interpret`; default: embedding, and with --endpoint detection too."""
    controls: Annotated[
        tuple[Control, ...] | None, tyro.conf.arg(metavar="NAME ...", help_behavior_hint="")
    ] = None
    """Controls beside the first seed, as in `wsae interpret`; default: random_sae, neurons, pca and shuffled."""
    endpoint: Annotated[str, tyro.conf.arg(metavar="URL", help_behavior_hint="")] = LLM.endpoint
    """OpenAI-compatible service that explains and judges latents, or "local:MODEL"; needs --judge."""
    judge: Annotated[str, tyro.conf.arg(metavar="NAME", help_behavior_hint="")] = LLM.model
    """The judge's model name at --endpoint; its key is read from OPENAI_API_KEY."""
    answers: Place = Path(LLM.cache)
    """Directory of the judge's answers: what is there is not asked, or paid for, again."""
    until: StageName = "interpret"
    """The last stage to run; the same command without it goes on from there."""

    def choices(self, name: str) -> TableChoices:
        """Return these flags' choices; raises UserError where they do not fit together or NAME takes none."""
        if bool(self.judge) != bool(self.endpoint) and not self.endpoint.startswith(LOCAL):
            raise UserError("--endpoint and --judge go together: the server and its model's name")
        asked = [score for score in self.score if score not in ("embedding", "surprisal")]
        if asked and not self.endpoint:
            raise UserError(
                f"--score {asked[0]}: asks a language model; name one with --endpoint and --judge"
            )
        if name not in STUDIES and self != StudyFlags():
            raise UserError(
                f"{name}: takes no --model, --text, --hook, --store, --score, --controls, --endpoint, --judge or "
                f"--until; those are for {', '.join(STUDIES)}"
            )
        judge = {"endpoint": self.endpoint, "model": self.judge, "cache": str(self.answers)}
        data = {
            "model": self.model,
            "text": self.text,
            "hooks": self.hook,
            "store": self.store,
            "judge": judge if self.endpoint else None,
            "scores": tuple(dict.fromkeys(self.score)),
            "controls": self.controls,
            "until": self.until,
        }
        return TableChoices.parse(data, where="flags")


class VisionFlags(Config):
    """For figure4 and figure5: what to use in place of the preset's."""

    images: Annotated[str | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")] = None
    """Labelled images, as in `wsae pretrain`; default: digits (tiny), Debian's Fashion-MNIST (small), ImageNet-100
    from the hub (paper)."""
    pretrained: Annotated[
        tuple[Path, ...], tyro.conf.arg(metavar="RUN ...", help_behavior_hint="")
    ] = ()
    """Finished runs of `wsae pretrain` to use as backbones; default: pretrained here."""

    def choices(self, name: str) -> VisionChoices:
        """Return these flags' choices; raises UserError where NAME takes none."""
        if name not in VISION and self != VisionFlags():
            raise UserError(
                f"{name}: takes no --images or --pretrained; those are for {', '.join(VISION)}"
            )
        return VisionChoices.parse(self.to_dict(), where="flags")


class Flags(Config):
    """Flags of `wsae reproduce`."""

    name: Annotated[Name, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """figure2, figure3, figure4, figure5, readings, worlds, recovery, noise, table1, table2, table3, language or
    remedy."""
    preset: Literal["tiny", "small", "paper"] = "small"
    """Size: tiny (seconds), small (a minute; tables, figure4 and figure5: hours), paper (the paper's setting)."""
    out: Place = Path("reproduce-out")
    """Directory of the results; figure2 and figure3 share their training there, figure4 and figure5 theirs, the tables
    their store."""
    study: tyro.conf.OmitArgPrefixes[StudyFlags] = StudyFlags()
    vision: tyro.conf.OmitArgPrefixes[VisionFlags] = VisionFlags()
    common: CommonFlags = Common()


def run(flags: Flags, ui: UI) -> dict[str, Any]:
    """Run the reproduction and return its panels or rows."""
    from wsae.studies.engine import Reproduction
    from wsae.studies.reproduce import reproduce

    choices = flags.study.choices(flags.name)
    vision = flags.vision.choices(flags.name)
    toy = flags.name not in (*STUDIES, *VISION)
    on_cpu = flags.common.device == "auto" and toy  # toy models are too small
    where = "cpu" if on_cpu else device(flags.common.device)
    place = flags.out / flags.preset
    at = Reproduction(flags.preset, place, flags.common.seed, where, ui.progress, ui.note)
    return reproduce(flags.name, at, choices, vision)


def show(result: dict[str, Any], ui: UI) -> None:
    """Print the paper's statement beside ours, then where the files are."""
    if "panels" in result:
        header = ["panel", "score", "the paper", "ours", "verdict"]
        rows = [
            [p[key] for key in ("panel", "score", "paper", "ours", "verdict")]
            for p in result["panels"]
        ]
        ui.table(result["name"], header, rows)
    for title, table in result.get("tables", {}).items():
        ui.table(title, table["header"], table["rows"])
    for reading in result.get("readings", []):
        ui.say(f"{reading['label']}: {_reading(reading)}")
    ui.say("files: " + ", ".join(result["files"]))


KEPT = "{flags.out} keeps the finished parts; the same command goes on from there"


def _reading(reading: dict[str, Any]) -> str:
    panels = ("3a raw", "3b raw", "3c", "3d")
    return ", ".join(
        f"{panel} {reading[panel]:+.1%} (scale alone {reading[f'{panel}, scale alone']:+.1%})"
        for panel in panels
    )
