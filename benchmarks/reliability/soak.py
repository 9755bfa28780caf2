"""A long run at small size: do memory and open files of the process stay flat?

    python -m benchmarks.reliability.soak --out soak [--hours 2] [--evaluations 200] [--only train|evaluate|read]

A few seconds of the same config on one thread give its rate; then one `wsae train` (checkpoints and metrics at their
usual intervals) makes the steps that take --hours at that rate, and one process evaluates the run --evaluations times.
Resident memory and open files of each are read from /proc every --every seconds. After the first --warmup of the
samples, the slope of each is fitted with an interval (blocks of samples as one: neighbours are not independent).
"""

import argparse
import json
import math
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.reliability.common import PYTHON, WSAE, environment, write

D_IN, D_SAE, K, BATCH, ROWS = 32, 128, 8, 256, 60_000
BLOCKS = 20
FLAT_MB_PER_HOUR = 1.0
EVALUATE = """
import sys
from wsae.cli.main import main
for i in range(int(sys.argv[2])):
    code = main(["evaluate", sys.argv[1], "--json", "--seed", str(i), "--draws", "20"])
    assert code == 0, code
"""


def data(path: Path) -> Path:
    """Write the activations: sparse non-negative features through a random matrix."""
    rng = np.random.default_rng(0)
    features = rng.random((ROWS, 64)) * (rng.random((ROWS, 64)) < 0.06)
    directions = rng.standard_normal((64, D_IN))
    np.save(path, (features @ directions).astype(np.float32))
    return path


def train(array: Path, out: Path, steps: int) -> list[str]:
    """Return the command that makes a number of steps."""
    words = {"--d-sae": D_SAE, "--k": K, "--batch-size": BATCH, "--alpha": 1}
    words["--tokens"] = steps * BATCH
    flags = [str(word) for pair in words.items() for word in pair]
    return [*WSAE, "train", str(array), "--out", str(out), "--device", "cpu", *flags]


def rate(array: Path, out: Path, seconds: float) -> float:
    """Return the steps per second of the command alone, start-up left out."""
    steps = 2000
    timed(array, out, steps)  # the first start reads everything from the disk
    few, start_up = steps, timed(array, out, steps)
    while (took := timed(array, out, steps := 2 * steps)) < start_up + seconds / 2:
        pass
    return (steps - few) / (took - start_up)


def timed(array: Path, out: Path, steps: int) -> float:
    """Return the seconds that the command takes for a number of steps, in a directory of its own."""
    place = out / "rate"
    shutil.rmtree(place, ignore_errors=True)
    begin = time.perf_counter()
    subprocess.run(
        train(array, place, steps),
        env=environment(),
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return time.perf_counter() - begin


def watch(command: list[str], log: Path, every: float) -> list[dict[str, float]]:
    """Run a command to its end; return its resident memory, threads and open files over time."""
    samples: list[dict[str, float]] = []
    begin = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment(), stdout=file, stderr=file)
    with log.with_suffix(".samples.jsonl").open("w") as kept:
        while process.poll() is None:
            found = sample(process.pid)
            if found:
                samples.append({"s": round(time.monotonic() - begin, 1), **found})
                kept.write(json.dumps(samples[-1]) + "\n")
                kept.flush()
            time.sleep(every)
    if process.returncode:
        raise SystemExit(f"{command}: ended with {process.returncode}; see {log}")
    return samples


def sample(pid: int) -> dict[str, float]:
    """Return resident memory (MB), open files and threads of a process; nothing when it has just ended."""
    place = Path(f"/proc/{pid}")
    try:
        status = dict(
            line.split(":", 1)
            for line in (place / "status").read_text().splitlines()
            if ":" in line
        )
        files = len(list((place / "fd").iterdir()))
        return {
            "rss_mb": int(status["VmRSS"].split()[0]) / 1024,
            "anon_mb": int(status["RssAnon"].split()[0]) / 1024,
            "files": files,
            "threads": int(status["Threads"]),
        }
    except (OSError, KeyError):
        return {}


