"""How training time changes with the number of hooks and of processes (torchrun, gloo, one thread each). Prints JSON.

    python benchmarks/processes.py STORE [--hooks layers.9 layers.14] [--tokens 61440]

STORE is a harvested store with those hooks. Size of the SAEs: 8 x d_in latents, Top-k 32, batch 2,048, one member per
hook. `tokens_per_s` is the median of what the run itself recorded (rows a second, all hooks), `process_s` the whole
command. One process uses the compiled kernels (`native`) or PyTorch's (`eager`), several use PyTorch's.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MESHES: dict[str, tuple[int, str | None]] = {
    "1 process": (1, None),
    "2 processes, data=2": (2, "data=2"),
    "2 processes, latents=2": (2, "latents=2"),
    "2 processes, layers=2": (2, "layers=2"),
}


def run(store: str, hooks: list[str], tokens: int, kind: str) -> dict[str, float | str]:
    processes, mesh = MESHES.get(kind, (1, None))
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "run"
        words = ["train", store, "--hook", *hooks, "--out", str(out), "--gamma", "none"]
        words += ["--tokens", str(tokens), *(["--mesh", mesh] if mesh else [])]
        alone = [sys.executable, "-m", "wsae.cli"]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        torchrun += ["--nproc-per-node", str(processes), "-m", "wsae.cli"]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        if kind.endswith("eager"):
            env["WSAE_NATIVE"] = "0"
        begin = time.perf_counter()
        command = (torchrun if mesh else alone) + words
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        spent = time.perf_counter() - begin
        if done.returncode:
            return {"error": done.stderr.strip().splitlines()[-1]}
        lines = (out / "speed.jsonl").read_text().splitlines()
        rates = [json.loads(line)["tokens_per_s"] for line in lines]
        return {"tokens_per_s": statistics.median(rates), "process_s": spent}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store")
    parser.add_argument("--hooks", nargs="+", default=["layers.9", "layers.14"])
    parser.add_argument("--tokens", type=int, default=122_880)
    args = parser.parse_args()
    cases = [(args.hooks[:1], "1 process"), (args.hooks[:1], "1 process, eager")]
    cases += [(args.hooks[:1], kind) for kind in ("2 processes, data=2", "2 processes, latents=2")]
    cases += [(args.hooks, kind) for kind in ("1 process", "1 process, eager")]
    cases += [(args.hooks, "2 processes, layers=2")]
    rows = [
        {"hooks": len(hooks), "case": kind, **run(args.store, hooks, args.tokens, kind)}
        for hooks, kind in cases
    ]
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
