"""A model that continues a text while latents of an SAE are set, moved or scaled, beside the same model left alone.

Strengths may be multiples of a latent's largest activation ("2x"). Beside each continuation y of n tokens stand

    -1/n sum_t log p(y_t | prompt, y_<t)        under the model without edits, in nats a token
    |{n-grams of y}| / (n-grams of y)            how much of it is not repeated: 1 where nothing is
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import GenerationConfig

from wsae.acts.capture import hooks_named, refuse_too_long
from wsae.acts.flow import Step
from wsae.acts.hookpoints import HookPoint
from wsae.acts.language import LanguageModel
from wsae.acts.loading import refuse_unable_to_continue
from wsae.acts.text import automatic_bos
from wsae.core.errors import UserError
from wsae.core.progress import Progress, quiet
from wsae.sae.model import SAE, Encoder
from wsae.use.attach import Add, Edit, Exclude, Scale, Set, attach, hook_meant
from wsae.use.config import SteerConfig

Kind = Literal["set", "add", "scale"]
KINDS: dict[Kind, type[Edit]] = {"set": Set, "add": Add, "scale": Scale}
NGRAMS = (1, 2, 3)
_ASKED = re.compile(
    r"(?:(?P<hook>[^=]+):)?(?P<latent>\d{1,9})=(?P<value>[-+]?[0-9.]+(?:e[-+]?\d+)?)(?P<of_peak>x?)",
    re.I,
)


class AskedEdit(NamedTuple):
    """An edit as it is asked for; with `of_peak` the value counts in largest activations of the latent."""

    kind: Kind
    latent: int
    value: float
    of_peak: bool = False
    hook: str | None = None
    """The hook whose SAE is meant; none: the only one."""

    @property
    def name(self) -> str:
        """The latent as it is asked for."""
        return str(self.latent) if self.hook is None else f"{self.hook}:{self.latent}"

    @classmethod
    def parse(cls, kind: Kind, said: str) -> "AskedEdit":
        """Read "1234=8", "1234=2x" or "layers.9:1234=8"; raises UserError for anything else."""
        found = _ASKED.fullmatch(said.strip())
        try:
            value = float(found["value"]) if found else math.nan
        except ValueError:  # two points
            value = math.nan
        if found is None or not math.isfinite(value):
            raise UserError(
                f"--{kind} {said}: not LATENT=VALUE; write for example 1234=8, 1234=2x for twice the latent's "
                "largest activation, or layers.9:1234=8 where several SAEs are named"
            )
        if found["of_peak"] and kind == "scale":
            raise UserError(
                f"--scale {said}: scales an activation by a plain number; leave out the x, or use --set"
            )
        return cls(kind, int(found["latent"]), value, bool(found["of_peak"]), found["hook"])

    def edit(self, peaks: Mapping[str, float], strength: float = 1.0) -> Edit:
        """Return the edit with its value times a strength; `peaks` are by name."""
        unit = peaks[self.name] if self.of_peak else 1.0
        return KINDS[self.kind](self.latent, self.value * unit * strength, hook=self.hook)

    def said(self, peaks: Mapping[str, float]) -> str:
        """Return the edit in words, with its value as a number."""
        return f"{self.kind} {self.name}={self.edit(peaks).value:g}"


class Continuation(NamedTuple):
    """What a model wrote, its cross-entropy in nats a token under the unedited model, and its distinct n-grams."""

    strength: float | None
    """What the edits' values were multiplied by; none: no edit was made."""
    text: str
    ids: list[int]
    cross_entropy: float | None
    """None where nothing was written."""
    distinct: dict[int, float | None]
    """n -> the share of its n-grams that are different; none where it has none."""


class Steered(NamedTuple):
    """A prompt and its continuations, the first without edits."""

    prompt: str
    hooks: list[str]
    """Where SAEs are attached."""
    edits: list[str]
    """The edits at strength 1, in words."""
    peaks: dict[str, float]
    """Largest activations that strengths are multiples of."""
    continuations: list[Continuation]

    def record(self) -> dict[str, Any]:
        """Return it as JSON."""
        lines = [
            {**one._asdict(), "distinct": {str(n): share for n, share in one.distinct.items()}}
            for one in self.continuations
        ]
        where = {"hook": self.hooks[0]} if len(self.hooks) == 1 else {"hooks": self.hooks}
        own = {"prompt": self.prompt, **where, "edits": self.edits, "peaks": self.peaks}
        return {**own, "continuations": lines}


def check_latents(wanted: Iterable[AskedEdit], saes: Mapping[str, SAE]) -> None:
    """Raise UserError for a hook without SAE, a latent that an SAE lacks, or where nothing is asked for."""
    wanted = list(wanted)
    if not wanted:
        raise UserError("no edit: say what to change, for example --set 1234=8")
    for one in wanted:
        asked = f"--{one.kind} {one.name}=..."
        size = saes[hook_meant(asked, one.hook, saes)].cfg.d_sae
        if one.latent >= size:
            raise UserError(f"{asked}: the SAE has {size:,} latents, 0 to {size - 1}")


