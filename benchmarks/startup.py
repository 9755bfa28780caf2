"""Start-up times: `import wsae` beyond PyTorch, and `wsae --help`. Run: .venv/bin/python benchmarks/startup.py.

Each round runs every case once, so that a busy machine slows all of them alike; medians are shown.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

PYTHON = sys.executable
CASES = {
    "python -c pass": [PYTHON, "-c", "pass"],
    "import torch": [PYTHON, "-c", "import torch"],
    "import torch, wsae": [PYTHON, "-c", "import torch, wsae"],
    "import torch, wsae.fit": [PYTHON, "-c", "import torch, wsae; wsae.fit"],
    "wsae --help": [PYTHON, "-m", "wsae.cli", "--help"],
    "wsae train --help": [PYTHON, "-m", "wsae.cli", "train", "--help"],
}


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(args.rounds + 1):  # the first round fills the disk cache
        for name, command in CASES.items():
            times[name].append(seconds(command))
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    beyond = {
        f"{name} beyond torch": medians[name] - medians["import torch"]
        for name in ("import torch, wsae", "import torch, wsae.fit")
    }
    if args.json:
        print(json.dumps(medians | beyond, indent=1))
        return
    for name, value in (medians | beyond).items():
        print(f"{name:<36}{1000 * value:8.0f} ms")


if __name__ == "__main__":
    main()
