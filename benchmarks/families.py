"""What more members and a preconditioner cost, and what many small ones in one computation save. Prints JSON.

    python benchmarks/families.py STORE [--hook layers.9] [--rounds 4]

From the store (Top-k 32, 8 x d_in latents, batch 2,048, one thread): the median milliseconds of a step with one and two
members, reading included, alternating; `ratio` is two over one. `preconditioned`: a plain member's step over that of
one on whitened activations, the map in either precision, at 8 and 32 x d_in latents, step by step in turn, times of the
thread. Small members (20 -> 128, batch 128, 300 steps,
two threads): seconds of `wsae.fit_family` as it is and with the compiled kernels in turn, alternating.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

import wsae
from wsae.acts.source import StoreSource
from wsae.train.config import MemberConfig, TrainConfig
from wsae.train.loop import run_steps
from wsae.train.run import start_family
from wsae.train.state import make_batches
from wsae.train.step import train_step

STEPS, FIRST = 25, 4
MEMBERS = 32


def step_ms(source: StoreSource, stats: dict, *members: MemberConfig) -> float:
    """Return the median time of a step with these members, the first few left out."""
    cfg = TrainConfig(members=members, tokens=2048 * STEPS, batch_size=2048)
    ends: list[float] = []

    def on_step(_: int) -> None:
        ends.append(time.perf_counter())

    family, stream = start_family(cfg, source, stats), source.stream(cfg.batch_size, cfg.seed)
    run_steps(cfg, family, stream, 0, lambda _: None, on_step)
    return 1e3 * statistics.median(b - a for a, b in zip(ends[FIRST:], ends[FIRST + 1 :]))  # noqa: B905


def from_store(store: str, hook: str, rounds: int) -> dict[str, float]:
    torch.set_num_threads(1)
    source = StoreSource(Path(store), (hook,))
    stats = source.stats()
    first, second = (wsae.Member(k=32, lr=1e-3, seed=i, label=f"m{i}") for i in range(2))
    pairs = [
        (step_ms(source, stats, first), step_ms(source, stats, first, second))
        for _ in range(rounds)
    ]
    one, two = (statistics.median(side) for side in zip(*pairs, strict=True))
    return {"one_ms": one, "two_ms": two, "ratio": two / one}


def preconditioned(store: str, hook: str, expansion: int, rounds: int) -> dict[str, float]:
    torch.set_num_threads(1)
    source = StoreSource(Path(store), (hook,))
    stats = source.stats()
    sides = {}
    for kind, dtype in (("none", "float32"), ("whiten", "float32"), ("whiten", "bfloat16")):
        member = wsae.Member(k=32, lr=1e-3, expansion=expansion, precondition=kind)
        cfg = TrainConfig(members=(member,), tokens=10**7, batch_size=2048, dtype=dtype)
        sides[f"{kind} {dtype}"] = cfg, start_family(cfg, source, stats).members[hook]
    stream, times = source.stream(2048, 0), {name: [] for name in sides}
    for step in range(FIRST + 10 * rounds):
        x = stream.next()[hook]
        for name, (cfg, members) in sides.items():
            begin = time.thread_time()
            train_step(members[0], make_batches(x, members)[0], step, cfg)
            times[name].append(1e3 * (time.thread_time() - begin))
    plain = times["none float32"][FIRST:]
    out: dict[str, float] = {"expansion": expansion, "plain_ms": statistics.median(plain)}
    for name in ("whiten float32", "whiten bfloat16"):
        pairs = zip(plain, times[name][FIRST:], strict=True)
        out[name] = statistics.median(one / other for one, other in pairs)
    return out


def small_seconds(x: torch.Tensor, kind: str, rates: int, **options: str) -> float:
    """Return the seconds of training 32 small members with so many different learning rates."""
    members = [
        wsae.Member(
            **{"activation": kind, "k": 4, "d_sae": 128, "seed": i % 4, "label": f"m{i}"},
            **{"gamma": "variance", "alpha": 0.25 * (1 + i % 4), "lr": 1e-3 * (1 + i % rates)},
        )
        for i in range(MEMBERS)
    ]
    begin = time.perf_counter()
    wsae.fit_family(x, members, tokens=128 * 300, batch_size=128, **options)
    return time.perf_counter() - begin


def small(kind: str, rates: int, rounds: int) -> dict[str, object]:
    torch.set_num_threads(2)
    x = torch.randn(20_000, 20, generator=torch.Generator().manual_seed(0))
    small_seconds(x, kind, rates)
    pairs = [
        (small_seconds(x, kind, rates), small_seconds(x, kind, rates, kernels="native"))
        for _ in range(rounds)
    ]
    ours, turn = (statistics.median(side) for side in zip(*pairs, strict=True))
    case = {"activation": kind, "learning_rates": rates}
    return {**case, "fit_family_s": ours, "in_turn_s": turn, "ratio": turn / ours}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store")
    parser.add_argument("--hook", default="layers.9")
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    rows = [small(*case, args.rounds) for case in (("topk", 1), ("relu", 1), ("topk", 4))]
    place = (args.store, args.hook)
    result = {
        "from a store": from_store(*place, args.rounds),
        "preconditioned": [preconditioned(*place, e, args.rounds) for e in (8, 32)],
        "small": rows,
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
