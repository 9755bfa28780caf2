"""`wsae interpret`: can a reader tell when a latent fires?"""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from wsae.cli.common import (
    UI,
    Common,
    CommonFlags,
    MaybeCount,
    MaybeName,
    Name,
    Place,
    ResultFile,
    Switch,
    config_flags,
    config_values,
    device,
)
from wsae.cli.evaluate import counted, interval, kept, likeness, scored
from wsae.cli.live import GivenText, TextFlags, data_of, language_of
from wsae.core.artifact import INTERPRETATION, INTERPRETATION_PART
from wsae.core.config import FLAGS, Config
from wsae.core.errors import UserError, understood
from wsae.core.files import write_json
from wsae.evals.config import FREE, ContextConfig, Control, InterpretConfig, LlmConfig, Score

if TYPE_CHECKING:
    from wsae.evals.interpret.scoring import ScorerModels


def show_plan(plan: dict[str, dict[str, int]], ui: UI) -> None:
    """Print the requests and tokens of each score."""
    columns = ("requests", "cached", "prompt_tokens", "completion_tokens", "limit_tokens")
    names = ("to send", "on disk", "prompt tokens", "answer tokens", "at most")
    rows = [[score, *(f"{part[key]:,}" for key in columns)] for score, part in plan.items()]
    total = [f"{sum(part[key] for part in plan.values()):,}" for key in columns]
    ui.table("would be asked (tokens estimated)", ("score", *names), [*rows, ["total", *total]])


def show_scores(result: dict[str, Any], ui: UI) -> None:
    """Print a table per hook: members and controls as rows, mean scores with intervals; then the comparisons."""
    for hook, found in result["hooks"].items():
        scores = list(result["judges"])
        rows = [
            [name, *(scored(e["summary"].get(s)) for s in scores), counted(e["counts"])]
            for name, e in {**found["members"], **found["controls"]}.items()
        ]
        ui.table(f"{hook}: interpretability", ("", *scores, "latents"), rows)
        lines = [
            [
                line["a"],
                line["b"],
                line["metric"],
                line["over"],
                interval(line | {"value": line["difference"]}),
                str(line["n"]),
            ]
            for line in found["comparisons"]
            if line["over"] != "control"
        ]
        if lines:
            columns = ("a", "b", "score", "over latents", "a - b", "n")
            ui.table(f"{hook}: differences", columns, lines)
        for text in [*compared(found["comparisons"]), *unanswered(found)]:
            ui.say(text)


def compared(lines: list[dict[str, Any]]) -> list[str]:
    """Return a line per pair of members and score: how many matched latents are compared, and how alike they are."""
    return [
        f"{line['a']} against {line['b']}, {line['metric']}: {line['n']} of {line['sampled']} sampled latents have a "
        f"match that was scored, {likeness(line['cosine'], line['chance'])}"
        for line in lines
        if line.get("cosine") is not None
    ]


def unanswered(found: dict[str, Any]) -> list[str]:
    """Return a line for every member and score whose requests were not all parsed."""
    out = []
    for name, entry in {**found["members"], **found["controls"]}.items():
        for score, part in entry["summary"].items():
            if part.get("requested", 0) != part.get("parsed", 0):
                reasons = ", ".join(f"{n} {why}" for why, n in part["reasons"].items())
                out.append(
                    f"{name}, {score}: {part['requested']} requested = {part['parsed']} parsed + "
                    f"{part['failed']} failed + {part['not_asked']} not asked ({reasons})"
                )
    return out


ABOUT = """\
Score how well it can be told when a latent fires, from what it fired on in other documents, into RUN/interpretation.
embedding and surprisal need no language model that follows instructions; detection, fuzzing and simulation ask one
(--endpoint), keep every answer on disk and stop at a budget. What is finished is not scored again."""
DEFAULTS, LLM = InterpretConfig(), LlmConfig()
CHEAP: tuple[Control, ...] = ("random_sae", "neurons", "pca", "shuffled")
"""What `--controls all` means; random_model trains an SAE of its own and is only done by name."""


