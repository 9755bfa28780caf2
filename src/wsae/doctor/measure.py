"""What the pre-flight measures: a short look at the model and its text, and what a run will take of disk and time.

A few sequences go through the model, timed, with every position kept. Disk is a formula; time is that of a few steps
here.
"""

import contextlib
import itertools
import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from wsae.acts.capture import Capture
from wsae.acts.config import HarvestConfig
from wsae.acts.flow import KEPT, SkipRule, stacked
from wsae.acts.hookpoints import HookPoint
from wsae.acts.language import LanguageModel
from wsae.acts.stream import ActivationSource
from wsae.acts.text import Packer, Repeats, TextCounts, documents, is_heldout, told
from wsae.core.errors import UserError, duration, proc, size
from wsae.kernels.native.build import why_not
from wsae.sae.architectures import architecture_of
from wsae.sae.config import GammaConfig, SAEConfig
from wsae.sae.gamma import gamma_from_proxy
from wsae.stats.moments import Covariance, Moments
from wsae.train.config import MemberConfig, TrainConfig
from wsae.train.family import FamilyState, power_of_two_scale, to_device
from wsae.train.run import MAX_ROWS
from wsae.train.state import make_batches, make_member
from wsae.train.step import side_by_side

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


def text_size(cfg: HarvestConfig, language: LanguageModel) -> TextSize:
    """Estimate the training tokens of the text, reading it for at most `TEXT_SECONDS`."""
    end = time.monotonic() + TEXT_SECONDS
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


# What this machine has: versions, threads, free memory, free disk.


def check_versions() -> Check:
    """Name the versions a bug report needs."""
    shown = [f"Python {platform.python_version()}"]
    for name in ("wsae", "torch", "transformers", "numpy"):
        try:
            shown.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            shown.append(f"{name} missing")
    return Check("versions", "ok", ", ".join(shown))


def check_device(device: str) -> Check:
    """Name the device, and say when a faster one stands idle or threads are held back."""
    if device.startswith("cuda"):
        shown = f"{device}: {torch.cuda.get_device_name(torch.device(device))}"
        return Check("device", "ok", shown)
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    shown = f"{device}, {threads} of {cores} threads, {size(free_memory(device))} memory free"
    fix = "OMP_NUM_THREADS holds torch back; unset it" if threads * 2 < cores else ""
    if torch.cuda.is_available():
        fix = "a GPU is here: leave out --device, or use --device cuda"
    return warned("device", shown, fix)


