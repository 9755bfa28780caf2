"""Training beside busy processes: rows per second of the compiled step with one and more threads. Prints JSON.

    python benchmarks/company.py [--threads 1 2 0] [--neighbours 0 1 2] [--seconds 1] [--rounds 5]
    python benchmarks/company.py --commands "wsae theory --out /tmp/ledger" [--sources OLD/src src] [--rounds 2]

Size B (576 -> 4,608, Top-k 32, batch 2,048) on synthetic activations. A neighbour is a process that counts. `threads`
0 is the default: all, fewer where those are faster, after 32 steps to find out.

Each measurement is followed by one of as many counting processes in our place, beside the same neighbours: the cores
they get are what the system gives to whoever never waits (`fair cores`), whatever else runs on the machine. `share` is
rows/s as a share of what one thread makes of so many seconds of its processor.

With commands, the seconds of each as a whole instead, beside the same neighbours, with every folder of sources in turn.
"""

import wsae  # noqa: F401  # isort: skip  (first: it says how long OpenMP spins, which PyTorch reads)

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from training_step import SIZES, Variant, mixture
from wsae.kernels.native.build import kernel_threads
from wsae.train.state import make_batch
from wsae.train.step import Crew

BUSY = "while True: pass"
FOR_A_WHILE = """
import time
end = time.perf_counter() + {seconds}
while time.perf_counter() < end: pass
print(time.process_time())
"""


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


def fair_cores(threads: int, seconds: float) -> float:
    """Return the processor seconds a second that so many counting processes get."""
    words = [sys.executable, "-S", "-c", FOR_A_WHILE.format(seconds=seconds)]
    running = [subprocess.Popen(words, stdout=subprocess.PIPE) for _ in range(threads)]
    return sum(float(process.communicate()[0]) for process in running) / seconds


class Stepper:
    """A member of size B and what its steps take."""

    def __init__(self) -> None:
        d_in, d_sae, self.batch = SIZES["B"]
        x = mixture(4 * self.batch, d_in)
        self.shipped = Variant("shipped", x, d_sae, self.batch)
        self.batches = [make_batch(part, self.shipped.member) for part in x.split(self.batch)]

    def rate(self, threads: int, seconds: float, settle: int) -> tuple[float, float]:
        """Return rows per second and per processor second, after `settle` steps that may change the threads."""
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(threads or cores)
        crew = Crew(threads or cores)

        def step(number: int) -> None:
            begin = time.perf_counter()
            with kernel_threads(crew.threads):
                self.shipped.step(self.batches[number % len(self.batches)], number)
            if threads == 0:
                crew.note(time.perf_counter() - begin)

        for number in range(settle):
            step(number)
        steps, begin, used = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() < begin + seconds:
            step(steps)
            steps += 1
        rows = steps * self.batch
        return rows / (time.perf_counter() - begin), rows / (time.process_time() - used)


def step_rates(args: argparse.Namespace) -> dict[str, object]:
    """Return the rates of the compiled step, and their shares."""
    cores, stepper, found = len(os.sched_getaffinity(0)), Stepper(), defaultdict(list)
    for _ in range(args.rounds):
        for threads in args.threads:
            for n in args.neighbours:
                with neighbours(n):
                    rate, _ = stepper.rate(threads, args.seconds, 1 if threads else 32)
                    fair = fair_cores(threads or cores, args.seconds)
                    _, per_second = stepper.rate(1, args.seconds / 2, 1)
                found[threads, n].append((rate, fair, rate / (fair * per_second)))
    rows = []
    for (threads, n), measured in found.items():
        rate, fair, share = (statistics.median(column) for column in zip(*measured, strict=True))
        row = {"threads": threads, "neighbours": n, "rows/s": round(rate)}
        rows.append(row | {"fair cores": round(fair, 2), "share": round(share, 3)})
    return {"cores": cores, "rows": rows}


def command_seconds(args: argparse.Namespace) -> dict[str, object]:
    """Return the seconds of whole commands, medians over the rounds."""
    found = defaultdict(list)
    for _ in range(args.rounds):
        for command in args.commands:
            for n in args.neighbours:
                for source in args.sources:
                    with neighbours(n):
                        begin = time.perf_counter()
                        env = {**os.environ, "PYTHONPATH": source}
                        words = [sys.executable, "-m", "wsae.cli", *shlex.split(command)[1:]]
                        subprocess.run(words, check=True, stdout=subprocess.DEVNULL, env=env)
                        found[command, n, source].append(time.perf_counter() - begin)
    keys = ("command", "neighbours", "sources", "seconds")
    return {
        "rows": [
            dict(zip(keys, (*case, round(statistics.median(seconds), 1)), strict=True))
            for case, seconds in found.items()
        ]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 0])
    parser.add_argument("--neighbours", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--commands", nargs="+", metavar="'wsae ...'")
    parser.add_argument("--sources", nargs="+", default=["src"])
    args = parser.parse_args()
    load = os.getloadavg()[0]
    found = command_seconds(args) if args.commands else step_rates(args)
    print(json.dumps({"load before": load, **found}))


if __name__ == "__main__":
    main()
