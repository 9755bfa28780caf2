"""Where a training step goes: the SAE's own arithmetic against everything else, on synthetic activations.

    python benchmarks/trainer.py [--d-in 576] [--d-sae 4608] [--k 32] [--batch 2048] [--threads 2] [--steps 40]

    python benchmarks/trainer.py [--d-in 576] [--d-sae 4608] [--k 32] [--batch 2048] [--threads 2]
(forward, backward, Adam, unit decoder rows). Prints medians and their ratio as JSON.
"""

import argparse
import json
import statistics
import time

import torch

from wsae.acts.source import ArraySource
from wsae.core.progress import quiet
from wsae.sae import make_activation
from wsae.sae.forward import training_forward, weighted_reconstruction_loss
from wsae.train.config import MemberConfig, TrainConfig
from wsae.train.family import make_family
from wsae.train.loop import run_steps
from wsae.train.state import MemberState
from wsae.train.step import remove_radial_gradient, unit_rows_


def arithmetic(member: MemberState, x: torch.Tensor, bf16: bool) -> None:
    """The part of a step that any trainer of this SAE must do."""
    forward = training_forward(member.sae, x, bf16=bf16)
    loss = weighted_reconstruction_loss(x, forward.x_hat, member.sae.gamma)
    member.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    with torch.no_grad():
        remove_radial_gradient(member.sae)
        member.optimizer.step()
        unit_rows_(member.sae)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (
        ("d-in", 576),
        ("d-sae", 4608),
        ("k", 32),
        ("batch", 2048),
        ("threads", 2),
        ("steps", 40),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--kind", default="topk")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    x = torch.randn(8 * args.batch, args.d_in)
    member = MemberConfig(d_sae=args.d_sae, activation=make_activation(args.kind, args.k))
    cfg = TrainConfig(
        members=(member,), tokens=args.batch * args.steps, batch_size=args.batch, dtype=args.dtype
    )
    source = ArraySource(x)
    family = make_family(cfg, source.stats())
    bare = make_family(cfg, source.stats()).members["acts"][0]
    times: dict[str, list[float]] = {"whole": [], "arithmetic": []}
    fixed = x[: args.batch]
    clock = time.perf_counter

    def on_step(_: int) -> None:
        nonlocal begin
        times["whole"].append(clock() - begin)
        begin = clock()
        arithmetic(bare, fixed, args.dtype == "bfloat16")
        times["arithmetic"].append(clock() - begin)
        begin = clock()

    with quiet("train", None, "tokens") as tick:
        begin = clock()
        run_steps(cfg, family, source.stream(args.batch, 0), 0, tick, on_step)
    median = {name: statistics.median(t[2:]) for name, t in times.items()}
    result = {
        **vars(args),
        "whole_ms": 1e3 * median["whole"],
        "arithmetic_ms": 1e3 * median["arithmetic"],
        "overhead": median["whole"] / median["arithmetic"] - 1,
        "tokens_per_s": args.batch / median["whole"],
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
