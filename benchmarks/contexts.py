"""Collection of contexts against encoding alone, on a store of real activations. Prints JSON.

    wsae harvest builtin --text builtin --hook layers.9 --tokens 50000 --heldout-tokens 60000 --out STORE
    wsae train STORE --out RUN --d-sae 4608 --k 32
    python benchmarks/contexts.py STORE --run RUN
    python benchmarks/contexts.py STORE --run RUN --index     # of every latent, as wsae serve does; and the whole index

"Encode" reads the held-out rows and encodes them with every member; "collect" does that and keeps the contexts. Both
sides alternate in one process. `ratio` is the median over rounds of encode seconds over collect seconds. Peak memory is
that of fresh processes; `member_bytes` is what the formula says one member needs.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from wsae.acts.source import HeldoutRows, StoreSource
from wsae.acts.stream import HeldOut
from wsae.acts.tokens import TokenTable
from wsae.evals.config import ContextConfig
from wsae.evals.interpret.collect import Members, collect, member_bytes
from wsae.run import Run
from wsae.sae import SAE, SAEConfig, TopK
from wsae.sae.model import Encoder
from wsae.serve.build import ensure_index
from wsae.serve.collect import Watched
from wsae.serve.collect import collect as collect_every
from wsae.serve.config import IndexConfig
from wsae.train.run import load_run


class First:
    """The first rows of a source."""

    def __init__(self, source: HeldOut, rows: int) -> None:
        self._source, self._rows, self.hooks = source, rows, source.hooks

    def heldout(self, batch_size: int) -> Iterator[HeldoutRows]:
        left = self._rows
        for x, seq, pos in self._source.heldout(batch_size):
            if left <= 0:
                return
            yield HeldoutRows(
                {hook: rows[:left] for hook, rows in x.items()}, seq[:left], pos[:left]
            )
            left -= len(seq)

    def tokens(self) -> TokenTable | None:
        return self._source.tokens()


class Training(StoreSource):
    """A store whose training rows stand for held-out ones, in the order of the text: there are more of them."""

    def heldout(self, batch_size: int) -> Iterator[HeldoutRows]:
        seq, pos = self.store.places("train")
        for first in range(0, len(seq), batch_size):
            index = np.arange(first, min(first + batch_size, len(seq)))
            yield HeldoutRows(self.store.rows("train", index), seq[index], pos[index])

    def tokens(self) -> TokenTable | None:
        return self.store.tokens("train")


def members_of(args: argparse.Namespace, source: StoreSource) -> Members:
    """Return the run's SAEs, or untrained ones of the asked size."""
    if args.run is not None:
        return load_run(args.run).saes
    return {
        hook: {"untrained": SAE(SAEConfig(d_in=d_in, d_sae=args.d_sae, activation=TopK(k=args.k)))}
        for hook, d_in in source.hooks.items()
    }


@torch.inference_mode()
def encode(source: HeldOut, members: Members, batch_size: int) -> float:
    """Return the seconds of encoding alone, by what collection encodes with."""
    start = time.perf_counter()
    encoders = {hook: [Encoder(sae) for sae in saes.values()] for hook, saes in members.items()}
    for chunk in source.heldout(batch_size):
        for hook, found in encoders.items():
            for encoder in found:
                encoder(chunk.x[hook])
    return time.perf_counter() - start


def collected(source: HeldOut, members: Members, args: argparse.Namespace) -> float:
    """Return the seconds of a whole collection."""
    start = time.perf_counter()
    if args.index:
        every = [
            Watched(number, hook, sae, torch.arange(sae.cfg.d_sae))
            for number, (hook, sae) in enumerate(
                (hook, sae) for hook, saes in members.items() for sae in saes.values()
            )
        ]
        table = source.tokens()
        assert table is not None
        found = collect_every(every, source, table, IndexConfig(batch_size=args.batch_size))
        for member in every:
            found.contexts(member.id)
    else:
        collect(source, members, config(args), args.batch_size)
    return time.perf_counter() - start


def indexed(run: Path, source: HeldOut) -> dict[str, float]:
    """Return what the whole index of a run takes: seconds, seconds of all cores together, megabytes."""
    with tempfile.TemporaryDirectory() as folder:
        start, cpu = time.perf_counter(), time.process_time()
        index, _ = ensure_index(run, Path(folder) / "x.sqlite", IndexConfig(), lambda _: source)
        return {
            "index_s": round(time.perf_counter() - start, 1),
            "index_cpu_s": round(time.process_time() - cpu, 1),
            "index_mb": round(index.stat().st_size / 1e6, 1),
        }


def config(args: argparse.Namespace) -> ContextConfig:
    return ContextConfig(n_latents=args.n_latents)


def peak_mebibytes(what: str, rows: int) -> float:
    """Return the peak memory of a fresh process that does one side once on so many rows."""
    command = [sys.executable, *sys.argv, "--peak", what, "--rows", str(rows)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Run the comparison the arguments ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("store", type=Path)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--d-sae", type=int, default=4608)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--n-latents", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=1 << 60)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--index", action="store_true")
    parser.add_argument("--training", action="store_true", help="read the store's training rows")
    parser.add_argument("--peak", choices=["encode", "collect"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    hooks = None if args.run is None else tuple(Run(args.run).members)
    store = (Training if args.training else StoreSource)(args.store, hooks)
    source, members = First(store, args.rows), members_of(args, store)
    if args.peak:
        if args.peak == "encode":
            encode(source, members, args.batch_size)
        else:
            collected(source, members, args)
        # not getrusage: its maximum outlives exec, so it would be that of the process that measures
        (peak,) = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        print(int(peak) / 1024)
        return
    encode(source, members, args.batch_size)  # warm-up
    rounds = [
        (encode(source, members, args.batch_size), collected(source, members, args))
        for _ in range(args.rounds)
    ]
    rows = min(args.rows, store.store.n_rows["train" if args.training else "heldout"])
    sizes = {sae.cfg.d_sae for saes in members.values() for sae in saes.values()}
    print(
        json.dumps(
            {
                "rows": rows,
                "d_sae": sorted(sizes),
                "members": sum(map(len, members.values())),
                "n_latents": args.n_latents,
                "threads": args.threads,
                "encode_s": round(statistics.median(e for e, _ in rounds), 3),
                "collect_s": round(statistics.median(c for _, c in rounds), 3),
                "ratio": round(statistics.median(e / c for e, c in rounds), 3),
                **(indexed(args.run, source) if args.index else {}),
                "rounds": [[round(e, 3), round(c, 3)] for e, c in rounds],
                "member_bytes": {}
                if args.index
                else {d: member_bytes(config(args), d) for d in sorted(sizes)},
                "peak_mib": {
                    what: {n: round(peak_mebibytes(what, n), 1) for n in (rows // 3, rows)}
                    for what in ("encode", "collect")
                },
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
