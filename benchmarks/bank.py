"""What a training step of one small SAE costs: in a bank, alone, in the main trainer, in SAELens. Prints Markdown.

    python benchmarks/bank.py --threads 2 [--saelens-python PATH/TO/python] [--figure docs/images/bank-cost.png]

Every side draws its own data, fresh rows each step. Sides alternate, round after round in one process (SAELens in one
that waits meanwhile); medians over rounds of the mean over a round's steps, without construction. The bank holds 110
members over 55 worlds, 11 levels of S and 5 seeds, d_in = 20, n = d_sae = 200. A bank of one member computes on one
core whatever --threads is, so `--threads 1` compares core with core. `--quick` only shows that it runs.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from wsae.sae.config import ReLU
from wsae.studies.sweep import Rows, Trial
from wsae.studies.sweep_config import LEVELS
from wsae.theory.geometry import random_unit
from wsae.toy.config import FeatureConfig
from wsae.train.bank import make_entry, train_bank
from wsae.train.config import BankConfig, MemberConfig, TrainConfig
from wsae.train.state import make_batch, make_member
from wsae.train.step import train_step

D_IN = 20
SEEDS = 5


class Size(NamedTuple):
    """How much is measured; `steps` is for the whole bank, lone SAEs take `lone` steps."""

    n: int
    levels: tuple[float, ...]
    steps: int
    lone: int
    rounds: int
    widths: tuple[int, ...]
    members: tuple[int, ...]
    of_each: int
    work: float
    """Members times steps of a point in the table of costs, at n = d_sae = 200."""


FULL = Size(
    n=200,
    levels=LEVELS,
    steps=40,
    lone=200,
    rounds=7,
    widths=(50, 100, 200, 400, 700, 1000),
    members=(1, 4, 16, 64, 128, 256),
    of_each=32,
    work=2500,
)
QUICK = Size(20, (0.5, 0.9), 4, 4, 2, (10, 20), (1, 4), 2, 8)

K = TypeVar("K")
Side = Callable[[], float]
"""Runs once and returns seconds per member and step."""


STRETCH = 10
"""Steps between two records of the losses, where the threads meet (50 by default)."""


class Clock:
    """A progress callback that notes when each stretch of steps ended."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.steps: list[int] = []

    @contextmanager
    def __call__(self, task: str, total: int | None, unit: str, done: int = 0) -> Iterator:  # noqa: ARG002
        yield self.tick

    def tick(self, n: int, **fields: float | str) -> None:  # noqa: ARG002
        self.times.append(time.perf_counter())
        self.steps.append(n)

    def per_step(self) -> float:
        """Mean over all stretches but the first, in which buffers are made."""
        return (self.times[-1] - self.times[0]) / sum(self.steps[1:])


def worlds(n: int, levels: Sequence[float], seeds: int) -> list[Trial]:
    """One random W_p per seed, seen at every level."""
    return [
        Trial(random_unit(D_IN, n, s).float(), FeatureConfig(n_features=n, sparsity=level), s, {})
        for level in levels
        for s in range(seeds)
    ]


def member(d_sae: int, tied: bool) -> MemberConfig:
    return MemberConfig(d_sae=d_sae, activation=ReLU(), tied=tied, lr=1e-3, auxk=0.0)


def data(trials: Sequence[Trial], batch: int):
    return lambda worlds: Rows([trials[w] for w in worlds], "train", batch).acts


def bank_side(
    trials: Sequence[Trial], each: int, cfg: MemberConfig, batch: int, steps: int
) -> Side:
    """`each` members per world: the plain one and others with weights."""

    def run() -> float:
        weights = torch.linspace(0.5, 1.5, D_IN)
        entries = [
            make_entry(cfg, weights**i, world=w, seed=i)
            for w in range(len(trials))
            for i in range(each)
        ]
        clock = Clock()
        train_bank(
            entries,
            data(trials, batch),
            BankConfig(steps=steps + STRETCH, log_every=STRETCH),
            progress=clock,
        )
        return clock.per_step() / len(entries)

    return run


def lone_side(trial: Trial, cfg: MemberConfig, batch: int, steps: int) -> Side:
    """A bank of one member, with its own data."""

    def run() -> float:
        clock = Clock()
        entry = make_entry(cfg, torch.ones(D_IN))
        train_bank(
            [entry],
            data([trial], batch),
            BankConfig(steps=steps + STRETCH, log_every=STRETCH),
            progress=clock,
        )
        return clock.per_step()

    return run


def trainer_side(trial: Trial, cfg: MemberConfig, batch: int, steps: int) -> Side:
    """The step behind `wsae train` and `wsae.fit`, with its metrics."""

    def run() -> float:
        rows = Rows([trial], "train", batch)
        plan = TrainConfig(members=(cfg,), tokens=batch * (steps + 1), batch_size=batch)
        state = make_member("m", cfg, plan, torch.zeros(D_IN, dtype=torch.float64), 1.0)
        train_step(state, make_batch(rows.acts(0)[0], state), 0, plan)
        start = time.perf_counter()
        for step in range(1, steps + 1):
            train_step(state, make_batch(rows.acts(step)[0], state), step, plan)
        return (time.perf_counter() - start) / steps

    return run


