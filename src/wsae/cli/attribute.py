"""`wsae attribute`: which latents, at which tokens, move what the model says."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import tyro

from wsae.cli.common import UI, Common, CommonFlags, Count, JsonFile, MaybeName, device
from wsae.core.config import Config
from wsae.core.errors import UserError

if TYPE_CHECKING:
    from wsae.acts.flow import SkipRule
    from wsae.acts.language import LanguageModel
    from wsae.sae import SAE
    from wsae.use.attribute import Metric

ABOUT = """\
Ask which latents, at which tokens of a prompt, move a logit, the difference of two or the loss. An effect is gradient
times activation; what the SAE does not explain has one, too. It is said how far all effects add up to what the metric
loses without these rows, and the largest are checked: the latent alone is set to 0 at that token."""
METHODS = {"gradient": "gradient x activation", "integrated": "integrated gradients"}
SHOWN = 10
"""Effects in the table where none is checked."""
Text = Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")]


class SaeFlags(Config):
    """SAEs and the model that they are attached to."""

    model: Annotated[
        str | None,
        tyro.conf.Positional,
        tyro.conf.arg(metavar="MODEL", help_behavior_hint=""),
    ] = None
    """A hub id, a directory, a .gguf file or "builtin"; default: the model that the SAE's files name."""
    sae: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="SAE ...", help_behavior_hint="")] = ()
    """One SAE, or several at other hooks: a folder, a run (with --member and --hook), or whatever `wsae import`
    reads."""
    member: MaybeName = None
    """Which SAE of a run."""
    hook: MaybeName = None
    """Which hook of a run; of an SAE whose files do not name it, where it is attached."""

    def opened(self, device: str) -> "Opened":
        """Return model and SAEs; raises UserError where none is given, or model or hook are not known."""
        from wsae.acts.language import load_language
        from wsae.interop.saes import choose, open_run
        from wsae.sae import SAE
        from wsae.use.attach import as_trained, changed_hook, stored

        if not self.sae:
            raise UserError("--sae: name at least one, for example --sae runs/first")
        runs = [open_run(path) for path in self.sae]
        chosen = [
            choose(run.path, *((None, None) if run.single else (self.member, self.hook)))[0]
            for run in runs
        ]
        names = {one.model for one in chosen if one.model}
        model = self.model or (names.pop() if len(names) == 1 else None)
        if model is None:
            raise UserError(f"{self.sae[0]}: does not say of which model it is; give MODEL first")
        saes, outs = {}, {}
        for path, run, one in zip(self.sae, runs, chosen, strict=True):
            hook = (self.hook if run.single else None) or one.about.hook
            if hook is None:
                raise UserError(f"{path}: does not say at which hook it belongs; give --hook")
            if hook in saes:
                raise UserError(f"--sae {path}: a second one at {hook}; attach one SAE there")
            saes[hook] = SAE.load(one.path).to(device)
            outs |= {hook: one.about.hook_out} if one.about.hook_out else {}
            changed_hook(hook, saes[hook], outs)  # before a model is loaded
        language = load_language(model, device=device)
        for store in () if self.model else filter(None, map(stored, runs)):
            store.check_model(language.digest)
        return Opened(language, saes, outs, as_trained(runs[0], language))


class Opened(NamedTuple):
    """A model, the SAEs at its hooks, what transcoders give, and which tokens are left alone."""

    language: "LanguageModel"
    saes: dict[str, "SAE"]
    outs: dict[str, str]
    rule: "SkipRule"


class Flags(Config):
    """Flags of `wsae attribute`."""

    at: tyro.conf.OmitArgPrefixes[SaeFlags] = SaeFlags()
    """Model and SAEs."""
    prompt: Annotated[str, tyro.conf.arg(metavar="TEXT")]
    """The text."""
    metric: Literal["logit", "difference", "loss"] = "logit"
    """logit: of --answer, behind the prompt; difference: of the logits of --answer and --against; loss: the mean
    cross-entropy of --answer behind the prompt, or of the prompt's own tokens."""
    answer: Text = None
    """A token (for the loss any text), with the space before it; default: the token that the model finds likeliest."""
    against: Text = None
    """The token that --answer is compared with; default: the likeliest other one."""
    method: Literal["gradient", "integrated"] = "gradient"
    """gradient: at the activations as they are, which is what ablation of one latent is near to; integrated: the mean
    on the way to them from the SAE's bias at all tokens, whose effects add up to the whole change."""
    verify: Count = 10
    """How many of the largest effects are checked by ablation."""
    out: JsonFile = None
    """Write the result as JSON here too."""
    common: CommonFlags = Common()


