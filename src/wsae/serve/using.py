"""Two forms that put an SAE into the model: what it writes with a latent changed, and which latents made it say so.

The work is done in the thread that reads texts, under the same limits; pages hold no markup that is not ours.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from wsae.core.errors import UserError
from wsae.report.charts import level_of
from wsae.run import Json, Run
from wsae.serve.index import Member, Served, whole

if TYPE_CHECKING:
    from wsae.acts.language import LanguageModel
    from wsae.sae import SAE
    from wsae.use.attribute import Attribution, Metric
    from wsae.use.steer import Prompt

Kind = Literal["set", "add", "scale"]
KINDS: tuple[Kind, ...] = ("set", "add", "scale")
USUAL = "2x"
"""Value that the form proposes: twice the latent's largest activation."""
NEW_TOKENS = 40
COLUMNS, CHECKED = 9, 8
"""Latents in the table of effects, and effects that are checked by ablation."""
Work = Callable[["LanguageModel", "SAE", "Prompt"], Json]
"""What is made of a prompt that was read."""


class Ask(NamedTuple):
    """What a form says: a member, a latent of it, a text, and the rest."""

    member: Member
    latent: int | None
    text: str
    given: dict[str, str]


def ask_of(member: Member, given: dict[str, str]) -> Ask:
    """Read the fields that the forms share; raises UserError for a latent that the member does not have."""
    latent = given.get("latent")
    number = whole(latent, "latent", 0, member.size - 1) if latent else None
    return Ask(member, number, given.get("text", ""), given)


def steering(run: Served, ask: Ask) -> Work:
    """Return the work of the steer form; raises UserError where its fields make no edit."""
    from wsae.use.steer import AskedEdit

    if ask.latent is None:
        raise UserError("latent: is empty; name the one to change")
    kind = ask.given.get("kind", "set")
    if kind not in KINDS:
        raise UserError(f"kind: {kind[:20]!r} is none of {', '.join(KINDS)}")
    value = ask.given.get("value", "").strip() or USUAL
    try:
        wanted = AskedEdit.parse(cast(Kind, kind), f"{ask.latent}={value}")
    except UserError as error:
        peaks = "" if kind == "scale" else ", or 2x for twice the latent's largest activation"
        raise UserError(f"value: {value[:20]!r} is none; give a number such as 8{peaks}") from error
    peak = run.index.numbers([ask.member.key(ask.latent)])[ask.member.key(ask.latent)].get("max")
    if wanted.of_peak and not peak:
        raise UserError(
            f"value: the largest activation of latent {ask.latent} is not known; give a plain number"
        )

    def continuations(language: "LanguageModel", sae: "SAE", prompt: "Prompt") -> Json:
        from wsae.use.config import SteerConfig
        from wsae.use.steer import steer

        found = steer(
            language,
            {ask.member.hook: sae},
            prompt,
            [wanted],
            peaks={wanted.name: float(peak or 0.0)},
            cfg=SteerConfig(new_tokens=NEW_TOKENS),
            **_placed(run, ask.member, language),
        )
        return {"member": ask.member.slug, "latent": wanted.latent, **found.record()}

    return continuations


def _placed(run: Served, member: Member, language: "LanguageModel") -> Json:
    """Return which tokens are left alone, and what a transcoder gives, as in training."""
    from wsae.interop.saes import about_sae
    from wsae.use.attach import as_trained

    opened = Run(run.path)
    place = opened.weights(member.hook, member.name)
    out = None if place is None else about_sae(place).hook_out
    return {
        "exclude": as_trained(opened, language),
        "hook_out": {member.hook: out} if out else {},
    }


def attributing(run: Served, ask: Ask) -> Work:
    """Return the work of the attribution form."""
    return _Attributing(run, ask)


class _Attributing(NamedTuple):
    run: Served
    ask: Ask

    def __call__(self, language: "LanguageModel", sae: "SAE", prompt: "Prompt") -> Json:
        """Return the effects on the answer's logit, or on how far it is above another's."""
        from wsae.acts.tokens import decode_table, joined
        from wsae.use.attribute import attribute

        metric, said = self._metric(language, prompt)
        ids = prompt.ids[0]
        hook, placed = self.ask.member.hook, _placed(self.run, self.ask.member, language)
        found = attribute(language.model, {hook: sae}, ids, metric, verify=CHECKED, **placed)
        table = decode_table(language.tokenizer, ids.unique().tolist())
        tokens = joined([table[i] for i in found.ids])
        return {
            "member": self.ask.member.slug,
            **said,
            "tokens": tokens,
            **self._shown(found, hook),
        }

    def _metric(
        self, language: "LanguageModel", prompt: "Prompt"
    ) -> "tuple[Metric, dict[str, str]]":
        from wsae.use.attribute import Logit, LogitDifference, likeliest, one_token

        tokenizer: Any = language.tokenizer
        answer, against = (self.ask.given.get(name, "") for name in ("answer", "against"))
        (token,) = (
            [one_token(tokenizer, answer, "answer")]
            if answer
            else likeliest(language.model, prompt.ids[0])
        )
        said = {"answer": str(tokenizer.decode([token])), "against": ""}
        if not against:
            return Logit(token), said
        other = one_token(tokenizer, against, "against")
        return LogitDifference(token, other), {**said, "against": against}

    def _shown(self, found: "Attribution", hook: str) -> Json:
        """Return the table of tokens and latents, largest latents first, and what ablation found."""
        at = found.hooks[hook]
        size: dict[int, float] = {}
        total: dict[int, float] = {}
        cell: dict[tuple[int, int], float] = {}
        for one in at.effects:
            size[one.latent] = size.get(one.latent, 0.0) + abs(one.effect)
            total[one.latent] = total.get(one.latent, 0.0) + one.effect
            cell[one.position, one.latent] = one.effect
        columns = sorted(size, key=lambda latent: (-size[latent], latent))[:COLUMNS]
        lines = self.run.said([self.ask.member.key(latent) for latent in columns])
        return {
            "value": found.value,
            "method": found.method,
            "change": at.change,
            "total": at.total,
            "left_out": {str(place): why for place, why in at.left_out.items()},
            "latents": [
                {
                    "latent": latent,
                    "effect": total[latent],
                    "label": lines[self.ask.member.key(latent)].label,
                    "link": self.run.latent_link(self.ask.member, latent),
                }
                for latent in columns
            ],
            "effects": [
                [cell.get((place, latent), 0.0) for latent in columns]
                for place in range(len(found.ids))
            ],
            "errors": at.errors,
            "verified": [
                {
                    "position": one.predicted.position,
                    "latent": one.predicted.latent,
                    "link": self.run.latent_link(self.ask.member, one.predicted.latent),
                    "predicted": one.predicted.effect,
                    "true": one.true,
                }
                for one in found.verified
            ],
            "correlation": found.correlation,
        }


class Cell(NamedTuple):
    """One effect as it is drawn: its shade, and its number where it is not too small to be told."""

    shade: str
    value: float


def heat(found: Json) -> list[list[Cell]]:
    """Return the table's cells: shades a1 to a6 of effects for the metric, n1 to n6 of those against it."""
    most = max((abs(x) for row in found["effects"] for x in row), default=0.0)

    def cell(effect: float) -> Cell:
        level = level_of(abs(effect), most)
        return Cell(f"{'a' if effect > 0 else 'n'}{level}" if level else "", effect)

    return [[cell(effect) for effect in row] for row in found["effects"]]
