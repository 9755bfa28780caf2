"""`wsae steer`: what a model writes while latents of an SAE are set, beside what it writes by itself."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from wsae.acts.config import HarvestConfig, TextConfig
from wsae.cli.attribute import SaeFlags
from wsae.cli.common import (
    UI,
    Common,
    CommonFlags,
    Count,
    JsonFile,
    Name,
    ResultFile,
    Switch,
    config_flags,
    config_values,
    device,
)
from wsae.core.artifact import EVALUATION_PART
from wsae.core.config import FLAGS, Config
from wsae.core.errors import UserError
from wsae.use.config import SteerConfig

if TYPE_CHECKING:
    from wsae.cli.attribute import Opened
    from wsae.use.steer import AskedEdit, Steered

ABOUT = """\
Let a model continue a prompt while latents of an SAE are set, raised or scaled, and once without. The rest of the
activation stays as it is; special tokens and attention sinks are left alone. A value with an x counts in largest
activations of the latent: --set 1234=2x."""

Edits = Annotated[
    tuple[str, ...],
    tyro.conf.UseAppendAction,
    tyro.conf.arg(metavar="LATENT=VALUE", help_behavior_hint=""),
]


class SteerFlags(config_flags(SteerConfig)):
    """How it continues."""


class Flags(Config):
    """Flags of `wsae steer`."""

    at: tyro.conf.OmitArgPrefixes[SaeFlags] = SaeFlags()
    """The model and the SAEs."""
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="TEXT")]
    """What the model is to continue; give it once for each prompt."""
    set: Edits = ()
    """Set a latent's activation at every token; give it once for each latent. Where several SAEs are named, say at
    which hook: layers.9:1234=8."""
    add: Edits = ()
    """Add to a latent's activation."""
    scale: Edits = ()
    """Multiply a latent's activation."""
    sweep: Annotated[tuple[float, ...], tyro.conf.arg(metavar="X ...", help_behavior_hint="")] = ()
    """Strengths: each continues the prompt with the values of all edits times it. Default: 1."""
    chat: Switch = False
    """Give the prompt as what a user says, by the model's chat template."""
    text: Name = "builtin"
    """Where largest activations are measured if the run does not know them: as --text of `wsae harvest`."""
    text_tokens: Count = 8192
    """Tokens of --text that are read for them."""
    how: tyro.conf.OmitArgPrefixes[SteerFlags] = SteerFlags()
    lm_eval: ResultFile = None
    """Write the edits here as the steering file (.pt) of lm-eval's "steered" model."""
    out: JsonFile = None
    """Write the result as JSON here too."""
    common: CommonFlags = Common()


def run(flags: Flags, ui: UI) -> dict[str, Any]:
    """Steer and return the continuations."""
    from wsae.core.torchfile import save_plain
    from wsae.use.steer import Prompt, check_latents, lm_eval_file, steer

    if not flags.prompt:
        raise UserError("no --prompt: say what the model is to continue")
    wanted = asked(flags)
    cfg = SteerConfig.parse(
        config_values(flags.how, SteerConfig) | {"seed": flags.common.seed}, where=FLAGS
    )
    opened = flags.at.opened(device(flags.common.device))
    language, saes, outs = opened.language, opened.saes, opened.outs
    check_latents(wanted, saes)
    prompts = [Prompt.of(language, text, flags.chat) for text in flags.prompt]
    peaks = largest_of(opened, wanted, flags, ui)
    file = None
    if flags.lm_eval is not None:
        file = lm_eval_file(language, saes, [one.edit(peaks) for one in wanted])
    strengths = flags.sweep or (1.0,)
    found = [
        steer(language, saes, one, wanted, strengths, peaks, cfg, opened.rule, ui.progress, outs)
        for one in prompts
    ]
    paths = [str(path) for path in flags.at.sae]
    which = {"sae": paths[0]} if len(paths) == 1 else {"saes": paths}
    result = {"model": language.name, **which, **together(found)}
    if file is not None and flags.lm_eval is not None:
        save_plain(flags.lm_eval, file)
        result["lm_eval"] = str(flags.lm_eval)
    return result


