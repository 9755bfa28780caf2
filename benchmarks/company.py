"""Training beside busy processes: rows per second of the compiled step with one and more threads. Prints JSON.

    python benchmarks/company.py [--threads 1 2] [--neighbours 0 1 2] [--seconds 2] [--rounds 3]

Size B (576 -> 4,608, Top-k 32, batch 2,048) on synthetic activations. A neighbour is a process that counts. `share`: of
what one thread makes alone, times the cores that are this process's by right, cores / (threads + neighbours) for each
of its threads and never more than one.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from training_step import SIZES, Variant, mixture
from wsae.train.state import make_batch

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
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--neighbours", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    d_in, d_sae, batch = SIZES["B"]
    x = mixture(4 * batch, d_in)
    shipped = Variant("shipped", x, d_sae, batch)
    batches = [make_batch(part, shipped.member) for part in x.split(batch)]
    found = {(t, n): [] for t in args.threads for n in args.neighbours}
    for _ in range(args.rounds):
        for (threads, n), rates in found.items():
            torch.set_num_threads(threads)
            with neighbours(n):
                shipped.step(batches[0], 0)
                steps, begin = 0, time.perf_counter()
                while time.perf_counter() < begin + args.seconds:
                    shipped.step(batches[steps % len(batches)], steps)
                    steps += 1
                rates.append(steps * batch / (time.perf_counter() - begin))
    cores = len(os.sched_getaffinity(0))
    rates = {key: statistics.median(found[key]) for key in found}
    rows = []
    for (threads, n), rate in rates.items():
        fair = threads * min(1.0, cores / (threads + n))
        share = rate / rates.get((1, 0), rate) / fair
        rows.append({"threads": threads, "neighbours": n, "rows/s": round(rate), "share": share})
    print(json.dumps({"cores": cores, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