class SAELens:
    """The process of another interpreter that times SAELens."""

    def __init__(self, python: str, n: int, threads: int) -> None:
        script = Path(__file__).with_name("saelens_runner.py")
        sizes = ["--n", n, "--d-in", D_IN, "--d-sae", n, "--threads", threads]
        self.process = subprocess.Popen(
            [python, str(script), *map(str, sizes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.about = self._read()

    def __enter__(self) -> "SAELens":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    def side(self, batch: int, steps: int) -> Side:
        def run() -> float:
            assert self.process.stdin is not None
            self.process.stdin.write(f"{batch} {steps}\n")
            self.process.stdin.flush()
            return self._read()["seconds_per_step"]

        return run

    def _read(self) -> dict:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(
                "SAELens did not answer; does this interpreter have it? pip install sae-lens==6.54.12"
            )
        return json.loads(line)


def alternate(sides: dict[K, Side], rounds: int) -> dict[K, list[float]]:
    """Run every side once to warm up, then in turn, each round starting with another one."""
    for side in sides.values():
        side()
    found: dict[K, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            found[name].append(sides[name]())
    return found


def compare(size: Size, batch: int, lens: SAELens | None) -> None:
    """Print one batch size's table: bank, one after the other, main trainer, SAELens."""
    trials = worlds(size.n, size.levels, SEEDS)
    tied, untied = member(size.n, tied=True), member(size.n, tied=False)
    lone = next(t for t in trials if t.features.sparsity == 0.9)
    sides = {
        "tied, bank": bank_side(trials, 2, tied, batch, size.steps),
        "tied, banks of one member in turn": lone_side(lone, tied, batch, size.lone),
        "tied, main trainer": trainer_side(lone, tied, batch, size.lone),
        "untied, bank": bank_side(trials, 2, untied, batch, size.steps),
        "untied, main trainer": trainer_side(lone, untied, batch, size.lone),
    }
    if lens is not None:
        sides[f"untied, SAELens {lens.about['sae_lens']}"] = lens.side(batch, size.lone)
    found = alternate(sides, size.rounds)
    print(f"\n### Batch {batch}, {2 * len(trials)} members over {len(trials)} worlds\n")
    print("| ReLU SAE | us per SAE and step | fastest to slowest round | times the bank |")
    print("|---|--:|--:|--:|")
    for name, times in sorted(found.items(), key=lambda item: item[0].startswith("untied")):
        bank = statistics.median(found[f"{name.split(',')[0]}, bank"])
        us = [1e6 * t for t in times]
        middle = statistics.median(us)
        spread = f"{min(us):,.0f}-{max(us):,.0f}"
        print(f"| {name} | {middle:,.0f} | {spread} | {middle / bank / 1e6:.1f} |", flush=True)


def costs(size: Size, batch: int) -> dict[str, dict[int, float]]:
    """Time tied banks against n = d_sae, against d_sae alone, and against the number of members."""

    def point(n: int, d_sae: int, members: int) -> Side:
        trials = worlds(n, (0.9,), max(1, members // 2))
        each = members // len(trials)
        steps = max(3, min(400, round(size.work / members * (200 / max(n, d_sae)))))
        return bank_side(trials, each, member(d_sae, tied=True), batch, steps)

    lines = {
        "n = d_sae": {n: point(n, n, size.of_each) for n in size.widths},
        f"d_sae, n = {size.n}": {d: point(size.n, d, size.of_each) for d in size.widths},
        "members": {m: point(size.n, size.n, m) for m in size.members},
    }
    sides = {(line, x): side for line, points in lines.items() for x, side in points.items()}
    found = alternate(sides, 3 if size is FULL else 1)
    medians: dict[str, dict[int, float]] = {line: {} for line in lines}
    for (line, x), times in found.items():
        medians[line][x] = 1e6 * statistics.median(times)
    return medians


def show_costs(found: dict[str, dict[int, float]], size: Size, batch: int) -> None:
    print(f"\n### Microseconds per member and step, tied ReLU, batch {batch}\n")
    print(f"{size.of_each} members, or n = d_sae = {size.n}; S = 0.9, two members per world.")
    for line, points in found.items():
        print(f"\n| {line} |" + "".join(f" {x} |" for x in points))
        print("|---|" + "--:|" * len(points))
        print("| us |" + "".join(f" {us:,.0f} |" for us in points.values()))


def draw(found: dict[str, dict[int, float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 3.2), layout="constrained")
    axes = figure.subplots(1, len(found), sharey=True)
    for ax, (line, points) in zip(axes, found.items(), strict=True):
        ax.plot(list(points), list(points.values()), marker="o", ms=4, color="#3b4252")
        ax.set(xscale="log", yscale="log", xlabel=line)
        ax.set_xticks(list(points), [str(x) for x in points])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    low, high = axes[0].get_ylim()
    ticks = [m * 10**e for e in range(5) for m in (1, 2, 5) if low <= m * 10**e <= high]
    axes[0].set_yticks(ticks, [f"{tick:,}" for tick in ticks])
    axes[0].minorticks_off()
    axes[0].set_ylabel("us per member and step")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def hardware() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", type=int, nargs="+", default=[256, 128])
    parser.add_argument("--saelens-python", help="an interpreter that has sae-lens")
    parser.add_argument("--figure", type=Path, help="draw the costs as a PNG here")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    size = QUICK if args.quick else FULL
    began = time.perf_counter()
    print(
        f"{hardware()}, {args.threads} threads, torch {torch.__version__}, Python {platform.python_version()}"
    )
    print(f"n = d_sae = {size.n}, d_in = {D_IN}, float32")
    with ExitStack() as stack:
        lens = None
        if args.saelens_python:
            lens = stack.enter_context(SAELens(args.saelens_python, size.n, args.threads))
        for batch in args.batch:
            compare(size, batch, lens)
    found = costs(size, args.batch[0])
    show_costs(found, size, args.batch[0])
    if args.figure is not None:
        draw(found, args.figure)
    print(f"\nMeasured in {time.perf_counter() - began:.0f} s.")


if __name__ == "__main__":
    main()
