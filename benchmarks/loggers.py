"""What loggers cost: the same small run without one, with TensorBoard, with W&B offline, alternating in one process.

    python benchmarks/loggers.py [--rounds 3] [--steps 800] [--out loggers.json]

W&B is left out where it is not installed. Printed are steps per second (median and all), start-up and the logger's
beginning and end left out, and the training thread's processor time and waiting for each row it hands on.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from wsae.acts.source import ArraySource
from wsae.sae import TopK
from wsae.sae.config import GammaConfig
from wsae.train import loggers
from wsae.train.config import MemberConfig, TrainConfig
from wsae.train.loggers import Logger, WandbConfig, mirrored, tensorboard, wandb
from wsae.train.run import train_run

D_IN, D_SAE, BATCH, EVERY = 64, 1024, 512, 20


def config(steps: int) -> TrainConfig:
    plain = MemberConfig(d_sae=D_SAE, activation=TopK(k=16))
    weighted = plain.model_copy(update={"gamma": GammaConfig(rule="variance", alpha=1.0)})
    return TrainConfig(
        members=(plain, weighted), tokens=steps * BATCH, batch_size=BATCH, log_every=EVERY
    )


@contextmanager
def watched() -> Iterator[list[tuple[float, float, float]]]:
    """Yield a list that gets (clock, processor seconds, seconds) of every row handed on."""
    rows: list[tuple[float, float, float]] = []
    write = loggers.Mirror.write

    def timed(self: loggers.Mirror, values: Any) -> None:
        clock, spent = time.perf_counter(), time.thread_time()
        write(self, values)
        rows.append((clock, time.thread_time() - spent, time.perf_counter() - clock))

    loggers.Mirror.write = timed
    try:
        yield rows
    finally:
        loggers.Mirror.write = write


def once(cfg: TrainConfig, source: ArraySource, loggers: list[Logger]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as place, watched() as rows, mirrored(loggers):
        train_run(cfg, source, Path(place) / "run")
    steps = EVERY * (len(rows) - 1)
    return {
        "steps_per_s": steps / (rows[-1][0] - rows[0][0]),
        "row_cpu_ms": 1e3 * statistics.mean(row[1] for row in rows),
        "row_ms": 1e3 * statistics.mean(row[2] for row in rows),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    kinds: dict[str, Callable[[], list[Logger]]] = {
        "none": list,
        "tensorboard": lambda: [tensorboard()],
    }
    if find_spec("wandb"):
        kinds["wandb, offline"] = lambda: [wandb(WandbConfig(mode="offline"))]
    source = ArraySource(torch.randn(40_000, D_IN, generator=torch.Generator().manual_seed(0)))
    cfg = config(args.steps)
    once(cfg.model_copy(update={"tokens": 100 * BATCH}), source, [])
    found: dict[str, list[dict[str, float]]] = {name: [] for name in kinds}
    for _ in range(args.rounds):
        for name, make in kinds.items():
            found[name].append(once(cfg, source, make()))
    for name, runs in found.items():
        rates = [run["steps_per_s"] for run in runs]
        row = [statistics.median(run[key] for run in runs) for key in ("row_cpu_ms", "row_ms")]
        told = ", ".join(f"{rate:.1f}" for rate in sorted(rates))
        print(f"| {name} | {row[0]:.2f} | {row[1]:.2f} | {statistics.median(rates):.1f} ({told}) |")
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
