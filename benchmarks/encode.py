"""Encoding for evaluation: the compiled selection against the dense product and top-k. Prints JSON.

    python benchmarks/encode.py [--threads 1 2] [--rounds 7]

Synthetic activations and an untrained Top-k SAE at size B (576 -> 4,608) and A (768 -> 24,576); both sides alternate.
"""

import argparse
import json
import statistics
import time

import torch

from training_step import SIZES, mixture
from wsae.sae import SAE, SAEConfig, TopK
from wsae.sae.model import Encoder


def measure(size: str, threads: int, rounds: int) -> dict[str, object]:
    d_in, d_sae, batch = SIZES[size]
    torch.set_num_threads(threads)
    x = mixture(batch, d_in)
    sae = SAE(SAEConfig(d_in=d_in, d_sae=d_sae, activation=TopK(k=32)))
    sae.b_dec.data.copy_(x.mean(0))
    sides = {"compiled": Encoder(sae), "dense": sae.encode_code}
    times: dict[str, list[float]] = {name: [] for name in sides}
    with torch.inference_mode():
        for _ in range(rounds + 2):
            for name, encode in sides.items():
                begin = time.perf_counter()
                encode(x)
                times[name].append(1e3 * (time.perf_counter() - begin))
    middle = {name: statistics.median(found[2:]) for name, found in times.items()}
    ratio = middle["dense"] / middle["compiled"]
    return {"size": size, "threads": threads, "rows": batch, "ms": middle, "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    rows = [measure(size, n, args.rounds) for size in ("B", "A") for n in args.threads]
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