@torch.no_grad()
def largest(
    sae: SAE,
    hook: str,
    latents: Sequence[int],
    steps: Iterable[Step],
    tokens: int,
    progress: Progress = quiet,
) -> dict[int, float]:
    """Return the largest activation of each latent on the first kept tokens of a text."""
    encode, seen = Encoder(sae), 0
    peaks = dict.fromkeys(latents, 0.0)
    with progress("largest activations", tokens, "tokens") as tick:
        for step in steps:
            rows = step.head(tokens - seen).x[hook]
            code = encode(rows.to(sae.W_dec.device, torch.float32))
            for latent in peaks:
                found = code.values[code.indices == latent]
                if len(found):
                    peaks[latent] = max(peaks[latent], float(found.max()))
            seen += len(rows)
            tick(len(rows))
            if seen >= tokens:
                break
    for latent, peak in peaks.items():
        if not peak:
            raise UserError(
                f"latent {latent}: does not fire on {seen:,} tokens of the text, so a multiple of its largest "
                "activation means nothing; give a number (1234=8), or a --text on which it fires"
            )
    return peaks


class Prompt(NamedTuple):
    """A prompt as typed and as the model reads it."""

    text: str
    ids: Int64[Tensor, "1 length"]

    @classmethod
    def of(cls, language: LanguageModel, text: str, chat: bool = False) -> "Prompt":
        """Read a prompt, with `chat` as what a user says by the model's chat template.

        Raises UserError where it holds no token or more than the model takes, or the tokenizer has no template.
        """
        tokenizer, written = language.tokenizer, text
        if chat:
            if not tokenizer.chat_template:
                raise UserError(
                    "--chat: the model's tokenizer has no chat template; leave the flag out, or take an instruct model"
                )
            said = [{"role": "user", "content": text}]
            written = str(
                tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
            )
        body = list(tokenizer(written, add_special_tokens=False, verbose=False)["input_ids"])
        start = automatic_bos(tokenizer)
        ids = body if body[: len(start)] == start else [*start, *body]
        if not body:
            raise UserError("prompt: holds no tokens; type some words")
        refuse_too_long(language.model, len(ids))
        return cls(text, torch.tensor([ids], device=language.device))


def steer(
    language: LanguageModel,
    saes: Mapping[str, SAE],
    prompt: str | Prompt,
    wanted: Sequence[AskedEdit],
    strengths: Sequence[float] = (1.0,),
    peaks: Mapping[str, float] | None = None,
    cfg: SteerConfig = SteerConfig(),  # noqa: B008  (frozen)
    exclude: Exclude = "as in training",
    progress: Progress = quiet,
    hook_out: Mapping[str, str] = MappingProxyType({}),
) -> Steered:
    """Return what a model writes after a prompt, without edits and with them at each strength.

    `saes` by hook, `exclude` and `hook_out` as in `attach`; `peaks` are the largest activations of the latents whose
    edits count in them, by `AskedEdit.name`. Raises UserError for a model that continues no text, a latent that its SAE
    does not have, a prompt that leaves no room, and an edit too strong for the model.
    """
    refuse_unable_to_continue(language.model)
    check_latents(wanted, saes)
    read = Prompt.of(language, prompt) if isinstance(prompt, str) else prompt
    refuse_too_long(language.model, read.ids.shape[1], cfg.new_tokens)
    known = dict(peaks or {})
    written: list[tuple[float | None, Int64[Tensor, " new"]]] = []
    steps = [None, *strengths]
    with (
        attach(language.model, saes, exclude=exclude, hook_out=hook_out) as attached,
        progress("steer", len(steps), "texts") as tick,
    ):
        for strength in steps:
            edits = [] if strength is None else [one.edit(known, strength) for one in wanted]
            attached.edit(*edits)
            written.append((strength, _continue(language, read, cfg)))
            tick(1)
        attached.edit()
        hooks = list(attached.acts)
    lines = [_measured(language, read, strength, ids) for strength, ids in written]
    said = [one.said(known) for one in wanted]
    used = {one.name: known[one.name] for one in wanted if one.of_peak}
    return Steered(read.text, hooks, said, used, lines)