def free_memory(device: str) -> float:
    """Return the bytes a process can still take on `device`."""
    if device.startswith("cuda"):
        return float(torch.cuda.mem_get_info(torch.device(device))[0])
    try:
        free = float(proc("meminfo")["MemAvailable"])
    except (OSError, KeyError):
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # no container, or one without a limit
        limit, used = (float((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, limit - used)
    return free


def held_memory(device: str, field: str = "VmRSS") -> float:
    """Return the bytes this process holds on `device` now: on a CPU what is resident, libraries included.

    The field VmHWM is the most main memory it has held at once. 0 where the system does not tell (only Linux does).
    """
    if device.startswith("cuda"):
        return float(torch.cuda.memory_reserved(torch.device(device)))
    with contextlib.suppress(OSError):
        return float(proc("self/status").get(field, 0))
    return 0.0


def free_disk(out: str) -> float:
    """Return the free bytes where `out` would be written."""
    place = Path(out).absolute()
    while not place.exists():
        place = place.parent
    return float(shutil.disk_usage(place).free)


# What a run will hold in memory at most: what the process has already, and what training adds, by
# formula.
#
# The constants are measured (`tests/doctor/test_doctor_memory.py` checks the sum against a run's peak
# within 15 %).

FIX = "lower --d-sae or --batch-size, or train fewer members at once"
LIBRARY, LIBRARY_BYTES = "torch._dynamo", 152_000_000
"""PyTorch's optimisers import its compiler."""
_FIXED = {"eager": 32_000_000, "native": 22_000_000}
"""Scratch of the products, pools of the allocator."""
_NARROW_PER_ROW = {"eager": 12.0, "native": 3.5}
"""[batch, d_in] float32 buffers alive at once, with those the allocator keeps."""
_DENSE = {"topk": 1.05, "group_topk": 1.05, "batch_topk": 1.2, "relu": 6.4, "jumprelu": 8.5}
_DENSE |= {"multi_topk": 1.05, "matryoshka": 1.2, "gated": 9.5}
"""[batch, d_sae] float32 buffers alive at once in an eager step; a registered kind counts as gated."""
_DENSE_BF16 = 1.5
"""The same for the Top-k kinds with a bfloat16 product: it, the sum with b_enc, and what is freed late."""
_SPARSE = {"batch_topk": 0.7, "matryoshka": 0.7}
"""The same in a compiled step."""
_PAIR = 100
"""Bytes per active latent of a row: values, indices, orders."""
_COPY, _MAKING = 4, 8
"""Bytes per weight of an SAE made to be saved (kept until the last is written), and while it is made."""
_LEFT, _RETURNED = 12, 1 << 25
"""Bytes per weight that stay in the allocator's pools of threads that trained side by side, when weights and moments
leave them; matrices of 32 MiB and more are returned to the system."""
_ENTERING = 5.5
"""Bytes per weight when the compiled kernels take over."""


class Memory(NamedTuple):
    """Bytes, by what needs them."""

    held: int
    """What the process has already: Python, libraries, the model."""
    libraries: int
    """What it has not imported yet."""
    weights: int
    """Weights, and their gradients (eager) or the encoder in 8 bits (native)."""
    optimiser: int
    rows: int
    """Activations of a live model, waiting in a block to be mixed."""
    step: int
    """The largest of what comes and goes: a step, taking over, finishing."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


def parameters(cfg: SAEConfig) -> int:
    """Return the number of trained values: W_enc, W_dec, biases and its kind's own (tied: no W_enc, no biases)."""
    matrix = cfg.d_in * cfg.d_sae
    own = cfg.d_sae * len(architecture_of(cfg.activation).parameters)
    return (matrix if cfg.tied else 2 * matrix + cfg.d_sae + cfg.d_in) + own


def kernels_of(wanted: str, device: str, cfg: SAEConfig) -> str:
    """Return what computes a member's steps at their neediest: "native" or "eager" (ReLU kinds start eager)."""
    sparse = architecture_of(cfg.activation).sparse
    native = wanted != "eager" and device == "cpu" and sparse and not why_not()
    return "native" if native else "eager"


def memory(
    saes: Sequence[SAEConfig],
    kernels: Sequence[str],
    batch_size: int,
    bf16: bool = False,
    together: int = 1,
) -> Memory:
    """Return the memory of training these SAEs together, each with its kernels ("eager", "native").

    Members step in turn, so only the neediest one's step counts; if all are native, `together` of them step side by
    side. Finished SAEs are kept until the last is written. What is held and waits (`held`, `rows`) is the caller's.
    """
    counts = [parameters(cfg) for cfg in saes]
    if "eager" in kernels:
        together = 1
    weights, steps, taking, pooled = 0, [], [], 0
    for n, kind, cfg in zip(counts, kernels, saes, strict=True):
        weights += 8 * n if kind == "eager" else 4 * n + cfg.d_in * cfg.d_sae
        steps.append(_step(cfg, kind, batch_size, bf16))
        taking.append(_ENTERING * n if kind == "native" else 0)
        pooled += n if 4 * cfg.d_in * cfg.d_sae < _RETURNED and together > 1 else 0
    largest = (sum(sorted(part)[-together:]) for part in (steps, taking))
    ending = _LEFT * pooled + _COPY * sum(counts) + _MAKING * max(counts, default=0)
    fixed = max((_FIXED[kind] for kind in kernels), default=0)
    return Memory(
        held=0,
        libraries=0 if LIBRARY in sys.modules else LIBRARY_BYTES,
        weights=weights,
        optimiser=8 * sum(counts),
        rows=0,
        step=fixed + int(max(*largest, ending)),
    )


def planned(run: TrainConfig, saes: Sequence[SAEConfig], device: str) -> Memory:
    """Return the memory of training all SAEs of a run, those of every hook."""
    kernels = [kernels_of(run.kernels, device, sae) for sae in saes]
    together = min(torch.get_num_threads(), len(run.members))
    return memory(saes, kernels, run.batch_size, run.dtype == "bfloat16", together)


def forecast(run: TrainConfig, source: ActivationSource, device: str, budget_s: float) -> str:
    """Return in a line how many SAEs a run trains, and its memory and time on this machine.

    The time is that of a few steps (`seconds_per_step`); of a live model, whose rows cost more, none is told, nor of
    rows that training will refuse.
    """
    saes = [member.sae_config(width) for width in source.hooks.values() for member in run.members]
    held = held_memory(device)
    need = planned(run, saes, device)._replace(held=int(held))
    room = size(free_memory(device) + held)
    line = f"{len(saes)} SAEs on the same batches: {size(need.total)} of {room} free memory"
    if source.n_rows is None:
        return line
    rows = source.stream(min(run.batch_size, source.n_rows), run.seed).next()
    if not all(bool(torch.isfinite(x).all()) for x in rows.values()):
        return line
    budget = budget_s / len(rows)
    step = sum(seconds_per_step(x, run, device, budget) for x in rows.values())
    return f"{line}, about {duration(step * run.steps)} of training"


def _step(cfg: SAEConfig, kernels: str, batch_size: int, bf16: bool) -> float:
    kind = cfg.activation.kind
    pairs = _PAIR * batch_size * getattr(cfg.activation, "k", 0)
    narrow = 4 * batch_size * cfg.d_in * _NARROW_PER_ROW[kernels] + pairs
    if kernels == "native":
        return narrow + 4 * batch_size * cfg.d_sae * _SPARSE.get(kind, 0.0)
    dense = _DENSE.get(kind, _DENSE["gated"])
    dense = max(dense, _DENSE_BF16) if bf16 else dense
    return narrow + 4 * batch_size * cfg.d_sae * dense + 4 * cfg.d_in * cfg.d_sae


def check_memory(need: Memory, free: float) -> Check:
    """Compare the need with what is free (what the process holds already counts as free)."""
    names = ("held now", "libraries", "SAE weights", "Adam", "rows to mix", "a step")
    parts = (f"{name} {size(n)}" for name, n in zip(names, need, strict=True) if n)
    shown = f"{size(need.total)} of {size(free)} free: {', '.join(parts)}"
    return room("memory", need.total, free, shown, FIX)


_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_PLACE_BYTES = 16
"""Bytes of a stored row besides its activations: sequence number and position."""
STEPS = 3
_SAMPLE_VALUES = 1 << 30
"""Products behind the time of a covariance, about."""


def store_bytes(cfg: HarvestConfig, widths: list[int]) -> int:
    """Return the size of a store of every hook's rows."""
    rows = cfg.tokens + cfg.heldout_tokens
    return rows * (sum(widths) * _BYTES[cfg.store_dtype] + _PLACE_BYTES)


def check_disk(need: int, free: float) -> Check:
    """Compare a store's size with the free disk."""
    fix = "train from the live model (no store), lower --tokens, or use --store-dtype bfloat16"
    return room("disk", need, free, f"a store takes {size(need)} of {size(free)} free", fix)


def check_covariance(
    hook: str, x: Float[Tensor, "rows d_in"], members: Sequence[MemberConfig], rows: int
) -> list[Check]:
    """Return whether `rows` training rows give the covariance that a member needs, and what taking it costs."""
    rules = {m.gamma.rule for m in members if m.gamma.needs_covariance}
    rules |= {f"precondition {m.precondition.kind}" for m in members if m.precondition}
    rules = sorted(rules)
    if not rules:
        return []
    d_in, name = x.shape[1], f"covariance for {' and '.join(rules)} at {hook}"
    rows = min(rows, MAX_ROWS)
    need = f"{rows:,} rows for {d_in} dimensions"
    if rows <= d_in:
        fix = f"give at least {d_in + 1} rows, better {10 * d_in}, or use another --gamma"
        return [Check(name, "fail", f"{need}: too few", fix)]
    sample, covariance = x[: max(256, _SAMPLE_VALUES // d_in**2)], Covariance(d_in)
    start = time.perf_counter()
    covariance.update(sample)
    seconds = (time.perf_counter() - start) * rows / len(sample)
    shown = f"{need}, {size(8 * d_in * d_in)}, about {duration(seconds)}"
    noisy = f"noisy under {10 * d_in:,} rows; more are better" if rows < 10 * d_in else ""
    return [warned(name, shown, noisy)]


def seconds_per_step(
    x: Float[Tensor, "rows d_in"], cfg: TrainConfig, device: str, budget_s: float
) -> float:
    """Return the time of one training step of every member on batches of cfg.batch_size rows.

    Where the budget does not reach to a whole batch, smaller ones are timed, and the time is drawn on along the line
    through the last two: the update of the weights takes as long for any batch.
    """
    moments = Moments(x.shape[1])
    moments.update(x[:1024].cpu())
    varies = bool(moments.variance.any())  # one row alone does not
    scale = power_of_two_scale(moments.variance, moments.n) if varies else 1.0
    cfg = cfg.model_copy(update={"tokens": max(cfg.tokens, (STEPS + 1) * cfg.batch_size)})
    forms: dict[str, dict[str, MemberConfig]] = {}
    for name, member in zip(cfg.names(), cfg.members, strict=True):
        form = member.sae_config(x.shape[1]).model_dump_json()  # those of one take the same time
        forms.setdefault(form, {})[name] = member
    total = 0.0
    for alike in forms.values():
        some = list(alike)[: torch.get_num_threads()]  # as many as may train side by side
        states = [make_member(name, alike[name], cfg, moments.mean, scale) for name in some]
        family = FamilyState({"probe": [to_device(m, device) for m in states]}, {})
        left, rows = budget_s / len(forms), min(cfg.batch_size, 256)
        before, best = (0, 0.0), _seconds(family, cfg, device, x, rows)
        while rows < cfg.batch_size and best * 2 * STEPS < left:
            left -= best * 2 * STEPS
            before, rows = (rows, best), min(2 * rows, cfg.batch_size)
            best = _seconds(family, cfg, device, x, rows)
        slope = max(0.0, best - before[1]) / (rows - before[0])
        total += (best + slope * (cfg.batch_size - rows)) * len(alike) / len(some)
    return total


def _seconds(family: FamilyState, cfg: TrainConfig, device: str, x: Tensor, rows: int) -> float:
    (members,), times = family.members.values(), []
    data = x.repeat(-(-rows // len(x)), 1)[:rows].to(device)
    with side_by_side(cfg, family) as step_all:
        for step in range(STEPS + 1):
            start = time.perf_counter()
            step_all(members, make_batches(data, members), step)
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return statistics.median(times[1:])  # the first step makes the optimiser's state


def check_time(cfg: TrainConfig, per_step: float, forward_tokens_per_s: float | None) -> Check:
    """Add up the model's and the SAEs' time."""
    training = per_step * cfg.steps
    shown = f"training {duration(training)} ({cfg.steps:,} steps of {1000 * per_step:.3g} ms, all members)"
    if forward_tokens_per_s:
        forward = cfg.tokens / forward_tokens_per_s
        shown += f"; model {duration(forward)} ({forward_tokens_per_s:,.0f} tokens/s)"
    return Check("time", "ok", shown)