class LlmFlags(config_flags(LlmConfig)):
    """The language model that explains and judges."""

    endpoint: Annotated[str, tyro.conf.arg(metavar="URL", help_behavior_hint="")] = LLM.endpoint
    """Base URL of an OpenAI-compatible service, for example https://api.openai.com/v1 or http://localhost:8000/v1,
    or "local:MODEL", a Hugging Face model on this machine."""
    answers: Place = Path(LLM.cache)
    """Directory of answers: what is there is not asked, or paid for, again."""

    def config(self, device: str, seed: int) -> LlmConfig:
        """Return the settings these flags describe; raises UserError in one line."""
        own = {"cache": str(self.answers), "device": device, "seed": seed}
        return LlmConfig.parse(config_values(self, LlmConfig) | own, where=FLAGS)


class ScoringFlags(config_flags(InterpretConfig)):
    """What is scored, and how sure the numbers are."""

    score: Annotated[tuple[Score, ...], tyro.conf.arg(metavar="NAME ...")] = DEFAULTS.scores
    """embedding, surprisal; with --endpoint also detection, fuzzing, simulation."""
    controls: Annotated[
        tuple[Control | Literal["all"], ...],
        tyro.conf.arg(metavar="NAME ...", help_behavior_hint=""),
    ] = ()
    """What the scores are compared with: random_sae, neurons, pca, shuffled, or all for these four; random_model
    also trains an SAE on the model with random weights."""


class ContextFlags(config_flags(ContextConfig)):
    """Which contexts stand for a latent."""


class JudgedTextFlags(TextFlags):
    """A text for the model of one SAE alone; at which hook, --hook says."""

    text_model: MaybeName = None
    """The model that reads --text; default: the one that the SAE's files name."""
    seq_len: MaybeCount = None
    """Tokens per sequence of --text; default: as in the SAE's training, at most 256."""

    def asked(self, hooks: tuple[str, ...]) -> GivenText:
        """Return the text and how it is read; raises UserError for flags that do not go together."""
        if self.text is not None and len(hooks) > 1:
            raise UserError(f"--hook {hooks[1]}: one SAE alone has one hook")
        found, hook = self.given(), next(iter(hooks), None)
        if found.text is None:
            return found
        own = {"model": self.text_model, "hook": hook, "seq_len": self.seq_len}
        return found._replace(**own, model_flag="text-model")


class Flags(Config):
    """Flags of `wsae interpret`."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A finished run's directory; or one SAE: its folder, whatever wsae import reads, RELEASE:ID included."""
    reading: tyro.conf.OmitArgPrefixes[JudgedTextFlags] = JudgedTextFlags()
    """A text for the model of one SAE alone."""
    scoring: tyro.conf.OmitArgPrefixes[ScoringFlags] = ScoringFlags()
    contexts: tyro.conf.OmitArgPrefixes[ContextFlags] = ContextFlags()
    encoder: Name = "builtin"
    """Sentence encoder of the embedding score: builtin, a directory or a hub id."""
    llm: tyro.conf.OmitArgPrefixes[LlmFlags] = LlmFlags()
    dry_run: Switch = False
    """Print the requests and tokens each score would take, and stop."""
    agreement: Switch = False
    """Rank correlation of the free scores with LLM detection, over the same latents."""
    source: MaybeName = None
    """Store to take the text from; default: the run's own data."""
    force: Switch = False
    """Score again what is there already."""
    out: ResultFile = None
    """Write the result as JSON here too."""
    common: CommonFlags = Common()


