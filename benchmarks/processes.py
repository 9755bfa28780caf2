"""How training time changes with the number of hooks and of processes (torchrun, gloo). Prints JSON.

    python benchmarks/processes.py STORE [--hooks layers.9 layers.14] [--tokens 61440] [--rounds 3]

STORE is a harvested store with those hooks. Size of the SAEs: 8 x d_in latents, Top-k 32, batch 2,048, one member per
hook; the compiled kernels, in the last case of one hook PyTorch's. The cases take turns: `tokens_per_s` is the median
of what the runs themselves recorded (rows a second, all hooks), `process_s` of the whole commands.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple


class Case(NamedTuple):
    """One way to train."""

    name: str
    hooks: int = 1
    processes: int = 1
    threads: int = 1
    mesh: str | None = None
    kernels: str = "auto"


CASES = (
    Case("1 process, 1 thread"),
    Case("1 process, 2 threads", threads=2),
    Case("2 processes, data=2", processes=2, mesh="data=2"),
    Case("2 processes, latents=2", processes=2, mesh="latents=2"),
    Case("1 process, 1 thread, eager", kernels="eager"),
    Case("1 process, 2 threads", hooks=2, threads=2),
    Case("2 processes, layers=2", hooks=2, processes=2, mesh="layers=2"),
)


def run(store: str, hooks: list[str], tokens: int, case: Case) -> tuple[list[float], float]:
    """Return the rates that a run recorded and the command's seconds."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "run"
        words = ["train", store, "--hook", *hooks[: case.hooks], "--out", str(out), "--gamma"]
        words += ["none", "--tokens", str(tokens), "--kernels", case.kernels, "--log-every", "5"]
        words += ["--mesh", case.mesh] if case.mesh else []
        start = [sys.executable, "-m", "wsae.cli"]
        if case.mesh:
            start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            start += ["--nproc-per-node", str(case.processes), "-m", "wsae.cli"]
        env = os.environ | {"OMP_NUM_THREADS": str(case.threads)}
        begin = time.perf_counter()
        done = subprocess.run(start + words, env=env, capture_output=True, text=True, check=False)
        spent = time.perf_counter() - begin
        if done.returncode:
            raise SystemExit(f"{case.name}: {done.stderr}")
        lines = (out / "speed.jsonl").read_text().splitlines()
        return [json.loads(line)["tokens_per_s"] for line in lines], spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store")
    parser.add_argument("--hooks", nargs="+", default=["layers.9", "layers.14"])
    parser.add_argument("--tokens", type=int, default=122_880)
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    rates, seconds = defaultdict(list), defaultdict(list)
    for _ in range(args.rounds):
        for case in CASES[: None if len(args.hooks) > 1 else -2]:
            found, spent = run(args.store, args.hooks, args.tokens, case)
            rates[case] += found
            seconds[case].append(spent)
    rows = [
        {
            "hooks": case.hooks,
            "case": case.name,
            "tokens_per_s": round(statistics.median(rates[case])),
            "process_s": round(statistics.median(seconds[case]), 1),
        }
        for case in rates
    ]
    print(json.dumps({"load": os.getloadavg(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