def slope(samples: list[dict[str, float]], name: str, warmup: float) -> dict[str, float]:
    """Return the slope per hour after warm-up, with a 95 % interval from means of blocks, and the range."""
    kept = samples[int(warmup * len(samples)) :]
    blocks = np.array_split(np.arange(len(kept)), min(BLOCKS, len(kept)))
    hours = np.array([np.mean([kept[i]["s"] / 3600 for i in block]) for block in blocks])
    values = np.array([np.mean([kept[i][name] for i in block]) for block in blocks])
    centred = hours - hours.mean()
    per_hour = float(centred @ values / (centred @ centred))
    rest = values - values.mean() - per_hour * centred
    error = math.sqrt(float(rest @ rest) / (len(values) - 2) / float(centred @ centred))
    low, high = per_hour - 2.1 * error, per_hour + 2.1 * error
    of = [s[name] for s in kept]
    return {
        "per_hour": per_hour, "low": low, "high": high,
        "first": float(values[0]), "last": float(values[-1]), "min": min(of), "max": max(of),
    }  # fmt: skip


def verdict(samples: list[dict[str, float]], warmup: float) -> dict[str, Any]:
    """Return slopes and whether both are flat: neither is shown to grow, or memory by less than FLAT_MB_PER_HOUR."""
    memory, files = slope(samples, "rss_mb", warmup), slope(samples, "files", warmup)
    still = memory["low"] <= 0 or memory["high"] < FLAT_MB_PER_HOUR
    return {
        "hours": samples[-1]["s"] / 3600,
        "samples": len(samples),
        "rss_mb": memory,
        "files": files,
        "flat": still and (files["low"] <= 0 or files["last"] < files["first"] + 0.5),
    }


def train_part(args: argparse.Namespace) -> dict[str, Any]:
    """Make the steps and return what was seen of the process."""
    array = data(args.out / "acts.npy")
    steps_per_s = args.rate or rate(array, args.out, 20.0)
    steps = max(1, round(3600 * args.hours * steps_per_s))
    print(f"{steps_per_s:.0f} steps/s alone on one thread: {steps} steps", flush=True)
    watch(train(array, args.out / "run", steps), args.out / "train.log", args.every)
    return {"steps_per_s_alone": steps_per_s}


def evaluate_part(args: argparse.Namespace) -> None:
    """Evaluate a finished run again and again in one process."""
    runs = (args.out / name for name in ("run", "rate"))
    run = next(path for path in runs if (path / "manifest.json").exists())
    command = [PYTHON, "-c", EVALUATE, str(run), str(args.evaluations)]
    watch(command, args.out / "evaluate.log", args.every / 5)


def seen(out: Path, warmup: float, since: float, until: float) -> dict[str, Any]:
    """Return the verdicts on a directory's samples between two times, also while its training goes on."""
    found: dict[str, Any] = {}
    for name in ("train", "evaluate"):
        path = out / f"{name}.samples.jsonl"
        if path.exists():
            samples = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = verdict([x for x in samples if since <= x["s"] <= until], warmup)
    metrics = out / "run" / "metrics.jsonl"
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - 4096))
        found["steps"] = json.loads(file.read().splitlines()[-1])["step"]
    checkpoints = sorted(path.name for path in (out / "run" / "checkpoints").glob("*"))
    return found | {"finished": (out / "run" / "manifest.json").exists(), "kept": checkpoints}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--rate", type=float, help="steps per second; none means measured first")
    parser.add_argument("--evaluations", type=int, default=200)
    parser.add_argument("--every", type=float, default=5.0)
    parser.add_argument("--warmup", type=float, default=0.2)
    parser.add_argument("--only", choices=("train", "evaluate", "read"), help="a part; read: none")
    parser.add_argument("--since", type=float, default=0.0, help="samples from this second on")
    parser.add_argument("--until", type=float, default=math.inf)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    told: dict[str, Any] = {}
    if args.only in (None, "train"):
        told = train_part(args)
    if args.only in (None, "evaluate"):
        evaluate_part(args)
    write(args.out / "soak.json", told | seen(args.out, args.warmup, args.since, args.until))


if __name__ == "__main__":
    main()
