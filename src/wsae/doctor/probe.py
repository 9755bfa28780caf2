"""A short look: a few sequences of the text through the model, timed, with every position kept."""

import itertools
import time
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from wsae.acts.capture import Capture
from wsae.acts.config import HarvestConfig
from wsae.acts.flow import KEPT, SkipRule, stacked
from wsae.acts.hookpoints import HookPoint
from wsae.acts.language import LanguageModel
from wsae.acts.text import Packer, Repeats, TextCounts, documents, is_heldout, told
from wsae.core.errors import UserError
from wsae.sae.config import GammaConfig
from wsae.sae.gamma import gamma_from_proxy
from wsae.train.config import MemberConfig

# One finding of the pre-flight: what was looked at, how it stands, and what to do about it.

Status = Literal["ok", "warn", "fail"]


class Check(NamedTuple):
    """A finding. `fail`: the run would not work; `warn`: it would, but not as you think; `advice` is the fix."""

    name: str
    status: Status
    value: str
    advice: str = ""


TIGHT = 0.8
"""Share of what is free above which memory or disk is called tight."""


def warned(name: str, value: str, advice: str) -> Check:
    """Return a warning with its advice, or that all is well where there is none."""
    return Check(name, "warn" if advice else "ok", value, advice)


def room(name: str, need: int | float, free: float, value: str, fix: str) -> Check:
    """Return how a need stands to what is free, with `fix` where it is tight or too much."""
    if need <= TIGHT * free:
        return Check(name, "ok", value)
    return Check(name, "fail" if need > free else "warn", value, fix)


def report(subject: str, checks: list[Check]) -> dict[str, object]:
    """Return the JSON-ready report of all findings."""
    statuses = [check.status for check in checks]
    return {
        "subject": subject,
        "checks": [check._asdict() for check in checks],
        "warnings": statuses.count("warn"),
        "failed": statuses.count("fail"),
    }


# What lies in the activations: sinks, outlier dimensions, values a number format cannot hold.

SINK_RATIO = 10.0
"""A norm this many times the median is a sink, by the same measure as the harvest's mask."""
HEAVY_SHARE = 0.1
"""A dimension with more of the variance than this deserves a look (SmolLM2's middle block: 0.14)."""
ROUNDING_FVU = 1e-3
"""Rounding that alone leaves this share of the variance unexplained is worth a warning."""
FP16_MAX = 65504.0

Storage = Literal["float32", "bfloat16", "float16"]
_ADVICE = {
    "bfloat16": "store as float32, or as float16 if the values fit",
    "float16": "store as float32",
}


class Spread(NamedTuple):
    """How unevenly a quantity lies over dimensions."""

    top_dim: int
    top_share: float
    largest_over_median: float
    effective: float
    """1 / sum of squared shares: the number of dimensions that matter."""

    def __str__(self) -> str:
        """Return it in words."""
        return (
            f"dimension {self.top_dim} holds {100 * self.top_share:.3g} %, {self.largest_over_median:,.0f} x the "
            f"median; {self.effective:.0f} dimensions matter"
        )


def spread(weight: Float64[Tensor, " d_in"]) -> Spread:
    """Return how a non-negative quantity per dimension is spread."""
    share = weight / weight.sum().clamp_min(torch.finfo(torch.float64).tiny)
    top = int(share.argmax())
    median = float(weight.median())
    ratio = float(weight.max()) / median if median > 0 else float("inf")
    return Spread(top, float(share[top]), ratio, 1 / max(float((share**2).sum()), 1e-300))


def check_finite(hook: str, x: Float[Tensor, "rows d_in"]) -> Check:
    """Find NaN and infinity."""
    bad = ~torch.isfinite(x)
    if bool(bad.any()):
        row, dim = (int(i) for i in bad.nonzero()[0])
        value = f"{int(bad.sum())} NaN or infinite values, the first at row {row}, dimension {dim}"
        return Check(f"values at {hook}", "fail", value, "run the model in float32 or bfloat16")
    return Check(f"values at {hook}", "ok", f"finite, largest {float(x.abs().max()):.4g}")