def run(flags: Flags, ui: UI) -> dict[str, Any]:
    """Attribute and return the effects, with the tokens' texts."""
    import torch

    from wsae.acts.tokens import decode_table, ids_behind, joined
    from wsae.use.attribute import attribute
    from wsae.use.steer import Prompt

    opened = flags.at.opened(device(flags.common.device))
    tokenizer = opened.language.tokenizer
    ids = Prompt.of(opened.language, flags.prompt).ids[0].tolist()
    metric = _metric(flags, opened, ids)
    if flags.metric == "loss" and flags.answer is not None:
        ids += ids_behind(tokenizer, flags.answer)
    found = attribute(
        opened.language.model,
        opened.saes,
        torch.tensor(ids),
        metric,
        method=flags.method,
        verify=flags.verify,
        exclude=opened.rule,
        hook_out=opened.outs,
        progress=ui.progress,
    )
    table = decode_table(tokenizer, ids)
    data: dict[str, Any] = dict(vars(metric))
    for name in ("token", "other"):
        if name in data:
            data[f"{name}_text"] = tokenizer.decode([data[name]])
    return {
        "model": opened.language.name,
        "saes": [str(path) for path in flags.at.sae],
        "prompt": flags.prompt,
        "metric": {"kind": flags.metric, **data},
        "tokens": joined([table[i] for i in ids]),
        **found.to_dict(),
    }


def _metric(flags: Flags, opened: Opened, ids: list[int]) -> "Metric":
    """Return what is measured behind a prompt; raises UserError for flags that do not go together."""
    import torch

    from wsae.use.attribute import Logit, LogitDifference, Loss, likeliest, one_token

    if flags.against is not None and flags.metric != "difference":
        raise UserError(f"--against {flags.against!r}: goes with --metric difference")
    if flags.metric == "loss":
        return Loss(len(ids) if flags.answer is not None else 1)
    said = {"--answer": flags.answer, "--against": flags.against}
    wanted, other = (
        None if text is None else one_token(opened.language.tokenizer, text, name)
        for name, text in said.items()
    )
    order = likeliest(opened.language.model, torch.tensor(ids), 3)
    first = [i for i in order if i not in (wanted, other)]
    token = first.pop(0) if wanted is None else wanted
    if flags.metric == "logit":
        return Logit(token)
    return LogitDifference(token, first[0] if other is None else other)


def show(result: dict[str, Any], ui: UI) -> None:
    """Print the largest effects beside what ablation found, how complete they are, and the latents' totals."""
    metric, tokens = result["metric"], result["tokens"]
    what = metric["kind"]
    if "token" in metric:
        texts = [repr(metric[f"{n}_text"]) for n in ("token", "other") if n in metric]
        what += f" of {' - '.join(texts)}"
    hooks, several = result["hooks"], len(result["hooks"]) > 1
    checked = result["verified"]
    every = [one for at in hooks.values() for one in at["effects"]]
    every.sort(key=lambda one: -abs(one["effect"]))
    pairs = [(v["predicted"], v["true"]) for v in checked] or [(one, None) for one in every[:SHOWN]]
    rows = []
    for one, found in pairs:
        rows.append(
            [
                *([one["hook"]] if several else []),
                f"{one['position']} {tokens[one['position']]!r}",
                str(one["latent"]),
                f"{one['activation']:.2f}",
                f"{one['effect']:+.4f}",
                "" if found is None else f"{found:+.4f}",
            ]
        )
    columns = ("token", "latent", "activation", "predicted", "by ablation")
    title = f"{what}: {result['value']:.4f}; the largest effects ({METHODS[result['method']]})"
    ui.table(title, ("hook", *columns) if several else columns, rows)
    if result["correlation"] is not None:
        ui.say(f"predicted and true effects: correlation {result['correlation']:.2f}")
    for hook, at in hooks.items():
        latents = at["total"] - sum(at["errors"])
        off = at["incompleteness"]
        ui.say(
            f"{hook}: {at['active']:,} active latents {latents:+.3f}, error {sum(at['errors']):+.3f}; together "
            f"{at['total']:+.3f} of {at['change']:+.3f}"
            + ("" if off is None else f" ({off:.1%} off)")
        )
        if at["left_out"]:
            ui.say(f"{hook}: {len(at['left_out'])} of {len(tokens)} tokens left out as in training")
