"""Training beside busy processes: rows per second of the compiled step with one and more threads. Prints JSON.

    python benchmarks/company.py [--threads 1 2] [--neighbours 0 1 2] [--seconds 2] [--rounds 3]

Size B (576 -> 4,608, Top-k 32, batch 2,048) on synthetic activations. A neighbour is a process that counts. `threads`
0 is the default: all, fewer where those are faster, after 32 steps to find out.
"""

import wsae  # noqa: F401  # isort: skip  (first: it says how long OpenMP spins, which PyTorch reads)

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from training_step import SIZES, Variant, mixture
from wsae.kernels.native import kernel_threads
from wsae.train.state import make_batch
from wsae.train.step import Crew

BUSY = "while True: pass"


@contextmanager
def neighbours(n: int) -> Iterator[None]:
    """Let n processes count meanwhile."""
    running = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(n)]
    time.sleep(0.2)
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 0])
    parser.add_argument("--neighbours", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    d_in, d_sae, batch = SIZES["B"]
    x = mixture(4 * batch, d_in)
    shipped = Variant("shipped", x, d_sae, batch)
    batches = [make_batch(part, shipped.member) for part in x.split(batch)]
    found = {(t, n): [] for t in args.threads for n in args.neighbours}
    for _ in range(args.rounds):
        for (threads, n), rates in found.items():
            torch.set_num_threads(threads or cores)
            crew = Crew(threads or cores)

            def step(number: int, crew: Crew = crew, found_out: bool = threads == 0) -> None:
                begin = time.perf_counter()
                with kernel_threads(crew.threads):
                    shipped.step(batches[number % len(batches)], number)
                if found_out:
                    crew.note(time.perf_counter() - begin)

            with neighbours(n):
                for number in range(32 if threads == 0 else 1):
                    step(number)
                steps, begin = 0, time.perf_counter()
                while time.perf_counter() < begin + args.seconds:
                    step(steps)
                    steps += 1
                rates.append(steps * batch / (time.perf_counter() - begin))
    rows = [
        {"threads": threads, "neighbours": n, "rows/s": [round(rate) for rate in sorted(rates)]}
        for (threads, n), rates in found.items()
    ]
    print(json.dumps({"cores": cores, "rows": rows}))


if __name__ == "__main__":
    main()
