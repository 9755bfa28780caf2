"""SIGKILL at random moments of every stage, from harvest to the browser's index, then the same command again.

    python -m benchmarks.reliability.crash [--kills 200] [--seed 0] [--stages ...] [--out crash.json]

A tiny model, text and encoder are made; every stage runs once undisturbed (its time T and its files are the reference)
and once more (its files must be the same: else nothing could be compared). Then, in turn, each stage's output is
removed and its command is started and killed at a time drawn evenly from [0, T]; a kill counts when the process had not
ended. The same command follows, killed again with probability 1/3, until it ends by itself. Its files must then be the
reference's byte for byte, with none missing, none left over. Training writes a checkpoint after every step here, so
that kills land in checkpoints too. Not compared: see LEFT_OUT in world.py.
"""

import argparse
import os
import random
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.reliability.common import write
from benchmarks.reliability.world import (
    OUTPUTS,
    Reference,
    commands,
    contents,
    finish,
    forget,
    prepare,
    restored,
    start,
    undisturbed,
)

AGAIN = 1 / 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", nargs="*", choices=OUTPUTS, default=list(OUTPUTS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    prepare()
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        result = matrix(at, undisturbed(at), args.kills, args.seed, args.stages)
    write(args.out, result)
    raise SystemExit(1 if result["differ"] else 0)


def matrix(
    at: Path, reference: Reference, kills: int, seed: int, stages: list[str]
) -> dict[str, Any]:
    """Kill in whole rounds over the stages until there are `kills`; return the counts and what differed."""
    pick, begin = random.Random(seed), time.monotonic()
    counts: dict[str, Counter[str]] = {stage: Counter() for stage in stages}
    chosen = {stage: words for stage, words in commands(at).items() if stage in stages}
    differ: list[dict[str, Any]] = []
    for stage, words in chosen.items():
        with restored(at, stage):
            forget(at, stage)
            finish(words, at / "log")
            differ += compare(at, stage, reference[stage][1], ["never killed"])
    while not differ and sum(c["kills"] for c in counts.values()) < kills:
        for stage, words in chosen.items():
            seconds, expected = reference[stage]
            with restored(at, stage):
                moments = trial(at, stage, words, seconds, pick)
                differ += compare(at, stage, expected, moments)
            counts[stage].update(trials=1, kills=len(moments))
    return {
        "kills": sum(c["kills"] for c in counts.values()),
        "by_stage": {stage: dict(c) for stage, c in counts.items()},
        "seconds_undisturbed": {stage: round(v[0], 3) for stage, v in reference.items()},
        "files_compared": {stage: len(v[1]) for stage, v in reference.items()},
        "differ": differ,
        "seed": seed,
        "minutes": round((time.monotonic() - begin) / 60, 2),
    }


def trial(at: Path, stage: str, words: list[str], seconds: float, pick: random.Random) -> list[Any]:
    """Kill one stage at a random moment, perhaps again, then let it end; return the moments of the kills."""
    forget(at, stage)
    moments: list[Any] = []
    while not moments or pick.random() < AGAIN:
        child, moment = start(words, at / "log"), pick.random() * seconds
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status):
            moments.append(round(moment, 4))
        elif status:
            raise SystemExit(f"{stage}: status {status}\n{(at / 'log').read_text()[-2000:]}")
        else:  # it had ended: draw again from the start, or leave it finished
            if moments:
                break
            forget(at, stage)
    finish(words, at / "log")
    return moments


def compare(at: Path, stage: str, expected: dict[str, bytes], moments: list[Any]) -> list[Any]:
    """Return how a stage's files differ from the reference, if they do."""
    found = contents(at / OUTPUTS[stage])
    changed = [name for name in expected if name in found and found[name] != expected[name]]
    missing, more = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if not (changed or missing or more):
        return []
    return [
        {"stage": stage, "kills": moments, "changed": changed, "missing": missing, "more": more}
    ]


if __name__ == "__main__":
    main()
