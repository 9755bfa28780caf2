"""What each Triton kernel and a whole step cost on a GPU, beside the eager twins and the device's limits. Prints JSON.

    python benchmarks/gpu.py [--size 768 24576 4096] [--k 32] [--tflops 790] [--bandwidth 4.3] [--rounds 3]

`--size` is d_in, d_sae and batch, and may be repeated. A row's `roofline` is the time its arithmetic and the bytes it
cannot avoid would take at the rates given (the defaults are an H200's, bf16); `eager` is None where it ran out of
memory. Kernels and twins alternate, round after round; medians of the rounds' medians, in milliseconds. `step` is the
arithmetic of a step alone, `train_step` one as a run takes it, with its counters and metrics; `waits` says how often
the host waited for the device in it.
"""

import argparse
import json
import statistics
import sys
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wsae.kernels import code_from_topk, select_batch_topk, select_group_topk, select_topk, sparse
from wsae.kernels import update as eager_update
from wsae.kernels.sparse import Plan
from wsae.kernels.update import AdamStep, SparseGrad
from wsae.train.config import TrainConfig
from wsae.train.family import to_device
from wsae.train.state import Batch, MemberState, make_batch, make_member
from wsae.train.step import eager_step


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


def make_training(size: Size, device: str) -> tuple[MemberState, Batch, float, TrainConfig, int]:
    """Return the arguments of a training step: a Top-k member at its start, no latent dead."""
    settings = {"d_sae": size.d_sae, "activation": {"kind": "topk", "k": size.k}}
    data = {"members": (settings,), "tokens": size.batch, "batch_size": size.batch}
    run = TrainConfig.parse({**data, "dtype": "bfloat16"})
    member = make_member("topk", run.members[0], run, torch.zeros(size.d_in), 1.0)
    member = to_device(member, device)
    torch.manual_seed(0)
    x = torch.randn(size.batch, size.d_in, device=device)
    return member, make_batch(x, member), 1e-4, run, 0


def eager() -> SimpleNamespace:
    def product(x: Tensor, W: Tensor, b: Tensor | None, dtype: torch.dtype) -> Tensor:
        pre = x.to(dtype) @ W.to(dtype).T
        return pre if b is None else pre + b.to(dtype)

    def topk_encode(x: Tensor, W: Tensor, b: Tensor | None, k: int, dtype: torch.dtype):
        indices = select_topk(product(x, W, b, dtype), k)
        code = code_from_topk(indices.float(), indices)
        plan = Plan.build(code.indices, code.offsets, len(W))
        values = sparse._pair_products(x, W, plan)
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
        pair_products=sparse._pair_products,
        scatter=Plan.scatter,
        update_rows_=eager_update.update_rows_,
        adam_rows_=eager_update.adam_rows_,
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


def cases(ops: SimpleNamespace, size: Size) -> dict[str, tuple[Callable[[], object], Cost]]:
    """Return what is timed, with the arithmetic and traffic that cannot be avoided."""
    state, device = make_state(size, "cuda"), "cuda"
    x, adam = torch.randn(size.batch, size.d_in, device=device), AdamStep(1e-4, 10)
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


def milliseconds(work: Callable[[], object]) -> float | None:
    """Return the median time of the work with a cold cache, or None where memory ran out."""
    from triton.testing import do_bench

    try:
        return do_bench(work, warmup=50, rep=300, return_mode="median")
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None


def waits(work: Callable[[], object]) -> int:
    """Return how often the host waits for the device in the work, once its kernels are tuned."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        work()
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def measure(size: Size, args: argparse.Namespace) -> dict[str, object]:
    sides = {"triton": kernels(), "eager": eager()}
    taken: dict[tuple[str, str], list[float | None]] = {}
    costs: dict[str, Cost] = {}
    waited: dict[str, int] = {}
    for _ in range(args.rounds):
        for side, ops in sides.items():
            for name, (work, cost) in cases(ops, size).items():
                taken.setdefault((name, side), []).append(milliseconds(work))
                costs[name] = cost
                if (name, side) == ("train_step", "triton"):
                    waited[name] = waits(work)
    rows = {}
    for name, cost in costs.items():
        ours, theirs = (median(taken[name, side]) for side in ("triton", "eager"))
        roofline = 1e3 * max(
            cost.flops / (args.tflops * 1e12), cost.bytes / (args.bandwidth * 1e12)
        )
        rows[name] = {
            "triton_ms": ours,
            "eager_ms": theirs,
            "roofline_ms": roofline,
            "share_of_roofline": roofline / ours if ours else None,
            "eager_over_triton": theirs / ours if ours and theirs else None,
            "waits": waited.get(name),
        }
    return {**size._asdict(), "rows": rows}


def median(times: list[float | None]) -> float | None:
    known = [time for time in times if time is not None]
    return statistics.median(known) if len(known) == len(times) else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs=3, action="append", metavar="N")
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--tflops", type=float, default=790.0, help="bf16 products")
    parser.add_argument("--bandwidth", type=float, default=4.3, help="TB/s")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py: no CUDA device here, so there is nothing to measure")
    from wsae.kernels.triton import unsupported

    results = []
    for d_in, d_sae, batch in args.size or [(768, 24_576, 4_096), (4_096, 131_072, 4_096)]:
        size = Size(d_in, d_sae, batch, args.k)
        reason = unsupported(torch.empty(d_sae, d_in, device="cuda"), torch.bfloat16, args.k)
        if reason is not None:
            sys.exit(f"benchmarks/gpu.py: d_in {d_in}, d_sae {d_sae}: {reason}")
        results.append(measure(size, args))
        torch.cuda.empty_cache()
    report = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "tflops": args.tflops,
        "bandwidth": args.bandwidth,
        "sizes": results,
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