def together(found: "Sequence[Steered]") -> dict[str, Any]:
    """Return what one set of edits did to several prompts, as JSON."""
    records = [one.record() for one in found]
    own = ("prompt", "continuations")
    shared = {key: value for key, value in records[0].items() if key not in own}
    return {**shared, "prompts": [{key: record[key] for key in own} for record in records]}


def asked(flags: Flags) -> "list[AskedEdit]":
    """Return the edits that the flags ask for; raises UserError for one that cannot be read."""
    from wsae.use.steer import KINDS, AskedEdit

    return [AskedEdit.parse(kind, said) for kind in KINDS for said in getattr(flags, kind)]


def largest_of(
    opened: "Opened", wanted: "Sequence[AskedEdit]", flags: Flags, ui: UI
) -> dict[str, float]:
    """Return the largest activations that edits count in: as the run's evaluation says, else measured on a text."""
    from wsae.use.attach import hook_meant

    peaks: dict[str, float] = {}
    for path, hook in zip(flags.at.sae, opened.saes, strict=True):
        here = [
            one for one in wanted if one.of_peak and hook_meant("", one.hook, opened.saes) == hook
        ]
        known = _recorded(path, flags.at)
        unknown = sorted({one.latent for one in here} - known.keys())
        known |= _measured(opened, hook, unknown, flags, ui) if unknown else {}
        peaks |= {one.name: known[one.latent] for one in here}
    return peaks


def _measured(
    opened: "Opened", hook: str, latents: list[int], flags: Flags, ui: UI
) -> dict[int, float]:
    """Return the largest activations of latents at a hook on --text."""
    from wsae.acts.flow import Flow
    from wsae.use.steer import largest

    cfg = HarvestConfig.parse(
        {
            "text": TextConfig(path=flags.text),
            "hooks": (hook,),
            "heldout_fraction": 0,
            "heldout_tokens": 0,
        },
        where=FLAGS,
    )
    flow = Flow(cfg, opened.language)
    flow.calibrate()
    steps, (name,) = flow.steps(heldout=False), flow.hooks
    found = largest(opened.saes[hook], name, latents, steps, flags.text_tokens, ui.progress)
    for latent, peak in found.items():
        ui.note(
            f"latent {latent}: largest activation {peak:.4g} in {flags.text_tokens:,} tokens of {flags.text}"
        )
    return found


def _recorded(path: Path, at: SaeFlags) -> dict[int, float]:
    """Return the largest activations that a run's evaluation recorded."""
    from wsae.interop.saes import choose, open_run

    run = open_run(path)
    if not run.has(EVALUATION_PART):
        return {}
    place = choose(run.path, at.member, None if run.single else at.hook)[0].place
    for hook, members in run.context_record.items():
        for member, latents in members.items():
            if run.single or place == f"{hook}/{member}":
                return {found["latent"]: found["max"] for found in latents if found.get("max")}
    return {}


def show(result: dict[str, Any], ui: UI) -> None:
    """Print each prompt's continuations."""
    edits = ", ".join(result["edits"])
    where = result.get("hook") or ", ".join(result["hooks"])
    for found in result["prompts"]:
        rows = [
            [
                "without" if one["strength"] is None else f"{one['strength']:g}",
                "-" if one["cross_entropy"] is None else f"{one['cross_entropy']:.3f}",
                " ".join("-" if x is None else f"{x:.2f}" for x in one["distinct"].values()),
                one["text"],
            ]
            for one in found["continuations"]
        ]
        columns = ("strength", "cross-entropy", "distinct 1-, 2-, 3-grams", "continuation")
        ui.table(f"{found['prompt']!r}, {edits} at {where}", columns, rows)
    if "lm_eval" in result:
        path = Path(result["lm_eval"])
        ui.say(f"lm-eval: --model steered --model_args pretrained=MODEL,steer_path={path}")