def check_constant(hook: str, variance: Float64[Tensor, " d_in"]) -> Check:
    """Count dimensions without variance."""
    dead = (variance <= 0).nonzero()[:, 0].tolist()
    value = (
        f"{len(dead)} of {len(variance)} never change, the first is {dead[0]}" if dead else "none"
    )
    fix = "an SAE cannot learn them; look whether the hook is the one you mean" if dead else ""
    return warned(f"constant dimensions at {hook}", value, fix)


def check_sinks(
    hook: str, x: Float[Tensor, "batch seq d_in"], kept: Bool[Tensor, "batch seq"]
) -> Check:
    """Compare the first position's norm, and the largest kept one, with the median elsewhere."""
    norm = x.double().norm(dim=-1)
    median = max(float(norm[:, 1:].median()), 1e-300)
    first = float(norm[:, 0].median()) / median
    largest = float(norm[kept].max()) / median if bool(kept.any()) else 0.0
    value = f"norm at position 0 is {first:.3g} x the median; largest kept {largest:.3g} x"
    fix = "keep the mask: --skip-first 1 --sink-norm-ratio 10" if largest > SINK_RATIO else ""
    if not fix and first > SINK_RATIO:
        value += "; the mask drops it"
    return warned(f"attention sinks at {hook}", value, fix)


def check_outliers(
    hook: str, variance: Float64[Tensor, " d_in"], gammas: list[GammaConfig]
) -> list[Check]:
    """Return which dimensions carry the variance, and which would carry the weighted loss."""
    plain = spread(variance)
    heavy = plain.top_share > HEAVY_SHARE
    fix = "the plain loss looks mostly at it; read fvu per dimension" if heavy else ""
    checks = [warned(f"variance at {hook}", str(plain), fix)]
    for cfg in gammas:
        if cfg.rule == "variance":
            gamma = gamma_from_proxy(cfg, variance).double()
            weighted = spread(variance * gamma**2)
            heavy = weighted.top_share > 0.5
            fix = "use --robust winsor, rank or drop, or a smaller --alpha" if heavy else ""
            checks.append(warned(f"loss under {cfg.label} at {hook}", str(weighted), fix))
    return checks


def check_rounding(hook: str, x: Float[Tensor, "rows d_in"], storage: Storage) -> list[Check]:
    """Measure what rounding to 16 bits does to the variance: FVU of the rounding alone, and the worst dimension."""
    wide = x.double()
    variance = wide.var(0, correction=0).clamp_min(torch.finfo(torch.float64).tiny)
    largest = float(x.abs().max())
    checks = []
    for dtype, fix in _ADVICE.items():
        if dtype == "float16" and largest > FP16_MAX:
            bad: Status = "fail"
            value = f"impossible: values up to {largest:.3g}, float16 ends at {FP16_MAX:.0f}"
        else:
            error = (x.to(getattr(torch, dtype)).double() - wide).square().mean(0)
            fvu, worst = float(error.sum() / variance.sum()), error / variance
            dim = int(worst.argmax())
            value = f"costs fvu {fvu:.2g}; worst dimension {dim}: {float(worst[dim]):.2g}"
            bad = "warn" if fvu > ROUNDING_FVU else "ok"
        wanted = storage == dtype and bad != "ok"
        name = f"{dtype} at {hook}"
        checks.append(Check(name, bad, value, fix) if wanted else Check(name, "ok", value))
    return checks


# Do the numbers fit together: widths, k, groups, the text's length?


def check_width(hook: str, d_in: int, expected: int | None) -> Check:
    """Compare a hook's width with the one the caller expects."""
    if expected is not None and d_in != expected:
        fix = "name another hook, or leave out --d-in"
        return Check(f"width of {hook}", "fail", f"{d_in}, not {expected}", fix)
    return Check(f"width of {hook}", "ok", str(d_in))


def check_member(hook: str, d_in: int, member: MemberConfig) -> Check:
    """Check k <= d_sae, k groups, and that the code is neither trivial nor narrower than its input."""
    name = f"SAE shape at {hook}"
    try:
        cfg = member.sae_config(d_in)
    except UserError as error:
        return Check(name, "fail", str(error).removeprefix("SAE: "), "change --k or --d-sae")
    k = getattr(cfg.activation, "k", None)
    shown = f"{d_in} -> {cfg.d_sae} latents, {cfg.activation.kind}" + (f", k {k}" if k else "")
    fix = f"fewer latents than dimensions; {8 * d_in} is common" if cfg.d_sae < d_in else ""
    if k is not None and k >= d_in:
        fix = f"choose k well below {d_in}; {k} latents can carry any vector of that width"
    return warned(name, shown, fix)


