"""Held-out FVU by the norm at which the encoder's rows start (`encoder_scale`). Prints JSON, one line a case.

    python benchmarks/encoder_start.py [STORE --hook layers.9]

Top-k 32, 576 -> 4,608 (8 x d_in), batch 2,048, neither warm-up nor decay, two seeds. Without a store on the synthetic
mixtures of `wsae bench` (60 steps), with one on its rows (250 steps).
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

import wsae
from training_step import mixture
from wsae.acts.source import StoreSource

SCALES = {"1": 1.0, "1/sqrt(3)": 3**-0.5, "0.3": 0.3}


def fvu(sae: wsae.SAE, x: Tensor) -> float:
    with torch.no_grad():
        error = (x - sae(x)).double().square().sum()
    return float(error / (x - x.mean(0)).double().square().sum())


def rows(args: argparse.Namespace, steps: int) -> tuple[Tensor, Tensor]:
    """Return training and held-out rows."""
    if args.store is None:
        x = mixture(2048 * steps + 4096, 576)
        return x[:-4096], x[-4096:]
    source = StoreSource(Path(args.store), (args.hook,))
    stream = source.stream(2048, 0)
    parts = [stream.next()[args.hook] for _ in range(steps)]
    held = next(iter(source.heldout(8192))).x[args.hook]
    return torch.cat(parts), held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", nargs="?")
    parser.add_argument("--hook", default="layers.9")
    args = parser.parse_args()
    steps = 60 if args.store is None else 250
    x, held = rows(args, steps)
    for lr in (3.77e-4, 2e-3):
        members = [
            wsae.Member(k=32, lr=lr, seed=seed, encoder_scale=scale, label=f"{name} {seed}")
            for name, scale in SCALES.items()
            for seed in (0, 1)
        ]
        options = {"warmup": 0.0, "decay": 0.0, "batch_size": 2048, "dead_after": 10_000_000}
        family = wsae.fit_family(x, members, tokens=2048 * steps, **options)
        found = [round(fvu(sae, held), 4) for sae in family.saes]
        by = {name: found[2 * i : 2 * i + 2] for i, name in enumerate(SCALES)}
        print(json.dumps({"lr": lr, "steps": steps, "fvu of two seeds": by}), flush=True)


if __name__ == "__main__":
    main()