def _continue(language: LanguageModel, prompt: Prompt, cfg: SteerConfig) -> Int64[Tensor, " new"]:
    """Return the tokens that the model writes, by its probabilities alone: no penalties, no limits to the choice."""
    tokenizer, own = language.tokenizer, language.model.generation_config
    end = tokenizer.eos_token_id if own is None or own.eos_token_id is None else own.eos_token_id
    pad = tokenizer.pad_token_id
    first_end = end[0] if isinstance(end, list) else end
    how: dict[str, Any] = {"do_sample": cfg.temperature > 0}
    if cfg.temperature > 0:
        how |= {"temperature": cfg.temperature, "top_k": 0, "top_p": 1.0}
    generation = GenerationConfig(
        max_new_tokens=cfg.new_tokens,
        eos_token_id=end,
        pad_token_id=first_end if pad is None else pad,
        repetition_penalty=1.0,
        num_beams=1,
        **how,
    )
    devices = [language.device] if language.device.type == "cuda" else []
    with torch.inference_mode(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(cfg.seed)
        model: Any = language.model
        model.generation_config = generation  # what a config leaves open is taken from the model's
        try:
            found = model.generate(prompt.ids, attention_mask=torch.ones_like(prompt.ids))
        finally:
            model.generation_config = own
    return found[0, prompt.ids.shape[1] :]


def _measured(
    language: LanguageModel, prompt: Prompt, strength: float | None, new: Int64[Tensor, " new"]
) -> Continuation:
    ids = [int(i) for i in new]
    text = str(language.tokenizer.decode(ids, skip_special_tokens=True))
    loss = cross_entropy(language, prompt.ids, new)
    return Continuation(strength, text, ids, loss, {n: distinct(ids, n) for n in NGRAMS})


@torch.inference_mode()
def cross_entropy(
    language: LanguageModel, prompt: Int64[Tensor, "1 length"], new: Int64[Tensor, " new"]
) -> float | None:
    """Return -1/n sum_t log p(y_t | prompt, y_<t) in nats a token; none for an empty continuation."""
    if not len(new):
        return None
    ids = torch.cat([prompt, new[None]], dim=1)
    logits: Float[Tensor, "1 length vocabulary"] = language.model(
        input_ids=ids, use_cache=False
    ).logits
    scored = logits[0, prompt.shape[1] - 1 : -1].double().log_softmax(-1)
    return float(-scored.gather(1, new[:, None].to(scored.device)).mean())


def distinct(ids: Sequence[int], n: int) -> float | None:
    """Return the share of n-grams that are different, |{n-grams}| / (n-grams); none where there is no n-gram."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


# lm-eval's `steered` model reads a file of torch.save: {hook: {action, steering_coefficient, steering_vector, bias}},
# one entry a hook, at every token, outputs only. "add" is h + coefficient vector; "clamp" makes the length of h - bias
# along the vector the coefficient.


def lm_eval_file(
    language: LanguageModel, saes: Mapping[str, SAE], edits: Sequence[Edit]
) -> dict[str, dict[str, Any]]:
    """Return edits as lm-eval's steering file holds them; raises UserError for those that it has no equal of.

    Adds at one hook are their sum, sum_j value_j W_dec[j], which is the same edit but for the first and special tokens.
    A single Set is its "clamp" at value |W_dec[j]|: of the length of h - b_dec along the row, where ours is of the
    latent's activation.
    """
    points = hooks_named(language.model, saes)
    at: dict[str, list[Edit]] = {}
    for edit in edits:
        at.setdefault(hook_meant(str(edit), edit.hook, saes), []).append(edit)
    return {
        lm_eval_hook(language, points[hook]): lm_eval_entry(saes[hook], some)
        for hook, some in at.items()
    }


def lm_eval_hook(language: LanguageModel, point: HookPoint) -> str:
    """Return a hook's name below the model's base, as lm-eval looks for it; raises UserError for an input."""
    if point.side == "input":
        raise UserError(
            f"hook {point.name}: lm-eval steers what modules give, not what they take; leave out --lm-eval"
        )
    base: Any = language.model.base_model
    prefix = next((name for name, m in language.model.named_modules() if m is base), "")
    return point.path.removeprefix(f"{prefix}.") if prefix else point.path


def lm_eval_entry(sae: SAE, edits: Sequence[Edit]) -> dict[str, Any]:
    """Return the entry of one hook."""
    if sae.cfg.transcoder:
        raise UserError(
            "--lm-eval: a transcoder is read at one place and acts at another, which lm-eval has not; leave it out"
        )
    if sae.cfg.input_norm is not None:
        raise UserError(
            f"--lm-eval: an edit of an SAE that normalises its rows ({sae.cfg.input_norm}) is of another size at every "
            "token, and lm-eval's of one; leave out --lm-eval"
        )
    rows = sae.W_dec.detach().float().cpu()
    if edits and all(isinstance(edit, Add) for edit in edits):
        vector = sum((edit.value * rows[edit.latent] for edit in edits), torch.zeros_like(rows[0]))
        return {
            "action": "add",
            "steering_coefficient": 1.0,
            "steering_vector": vector,
            "bias": None,
        }
    if len(edits) == 1 and isinstance(edits[0], Set):
        row = rows[edits[0].latent].clone()
        return {
            "action": "clamp",
            "steering_coefficient": edits[0].value * float(row.norm()),
            "steering_vector": row,
            "bias": None if sae.b_dec is None else sae.b_dec.detach().float().cpu().clone(),
        }
    raise UserError(
        "--lm-eval: its file holds one --set, or several --add, for each hook; leave the other edits out"
    )