def check_text(have: int, wanted: int, whole: bool) -> Check:
    """Compare the tokens a text holds with those wanted; `whole` says the text was read to its end."""
    about = f"about {have:,} tokens" if whole else f"at least {have:,} tokens"
    if whole and have == 0:
        return Check("text", "fail", "no text in it", "give a file with text")
    if whole and have < wanted:
        fix = f"{wanted:,} are wanted: give more text or lower --tokens (training repeats rows)"
        return warned("text", about, fix)
    return Check("text", "ok", f"{about} for the {wanted:,} wanted")


TEXT_SECONDS = 2.0
"""Time spent reading a text to estimate its tokens."""
SAMPLE_CHARS = 100_000
"""Characters tokenised to learn how many a token has."""


class Probe(NamedTuple):
    """What a short look at a model gave."""

    x: dict[str, Float[Tensor, "batch seq d_in"]]
    kept: Bool[Tensor, "batch seq"]
    """Rows the harvest would keep."""
    tokens_per_s: float
    """Speed of the forward pass, stopped at the deepest hook."""

    def rows(self, hook: str) -> Float[Tensor, "rows d_in"]:
        """Return the kept rows of a hook."""
        return self.x[hook][self.kept]


class TextSize(NamedTuple):
    """How much text there is: tokens for training (at least), whether it was read to its end, and what was left out."""

    tokens: int
    whole: bool
    told: list[str]


def probe_model(
    cfg: HarvestConfig, language: LanguageModel, hooks: list[HookPoint], n_seqs: int
) -> Probe:
    """Run `n_seqs` training sequences; raises UserError when the text has none."""
    packer = Packer(cfg, language.tokenizer, heldout=False)
    batch = list(itertools.islice(packer.sequences(), n_seqs))
    if not batch:
        raise UserError(f"text {cfg.text.path}: no text for training in it; give more documents")
    ids, positions, said = stacked(batch)
    mask = positions >= 0
    capture = Capture(language.model, hooks)
    where = language.device
    capture(ids[:1].to(where), mask[:1].to(where))  # the first pass pays for set-up
    start = time.perf_counter()
    x = {
        hook: value.float().cpu() for hook, value in capture(ids.to(where), mask.to(where)).items()
    }
    speed = ids.numel() / (time.perf_counter() - start)
    rule = SkipRule(cfg, language.tokenizer.all_special_ids)
    reasons = rule.by_token(ids, positions, said).flatten()
    norms = {hook: value.flatten(0, 1).norm(dim=1).nan_to_num(0.0) for hook, value in x.items()}
    rule.calibrate(norms, reasons)
    return Probe(x, (rule.by_norm(norms, reasons) == KEPT).view(ids.shape), speed)


def text_size(
    cfg: HarvestConfig, language: LanguageModel, seconds: float = TEXT_SECONDS
) -> TextSize:
    """Estimate the training tokens of the text, reading it for at most `seconds`."""
    end = time.monotonic() + seconds
    chars, given, sample, taken, whole = 0, 0, [], 0, True
    reading, repeats = TextCounts(), Repeats()
    for document in documents(cfg.text, reading=reading):
        chars += len(document.text)
        given += 0 if document.ids is None else len(document.ids)
        if document.text and taken < SAMPLE_CHARS:
            sample.append(document.text[:SAMPLE_CHARS])
            taken += len(sample[-1])
        repeats.add(document, is_heldout(document.index, cfg.seed, cfg.heldout_fraction))
        if time.monotonic() > end:
            whole = False
            break
    lines = told({**reading.info(), "repeated": repeats.info()})
    if taken:
        tokens = sum(len(ids) for ids in language.tokenizer(sample, verbose=False)["input_ids"])
        given += int(chars * tokens / taken)
    return TextSize(int(given * (1 - cfg.heldout_fraction)), whole, lines)
