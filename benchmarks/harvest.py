"""Harvest speed against the bare model's forward, and peak memory against the number of tokens. Prints JSON.

    python benchmarks/harvest.py --model builtin --hook layers.9 --dtype float32 --rounds 5 --tokens 16384

"Bare" is the model's forward pass on ready-made token ids, stopped after the same module, with nothing read or
written. Both sides alternate in one process. `ratio` is the median harvest rate over the median bare rate, where the
harvest's clock runs from its first to its last step; `fixed_s` is what remains of its whole time (calibration, files,
token strings), which does not grow with the number of tokens.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from wsae.acts.capture import one_hook
from wsae.acts.config import HarvestConfig
from wsae.acts.harvest import harvest
from wsae.acts.language import LanguageModel, load_language
from wsae.acts.text import Packer


class Stop(Exception):  # noqa: N818
    """Ends the bare forward."""


class Clock:
    """A progress callback that notes when each step was handed over."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.tokens: list[int] = []

    @contextmanager
    def __call__(self, task: str, total: int | None, unit: str, done: int = 0) -> Iterator:  # noqa: ARG002
        yield self.tick

    def tick(self, n: int, **fields: float | str) -> None:  # noqa: ARG002
        """Note one step."""
        self.times.append(time.perf_counter())
        self.tokens.append(n)


def bare(language: LanguageModel, hook: str, batches: list[torch.Tensor]) -> float:
    """Return tokens per second of the model alone."""

    def stop(*_: object) -> None:
        raise Stop

    module = language.model.get_submodule(one_hook(language.model, hook).path)
    handle = module.register_forward_hook(stop)
    start = time.perf_counter()
    with torch.inference_mode():
        for ids in batches:
            with suppress(Stop):
                language.model(input_ids=ids, use_cache=False)
    seconds = time.perf_counter() - start
    handle.remove()
    return sum(ids.numel() for ids in batches) / seconds


def harvested(language: LanguageModel, cfg: HarvestConfig) -> tuple[float, float]:
    """Return tokens per second (special and first ones included, as on the bare side) and the fixed seconds."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        harvest(cfg, Path(folder) / "store", clock, language)
        whole = time.perf_counter() - start
    steps = len(clock.times) - 1
    seconds = clock.times[-1] - clock.times[0]
    rate = steps * cfg.batch_seqs * cfg.seq_len / seconds
    return rate, whole - seconds * (steps + 1) / steps


def ready_ids(language: LanguageModel, cfg: HarvestConfig) -> list[torch.Tensor]:
    """Return the batches that the harvest runs, as tensors."""
    sequences = Packer(cfg, language.tokenizer, heldout=False).sequences()
    count = max(2, cfg.tokens // (cfg.seq_len * cfg.batch_seqs))
    return [
        torch.from_numpy(np.stack([s.ids for s in islice(sequences, cfg.batch_seqs)])).long()
        for _ in range(count)
    ]


def peak_mebibytes(args: argparse.Namespace, tokens: int) -> float:
    """Return the peak resident memory of a fresh process that harvests so many tokens."""
    command = [sys.executable, __file__, "--peak", "--tokens", str(tokens)]
    command += [
        "--model",
        args.model,
        "--hook",
        args.hook,
        "--dtype",
        args.dtype,
        "--shard-tokens",
        "4096",
    ]
    command += ["--threads", str(args.threads)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Run the comparison the arguments ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--hook", default="layers.9")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--shard-tokens", type=int, default=65_536)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--peak",
        action="store_true",
        help="harvest once and print this process's peak memory in MiB",
    )
    parser.add_argument(
        "--memory",
        type=int,
        nargs="*",
        default=[8_192, 32_768],
        help="token counts for peak memory",
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cfg = HarvestConfig(
        model=args.model,
        hooks=(args.hook,),
        dtype=args.dtype,
        tokens=args.tokens,
        heldout_tokens=0,
        shard_tokens=args.shard_tokens,
    )
    language = load_language(cfg.model, cfg.dtype)
    if args.peak:
        harvested(language, cfg)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    batches = ready_ids(language, cfg)
    bare(language, args.hook, batches[:2])  # warm-up
    pairs = [
        (bare(language, args.hook, batches), *harvested(language, cfg)) for _ in range(args.rounds)
    ]
    base, rate, fixed = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(
        json.dumps(
            {
                "model": args.model,
                "hook": args.hook,
                "dtype": args.dtype,
                "threads": args.threads,
                "tokens": args.tokens,
                "bare_tokens_per_s": round(base, 1),
                "harvest_tokens_per_s": round(rate, 1),
                "ratio": round(statistics.median(r / b for b, r, _ in pairs), 4),
                "fixed_s": round(fixed, 2),
                "rounds": [[round(b, 1), round(r, 1)] for b, r, _ in pairs],
                "peak_mib": {n: round(peak_mebibytes(args, n), 1) for n in args.memory},
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
