"""The first minutes of a GPU: every Triton test on the device, a step beside sparsify's, each kernel and its limits.

    python benchmarks/gpu.py --out FOLDER [--minutes 10] [--tflops 790] [--bandwidth 4.3]
    python benchmarks/gpu.py --out FOLDER --rehearse

Stages in this order, each written to FOLDER/gpu.json and gpu.md when it is done, so that an end in between keeps what
came before: the cases of the Triton tests (at most a third of the time); a training step at sizes B and A against
sparsify's trainer, where it is installed, in turn; a step of every kind of SAE and of a skip transcoder at A beside
PyTorch's own; then every kernel beside its eager twin at A and at 4,096 -> 131,072, with the time that its arithmetic
and the bytes it cannot avoid would take at the rates given (`roofline`; the defaults are an H200's, bf16). Times are
medians in milliseconds with a cold cache; `eager` is empty where it ran out of memory. `step` is the arithmetic of a
step alone, `train_step` one as a run takes it, with its counters and metrics; `waits` says how often the host waited
for the device in it. Kinds without a k are timed with about k active latents a row. `--rehearse` goes through all of it
on a CPU, under Triton's interpreter, at tiny sizes.
"""

import argparse
import gc
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, get_args

if "--rehearse" in sys.argv:  # Triton decides when it is imported whether it interprets
    os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.nn.functional as F
from torch import Tensor

from wsae.kernels import eager
from wsae.kernels.eager import (
    AdamStep,
    Plan,
    SparseGrad,
    code_from_topk,
    select_batch_topk,
    select_group_topk,
    select_topk,
)
from wsae.sae.architectures import Above
from wsae.sae.config import Kind, make_activation
from wsae.train.config import TrainConfig
from wsae.train.family import to_device
from wsae.train.state import Batch, MemberState, Target, make_batch, make_member
from wsae.train.step import eager_step

ROOT = Path(__file__).resolve().parents[1]
CASES = ("tests/kernels/triton_cases.py", "tests/train/train_gpu_cases.py")


class Size(NamedTuple):
    d_in: int
    d_sae: int
    batch: int
    k: int


class State(NamedTuple):
    """Both weight matrices with their moments, and the biases."""

    W_enc_t: Tensor
    W_dec: Tensor
    moments: list[Tensor]
    b_enc: Tensor
    b_dec: Tensor


class Cost(NamedTuple):
    flops: float
    bytes: float


def make_state(size: Size, device: str) -> State:
    torch.manual_seed(0)
    W = torch.randn(size.d_sae, size.d_in, device=device)
    W /= W.norm(dim=1, keepdim=True)
    moments = [torch.zeros_like(W) for _ in range(4)]
    zero = torch.zeros(size.d_sae, device=device), torch.zeros(size.d_in, device=device)
    return State(W, W.clone(), moments, *zero)


TRANSCODER = "topk, skip transcoder"


def make_training(
    size: Size, device: str, kind: str = "topk"
) -> tuple[MemberState, Batch, float, TrainConfig, int]:
    """Return the arguments of a training step: a member of a kind near its start, no latent dead."""
    skip = kind == TRANSCODER
    activation = make_activation(kind.partition(",")[0], size.k)
    settings = {"d_sae": size.d_sae, "activation": activation, "skip": skip or None}
    settings |= {"l1": 0.01} if kind in ("relu", "gated") else {}
    settings |= {"l0": 0.01} if kind == "jumprelu" else {}
    data = {"members": (settings,), "tokens": size.batch, "batch_size": size.batch}
    run = TrainConfig.parse({**data, "dtype": "bfloat16"})
    mean = torch.zeros(size.d_in)
    target = Target(mean, 1.0) if skip else None
    member = make_member(kind, run.members[0], run, mean, 1.0, target=target)
    member, sae = to_device(member, device), member.sae
    torch.manual_seed(0)
    x, y = torch.randn(2, size.batch, size.d_in, device=device)
    if isinstance(sae.choice, Above) and sae.b_enc is not None:
        some = x[:64]
        most = sae.pre(some).flatten().topk(size.k * len(some)).values
        sae.b_enc.data.sub_(most[-1].detach())
    return member, make_batch(x, member, y if skip else None), 1e-4, run, 0


