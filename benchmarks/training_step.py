"""Where a compiled training step goes, and what each of its ideas is worth.

    python benchmarks/training_step.py [--size A B] [--threads 1] [--steps 30]
    python benchmarks/training_step.py --store STORE --hook layers.9 [--steps 30]

On synthetic activations of these sizes, or on those of a store (Top-k 32, 8 x d_in latents, batch 2,048).

Variants step alternately on the same batches: as shipped; without the guess learned from the batch before; with a
float32 product in place of 8 bits; PyTorch's own kernels. Prints the median time of each part of a shipped step, the
variants' medians, how many latents fired, and how the selected sets compare with a float32 product's, as JSON.
"""

import argparse
import json
import math
import statistics
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from wsae.acts.source import StoreSource
from wsae.kernels.native import select as selection
from wsae.kernels.native import weights
from wsae.sae import TopK
from wsae.train import native
from wsae.train.config import MemberConfig, TrainConfig
from wsae.train.state import Batch, MemberState, make_batch, make_member
from wsae.train.step import train_step

SIZES = {"A": (768, 24_576, 4096), "B": (576, 4608, 2048)}
PARTS = {
    "select": (native, "select_topk"),
    "sort": (native, "sort_pairs"),
    "to slices": (native.Centred, "of"),
    "decode": (weights, "decode"),
    "residual": (native, "residual"),
    "products": (weights, "dots"),
    "update": (native, "_update"),
}

SPENT: dict[str, float] = defaultdict(float)
"""Seconds of each part since the step began."""


def mixture(rows: int, d_in: int) -> Tensor:
    """Sparse mixtures of 4 d_in directions, about 24 active, with offset and noise; E|x|^2 = d_in."""
    g = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(4 * d_in, d_in, generator=g), dim=1)
    often = 1 / torch.arange(1, 4 * d_in + 1).float() ** 0.7
    often = (24 * often / often.sum()).clamp(max=0.9)
    z = (torch.rand(rows, 4 * d_in, generator=g) < often) * torch.rand(rows, 4 * d_in, generator=g)
    x = z @ directions + 0.05 * torch.randn(rows, d_in, generator=g) + 0.1
    return x * (d_in / x.square().sum(1).mean()).sqrt()


class Variant:
    """A member trained in one way."""

    def __init__(self, name: str, x: Tensor, d_sae: int, batch: int) -> None:
        member = MemberConfig(d_sae=d_sae, activation=TopK(k=32))
        kernels = "eager" if name == "eager" else "native"
        self.cfg = TrainConfig(
            members=(member,), tokens=1000 * batch, batch_size=batch, kernels=kernels
        )
        mean, spread = x.mean(0).double(), x.std(0).double()
        self.name, self.times = name, []
        self.member: MemberState = make_member(name, member, self.cfg, mean, 1.0, spread)

    def step(self, batch: Batch, number: int) -> None:
        rounded = self.member.weights and self.member.weights.rounded
        if self.name == "no guess" and rounded:
            rounded.guess = rounded.trend = math.nan
        real = selection.has_int8
        if self.name == "float32 selection":
            selection.has_int8 = lambda: False
        begin = time.perf_counter()
        train_step(self.member, batch, number, self.cfg)
        self.times.append(time.perf_counter() - begin)
        selection.has_int8 = real


def timed_parts() -> None:
    """Let every part of the compiled step note the time it takes."""
    for name, (module, attribute) in PARTS.items():
        inner = getattr(module, attribute)

        def outer(*args: object, _inner=inner, _name=name, **kwargs: object) -> object:  # noqa: ANN001
            begin = time.perf_counter()
            found = _inner(*args, **kwargs)
            SPENT[_name] += time.perf_counter() - begin
            return found

        setattr(module, attribute, outer)


def same_sets(member: MemberState, x: Tensor) -> dict[str, float]:
    """Compare the latents that training would select with those of a float32 product."""
    from wsae.kernels.native.slices import Centred, from_slices

    weights, k = member.weights, 32
    assert weights is not None
    rows = x - member.sae.b_dec.detach()
    both = Centred.of(rows)
    found = selection.select_topk(weights.rounded, weights.encoder_rows, member.sae.b_enc, both, k)
    pre = rows @ from_slices(weights.encoder_rows, weights.d_in).T + member.sae.b_enc.detach()
    wanted = pre.topk(k, 1)
    other = (found.indices.view(-1, k) != wanted.indices.sort(1).values).any(1)
    lost = wanted.values.sum(1) - found.values.view(-1, k).sum(1)
    return {
        "rows": len(x),
        "rows with another set": int(other.sum()),
        "largest relative loss": float((lost / wanted.values.sum(1)).max()),
    }


def stored(store: str, hook: str) -> Tensor:
    """Return 4 batches of a store; E|x|^2 = d_in about their mean."""
    stream = StoreSource(Path(store), (hook,)).stream(2048, 0)
    x = torch.cat([stream.next()[hook].float() for _ in range(4)])
    return x / x.var(0).mean().sqrt()


def measure(size: str, x: Tensor, threads: int, steps: int) -> dict[str, object]:
    d_in, (d_sae, batch) = x.shape[1], SIZES[size][1:] if size in SIZES else (8 * x.shape[1], 2048)
    torch.set_num_threads(threads)
    names = ("shipped", "no guess", "float32 selection", "eager")
    variants = [Variant(name, x, d_sae, batch) for name in names]
    batches = [make_batch(part, variants[0].member) for part in x.split(batch)]
    W, out, product, parts = torch.randn(d_sae, d_in), torch.empty(batch, d_sae), [], []
    for number in range(steps):
        shared = batches[number % len(batches)]
        for variant in variants:
            SPENT.clear()
            variant.step(shared, number)
            if variant.name == "shipped":
                parts.append(dict(SPENT))
        begin = time.perf_counter()
        torch.mm(shared.x, W.T, out=out)
        product.append(time.perf_counter() - begin)
    middle = {v.name: 1e3 * statistics.median(v.times[2:]) for v in variants}
    each = {name: 1e3 * statistics.median(p[name] for p in parts[2:]) for name in PARTS}
    shipped = variants[0].member
    effort = shipped.weights.rounded.effort
    return {
        "size": size,
        "threads": threads,
        "ms": middle | {"float32 product alone": 1e3 * statistics.median(product[2:])},
        "parts of a shipped step, ms": each | {"rest": middle["shipped"] - sum(each.values())},
        "exact values per row": effort.examined / effort.tokens,
        "rows scanned twice": effort.repeated / effort.tokens,
        "rows computed in full": effort.exhaustive / effort.tokens,
        "latents that did not fire": float((shipped.since_fired > 0).double().mean()),
        "sets": same_sets(shipped, x[:batch]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--store")
    parser.add_argument("--hook", default="layers.9")
    args = parser.parse_args()
    timed_parts()
    if args.store:
        data = {args.hook: stored(args.store, args.hook)}
    else:
        data = {size: mixture(4 * SIZES[size][2], SIZES[size][0]) for size in args.size}
    rows = [measure(name, x, n, args.steps) for name, x in data.items() for n in args.threads]
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