def config(flags: Flags) -> InterpretConfig:
    """Return what the flags ask for; raises UserError in one line."""
    seed = flags.common.seed
    scores = dict.fromkeys(flags.scoring.score)
    if flags.agreement:
        scores = dict.fromkeys((*FREE, *scores, "detection"))
    asked = [score for score in scores if score not in FREE]
    if asked and not flags.llm.endpoint:
        raise UserError(
            f"score {asked[0]}: asks a language model; name one with --endpoint URL --model NAME "
            "(or --endpoint local:MODEL), or leave it out"
        )
    named = (n for c in flags.scoring.controls for n in (CHEAP if c == "all" else (c,)))
    contexts = config_values(flags.contexts, ContextConfig) | {"seed": seed}
    data = config_values(flags.scoring, InterpretConfig) | {
        "contexts": ContextConfig.parse(contexts, where=FLAGS),
        "scores": tuple(scores),
        "controls": tuple(dict.fromkeys(named)),
        "seed": seed,
    }
    return InterpretConfig.parse(data, where=FLAGS)


def run(flags: Flags, ui: UI) -> dict[str, Any]:
    """Interpret and return the content of interpretation.json, with the run's path (and plan or agreement)."""
    cfg = config(flags)
    asks = any(score not in FREE for score in cfg.scores)
    if flags.dry_run and not asks:
        raise UserError(
            "--dry-run: no score asks a language model; name one, for example --score detection"
        )
    where = device(flags.common.device)
    llm_cfg = flags.llm.config(where, flags.common.seed)
    from wsae.interop.saes import open_run

    opened, asked = open_run(flags.run), flags.reading.asked(cfg.hooks)
    source = data_of(opened, where, flags.source, asked, flags.common.seed)
    judges = _judges(flags, cfg, llm_cfg, where)
    if flags.dry_run:
        from wsae.evals.interpret.run import plan_run

        planned = plan_run(opened.path, source, cfg, ui.progress, llm=judges.get("llm"))
        return {"run": str(flags.run), "plan": {name: vars(part) for name, part in planned.items()}}
    if "surprisal" in cfg.scores or "random_model" in cfg.controls:
        whole = getattr(source, "whole", source)  # of a crosscoder's hooks
        if whole is not source and "random_model" in cfg.controls:
            raise UserError("control random_model: is for SAEs of one hook; leave it out")
        judges["language"] = language_of(whole, where)
    from wsae.evals.interpret.run import interpret_run
    from wsae.evals.interpret.summary import agreement

    record = interpret_run(opened.path, source, cfg, ui.progress, flags.force, **judges)
    if flags.agreement:
        record = {**record, "agreement": agreement(record, cfg)}
    if flags.out is not None:
        write_json(flags.out, record)
    return {"run": str(flags.run), **kept(opened, flags.run), **record}


def _judges(flags: Flags, cfg: InterpretConfig, llm: LlmConfig, where: str) -> "ScorerModels":
    """Open what the scores ask, except the model behind the activations."""
    judges: ScorerModels = {}
    if "embedding" in cfg.scores and not flags.dry_run:
        from wsae.evals.interpret.detection import load_encoder

        judges["encoder"] = load_encoder(flags.encoder, device=where)
    if any(score not in FREE for score in cfg.scores):
        from wsae.evals.interpret.local import open_llm

        judges["llm"] = open_llm(llm)
    return judges


def show(result: dict[str, Any], ui: UI) -> None:
    """Print the scores, or the plan, and what to do next."""
    if "plan" in result:
        show_plan(result["plan"], ui)
        return
    if "kept" in result:
        ui.say(f"kept in {result['kept']}")
    with understood(Path(result.get("kept", result["run"])) / INTERPRETATION_PART / INTERPRETATION):
        show_scores(result, ui)  # what is finished is shown as it was written
    lines = result.get("agreement", [])
    if lines:
        rows = [[line["score"], line["with"], interval(line), str(line["n"])] for line in lines]
        ui.table("agreement", ("score", "with", "Spearman", "latents"), rows)
    ui.say(f"next: wsae report {shlex.quote(result['run'])}")


def interrupted(flags: Flags, words: list[str], error: KeyboardInterrupt) -> str:  # noqa: ARG001
    """Say what is kept and how to go on."""
    again = shlex.join(["wsae", "interpret", *words])
    return f"finished scores and answers are kept; go on with: {again}"