def plain() -> SimpleNamespace:
    def product(x: Tensor, W: Tensor, b: Tensor | None, dtype: torch.dtype) -> Tensor:
        pre = x.to(dtype) @ W.to(dtype).T
        return pre if b is None else pre + b.to(dtype)

    def topk_encode(x: Tensor, W: Tensor, b: Tensor | None, k: int, dtype: torch.dtype):
        indices = select_topk(product(x, W, b, dtype), k)
        code = code_from_topk(indices.float(), indices)
        plan = Plan.build(code.indices, code.offsets, len(W))
        values = eager._pair_products(x, W, plan)
        return (values if b is None else values + b[plan.indices]).view(-1, k), indices

    def decode(values: Tensor, W: Tensor, plan: Plan) -> Tensor:
        return F.embedding_bag(
            plan.indices, W, plan.offsets[:-1], mode="sum", per_sample_weights=values
        )

    return SimpleNamespace(
        topk_encode=topk_encode,
        group_topk_encode=lambda x, W, b, k, dtype: select_group_topk(product(x, W, b, dtype), k),
        select_batch_topk=lambda x, W, b, k, dtype: select_batch_topk(product(x, W, b, dtype), k),
        decode=decode,
        pair_products=eager._pair_products,
        scatter=Plan.scatter,
        update_rows_=eager.update_rows_,
        adam_rows_=eager.adam_rows_,
        train_step=eager_step,
    )


def kernels() -> SimpleNamespace:
    from wsae.kernels.triton import encode, sums, update
    from wsae.kernels.triton import encode as above
    from wsae.kernels.triton import encode as group
    from wsae.train.gpu import triton_step

    return SimpleNamespace(
        topk_encode=encode.topk_encode,
        group_topk_encode=group.group_topk_encode,
        select_batch_topk=above.select_batch_topk,
        decode=sums.decode,
        pair_products=sums.pair_products,
        scatter=sums.scatter,
        update_rows_=update.update_rows_,
        adam_rows_=update.adam_rows_,
        train_step=triton_step,
    )


def step(ops: SimpleNamespace, state: State, x: Tensor, k: int, adam: AdamStep) -> Tensor:
    """Take a Top-k SAE's step on the mean over rows of |x - x_hat|^2; returns x_hat."""
    W_enc_t, W_dec, moments, b_enc, b_dec = state
    centred = x - b_dec
    pre, indices = ops.topk_encode(centred, W_enc_t, b_enc, k, torch.bfloat16)
    code = code_from_topk(pre.relu(), indices)
    plan = Plan.build(code.indices, code.offsets, len(W_dec))
    x_hat = ops.decode(code.values, W_dec, plan) + b_dec
    grad = (x_hat - x) * (2 / len(x))
    grad_pre = ops.pair_products(grad, W_dec, plan) * (code.values > 0)
    grad_b_enc = plan.per_latent(grad_pre)
    grad_b_dec = grad.sum(0) - grad_b_enc @ W_enc_t
    ops.update_rows_(W_dec, SparseGrad(plan, code.values, grad), *moments[:2], adam, True)
    ops.update_rows_(W_enc_t, SparseGrad(plan, grad_pre, centred), *moments[2:], adam, False)
    b_enc.sub_(adam.lr * grad_b_enc)  # the biases' optimiser is not what is measured
    b_dec.sub_(adam.lr * grad_b_dec)
    return x_hat


def cases(
    ops: SimpleNamespace, size: Size, device: str
) -> dict[str, tuple[Callable[[], object], Cost]]:
    """Return what is timed, with the arithmetic and traffic that cannot be avoided."""
    state = make_state(size, device)
    x = torch.randn(size.batch, size.d_in, device=device)
    adam = AdamStep(1e-4, 10, scale=torch.tensor(0.5, device=device))
    W_enc_t, W_dec, (m, v, *_), b_enc, _ = state
    bf16 = torch.bfloat16
    # a plan that both sides share, whatever they would choose
    indices = torch.randint(0, size.d_sae, (size.batch, size.k), device=device)
    code = code_from_topk(torch.rand(size.batch, size.k, device=device), indices)
    plan = Plan.build(code.indices, code.offsets, size.d_sae)
    grad, terms = torch.randn_like(W_dec), SparseGrad(plan, code.values, x)
    weights, rows = 4.0 * W_dec.numel(), 4.0 * x.numel()
    touched = 4.0 * size.d_in * min(size.d_sae, len(code.indices))
    dense = Cost(2.0 * size.batch * W_dec.numel(), weights + rows)
    pairs = 2.0 * len(code.indices) * size.d_in
    sums, full = Cost(pairs, touched + rows), Cost(pairs, 6 * weights + rows)
    arguments = (x, W_enc_t, b_enc, size.k, bf16)
    training = make_training(size, device)
    whole = Cost(
        dense.flops + 4 * pairs, dense.bytes + 2 * sums.bytes + 2 * full.bytes
    )  # compute and traffic of different parts overlap here: a little below the sum of the parts
    return {
        "topk_encode": (lambda: ops.topk_encode(*arguments), dense),
        "group_topk_encode": (lambda: ops.group_topk_encode(*arguments), dense),
        "select_batch_topk": (lambda: ops.select_batch_topk(*arguments), dense),
        "decode": (lambda: ops.decode(code.values, W_dec, plan), sums),
        "pair_products": (lambda: ops.pair_products(x, W_dec, plan), sums),
        "scatter": (lambda: ops.scatter(plan, code.values, x), Cost(pairs, weights + rows)),
        "update_rows_": (lambda: ops.update_rows_(W_dec, terms, m, v, adam, True), full),
        "adam_rows_": (
            lambda: ops.adam_rows_(W_dec, grad, m, v, adam, True),
            Cost(0.0, 7 * weights),
        ),
        "step": (lambda: step(ops, state, x, size.k, adam), whole),
        "train_step": (lambda: ops.train_step(*training), whole),
    }


def milliseconds(work: Callable[[], object], device: str) -> float | None:
    """Return the median time of the work with a cold cache, or None where memory ran out."""
    if device == "cpu":
        begin = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - begin)
    from triton.testing import do_bench

    try:
        return do_bench(work, warmup=50, rep=200, return_mode="median")
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None


def waits(work: Callable[[], object], device: str) -> int | None:
    """Return how often the host waits for the device in the work, once its kernels are tuned."""
    if device == "cpu":
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        work()
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def begin_peak(device: str) -> None:
    """Let go of what memory is not in use, and follow its peak from here."""
    if device != "cpu":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_mib(device: str) -> float | None:
    return None if device == "cpu" else torch.cuda.max_memory_allocated() / 2**20


def median(times: list[float | None]) -> float | None:
    known = [time for time in times if time is not None]
    return statistics.median(known) if known and len(known) == len(times) else None


def over(one: float | None, other: float | None) -> float | None:
    """Return one / other where both were measured."""
    return one / other if one and other else None


# the stages


def tests(at: argparse.Namespace) -> dict[str, object]:
    """Run the Triton tests' cases on the device."""
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "on_device"]
    words += ["-o", "addopts="]
    folders = [str(ROOT / "tests" / name) for name in ("support", "train", "kernels")]
    path = os.pathsep.join([*folders, *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "WSAE_TEST_DEVICE": at.device, "PYTHONPATH": path}
    begin, limit = time.monotonic(), 60 * at.minutes / 3
    try:
        done = subprocess.run(
            [*words, *CASES],
            cwd=ROOT,
            env=env,
            capture_output=True,
            text=True,
            check=False,
            timeout=limit,
        )
        text = done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        text = (error.stdout or b"").decode() + f"\nnot finished within {limit:.0f} s"
    (at.out / "tests.txt").write_text(text)
    last = text.strip().splitlines()[-1]
    failed = [line for line in text.splitlines() if line.startswith("FAILED")]
    return {"summary": last, "failed": failed, "seconds": time.monotonic() - begin}


def peer(size: Size, optimizer: str, device: str) -> Callable[[], object] | None:
    """Return sparsify's training step in bf16 on a random batch, or None where it is not installed."""
    if find_spec("sparsify") is None:
        return None
    from wsae_bench import peers

    job = SimpleNamespace(**size._asdict(), lr=None, seed=0, dtype="bfloat16", device=device)
    job.library, job.settings = "eai-sparsify", {"optimizer": optimizer}
    subject = peers.make(job, peers.load(job), torch.empty(0))
    x = torch.randn(size.batch, size.d_in, device=device)
    return lambda: subject.step(1, x)


def steps(size: Size, at: argparse.Namespace, until: float) -> dict[str, object]:
    """Time our step and the peer's in turn until the time is over, at least once each, with their peak memory."""
    ops = kernels()

    def ours() -> Callable[[], object]:
        training = make_training(size, at.device)
        return lambda: ops.train_step(*training)

    makers: dict[str, Callable[[], Callable[[], object] | None]] = {"wsae": ours}
    for optimizer in ("signum", "adam"):
        makers[f"sparsify-{optimizer}"] = lambda o=optimizer: peer(size, o, at.device)
    taken: dict[str, list[float | None]] = {}
    peak: dict[str, float | None] = {}
    while True:
        for name, make in makers.items():
            begin_peak(at.device)
            work = make()
            if work is None:
                continue
            work()
            peak[name] = peak_mib(at.device)
            taken.setdefault(name, []).append(milliseconds(work, at.device))
        if time.monotonic() > until:
            break
    ms = {name: median(times) for name, times in taken.items()}
    fastest = min((t for name, t in ms.items() if t and name != "wsae"), default=None)
    rows = {
        name: {
            "ms": one,
            "tokens_per_s": over(1e3 * size.batch, one),
            "of_fastest_peer": over(fastest, one),
            "peak_mib": peak.get(name),
        }
        for name, one in ms.items()
    }
    return {**size._asdict(), "rounds": len(taken["wsae"]), "rows": rows}


def each_kind(size: Size, at: argparse.Namespace, until: float) -> dict[str, object]:
    """Time a step of every kind by Triton and by PyTorch in turn until the time is over, at least once each."""
    sides = {"triton": kernels().train_step, "eager": plain().train_step}
    taken: dict[tuple[str, str], list[float | None]] = {}
    rows: dict[str, dict[str, float | None]] = {kind: {} for kind in (*get_args(Kind), TRANSCODER)}
    while True:
        for kind, row in rows.items():
            for side, take in sides.items():
                begin_peak(at.device)
                training = make_training(size, at.device, kind)
                ms = milliseconds(lambda t=training, take=take: take(*t), at.device)
                taken.setdefault((kind, side), []).append(ms)
                row[f"{side}_mib"] = None if ms is None else peak_mib(at.device)
                if side == "triton":
                    row["waits"] = waits(lambda t=training: sides["triton"](*t), at.device)
        if time.monotonic() > until:
            break
    for kind, row in rows.items():
        ours, theirs = (median(taken[kind, side]) for side in sides)
        row |= {"triton_ms": ours, "eager_ms": theirs, "eager_over_triton": over(theirs, ours)}
    return {**size._asdict(), "rows": rows}


def each_kernel(size: Size, at: argparse.Namespace, until: float) -> dict[str, object]:
    """Time the kernels and their twins in turn until the time is over, at least once each."""
    sides = {"triton": kernels(), "eager": plain()}
    taken: dict[tuple[str, str], list[float | None]] = {}
    costs: dict[str, Cost] = {}
    waited: dict[str, int | None] = {}
    while True:
        for side, ops in sides.items():
            for name, (work, cost) in cases(ops, size, at.device).items():
                taken.setdefault((name, side), []).append(milliseconds(work, at.device))
                costs[name] = cost
                if (name, side) == ("train_step", "triton"):
                    waited[name] = waits(work, at.device)
        if time.monotonic() > until:
            break
    rows = {}
    for name, cost in costs.items():
        ours, theirs = (median(taken[name, side]) for side in ("triton", "eager"))
        roofline = 1e3 * max(cost.flops / (at.tflops * 1e12), cost.bytes / (at.bandwidth * 1e12))
        rows[name] = {
            "triton_ms": ours,
            "eager_ms": theirs,
            "roofline_ms": roofline,
            "share_of_roofline": over(roofline, ours),
            "eager_over_triton": over(theirs, ours),
            "waits": waited.get(name),
        }
    return {**size._asdict(), "rows": rows}


# what is written


def cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def table(rows: dict[str, dict[str, Any]], columns: dict[str, tuple[str, str]], first: str) -> str:
    """Return rows as a table of docs/benchmarks.md."""
    lines = [f"| {first} | {' | '.join(columns)} |", f"|---{'|--:' * len(columns)}|"]
    for name, row in rows.items():
        cells = [cell(row[key], form) for key, form in columns.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


STEP_COLUMNS = {
    "ms a step": ("ms", ",.2f"),
    "tokens/s": ("tokens_per_s", ",.0f"),
    "x fastest peer": ("of_fastest_peer", ".2f"),
    "peak MiB": ("peak_mib", ",.0f"),
}
KIND_COLUMNS = {
    "ms a step": ("triton_ms", ",.2f"),
    "PyTorch, ms": ("eager_ms", ",.2f"),
    "PyTorch / ours": ("eager_over_triton", ".2f"),
    "peak MiB": ("triton_mib", ",.0f"),
    "PyTorch, peak MiB": ("eager_mib", ",.0f"),
    "waits": ("waits", "d"),
}
KERNEL_COLUMNS = {
    "ms": ("triton_ms", ",.3f"),
    "eager, ms": ("eager_ms", ",.3f"),
    "eager / ours": ("eager_over_triton", ".2f"),
    "roofline, ms": ("roofline_ms", ",.3f"),
    "share of roofline": ("share_of_roofline", ".0%"),
    "waits": ("waits", "d"),
}


def shape(found: dict[str, Any]) -> str:
    return "d_in {d_in:,}, d_sae {d_sae:,}, k {k}, batch {batch:,}".format(**found)


def page(report: dict[str, Any]) -> str:
    """Return what was measured so far as a section of docs/benchmarks.md."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    parts = [
        f"## GPU: {report['device']}",
        "    python benchmarks/gpu.py --out gpu",
        f"{versions}.",
    ]
    if "tests" in report:
        ran = report["tests"]
        parts.append(f"The Triton tests' cases on the device: {ran['summary'].strip('= ')}.")
    for found in report["steps"]:
        parts.append(f"A training step, {shape(found)}, bf16 products, {found['rounds']} rounds:")
        parts.append(table(found["rows"], STEP_COLUMNS, "trainer"))
    for found in report["kinds"]:
        parts.append(f"A training step of each kind, {shape(found)}, bf16 products:")
        parts.append(table(found["rows"], KIND_COLUMNS, "kind"))
    for found in report["kernels"]:
        parts.append(f"Kernels, {shape(found)}:")
        parts.append(table(found["rows"], KERNEL_COLUMNS, "kernel"))
    return "\n\n".join(parts) + "\n"


def versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "triton", "eai-sparsify"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


STAGES = {"steps": steps, "kinds": each_kind, "kernels": each_kernel}


def work_through(at: argparse.Namespace) -> dict[str, Any]:
    """Take every stage; what is done is written after each."""
    end = time.monotonic() + 60 * at.minutes
    name = "a rehearsal on a CPU" if at.rehearse else torch.cuda.get_device_name()
    report: dict[str, Any] = {"device": name, "versions": versions()}
    report |= {name: [] for name in STAGES}

    def keep() -> None:
        (at.out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
        (at.out / "gpu.md").write_text(page(report))

    sizes = {"B": Size(576, 4608, 2048, 32), "A": Size(768, 24_576, 4096, 32)}
    large = Size(4096, 131_072, 4096, 32)
    if at.rehearse:
        sizes, large = {"tiny": Size(5, 8, 2, 1)}, Size(3, 6, 2, 2)
    last = list(sizes.values())[-1]
    stages = [*(("steps", size) for size in sizes.values()), ("kinds", last), ("kernels", large)]
    if not at.rehearse:
        stages.insert(-1, ("kernels", last))
    report["tests"] = tests(at)
    keep()
    for number, (stage, size) in enumerate(stages):
        left = end - time.monotonic()
        if left < 0:
            print(f"out of time before {stage} at {size}", file=sys.stderr)
            break
        share = 0 if at.rehearse else left / (len(stages) - number) / 2  # a round ends beyond it
        until = time.monotonic() + share
        report[stage].append(STAGES[stage](size, at, until))
        keep()
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--tflops", type=float, default=790.0, help="bf16 products")
    parser.add_argument("--bandwidth", type=float, default=4.3, help="TB/s")
    parser.add_argument("--rehearse", action="store_true")
    at = parser.parse_args()
    at.device = "cpu" if at.rehearse else "cuda"
    if not at.rehearse and not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py: no CUDA device here; --rehearse goes through it on a CPU")
    if find_spec("triton") is None:
        sys.exit("benchmarks/gpu.py: triton is not installed")
    at.out.mkdir(parents=True, exist_ok=True)
    if at.rehearse:
        sys.path.append(str(ROOT / "tests" / "support"))
        import_module("on_device").interpret_faster()
    report = work_through(at)
    print((at.out / "gpu.md").read_text())
    if report["tests"]["failed"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
