"""`wsae bench`: every block of a run, one after another, on rows made once."""

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from wsae.core.errors import UserError
from wsae.core.files import locked
from wsae.core.progress import Progress, quiet
from wsae.experiments.bench.config import HELDOUT, PEERS, PINS, BenchConfig, Block, blocks
from wsae.experiments.bench.data import opened, rows_for, write_array, write_mixtures
from wsae.experiments.bench.figures import need_matplotlib
from wsae.experiments.bench.files import write_files
from wsae.experiments.bench.machine import describe
from wsae.experiments.bench.process import installed
from wsae.experiments.bench.rounds import Samples, Setting, run_block
from wsae.experiments.bench.scaling import exponents, scaling_blocks
from wsae.experiments.bench.table import summarise
from wsae.ops.native import why_not

ADVICE = "pip install 'wsae[bench]', or name another interpreter with --peers-python"


def run_bench(
    cfg: BenchConfig,
    out: Path | None = None,
    progress: Progress = quiet,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure what `cfg` names and return blocks, rows, fits and the machine; with `out` write them there.

    A peer that is not installed is named in `skipped`, one that fails in its row. Raises UserError for bad input.
    """
    if out is None:
        return _run(cfg, None, progress, say)
    need_matplotlib()
    with locked(out):  # a place that cannot be written is found out first
        return _run(cfg, out, progress, say)


def _run(
    cfg: BenchConfig, out: Path | None, progress: Progress, say: Callable[[str], None]
) -> dict[str, Any]:
    begun = time.monotonic()
    found = installed(cfg.peers_python, list(PINS))
    skipped = missing(cfg, found)
    reason = why_not()
    if reason is not None:
        skipped.append(f"skipped: the compiled kernels cannot be used here ({reason})")
    todo = scaling_blocks(cfg) if cfg.scaling else blocks(cfg, set(found), reason is None)
    for line in [*skipped, *other_versions(found)]:
        say(line)
    with tempfile.TemporaryDirectory(prefix="wsae-bench-") as place:
        at = Setting(
            data=make_rows(cfg, todo, Path(place), progress),
            peers_python=cfg.peers_python or sys.executable,
            timeout_s=cfg.timeout_s,
            deadline=None if cfg.seconds is None else begun + cfg.seconds,
            seed=cfg.seed,
            say=say,
        )
        measured: list[tuple[Block, list[Samples]]] = []
        notes = {"skipped": skipped, "versions": found}
        result = _result(cfg, None, measured, notes)
        for block in todo:
            measured.append((block, run_block(block, at, progress)))
            result = _result(cfg, out, measured, notes)  # so that an end in between keeps it
    return result


def _result(
    cfg: BenchConfig,
    out: Path | None,
    measured: Sequence[tuple[Block, list[Samples]]],
    notes: dict[str, Any],
) -> dict[str, Any]:
    """Return everything measured, as the command prints it and writes it."""
    tables = [summarise(block, samples) for block, samples in measured]
    rows = [row for table in tables if table["kind"] == "scaling" for row in table["rows"]]
    fits = exponents(rows)
    ours = [r for t in tables for r in t["rows"] if r["library"] == "wsae" and r["error"]]
    result = {
        "machine": describe(),
        **notes,
        "blocks": tables,
        "scaling": fits,
        "warnings": [fit["warning"] for fit in fits if fit["warning"]],
        "errors": sum(len(table["failed"]) for table in tables),
        "failed": bool(ours),
        "config": cfg.to_dict(),
    }
    steps = [(block.kind, of) for block, samples in measured for of in samples]
    files = [] if out is None else write_files(out, result, steps, cfg.to_dict())
    return {**result, "files": files}


def missing(cfg: BenchConfig, found: dict[str, str]) -> list[str]:
    """Return a line for each peer that is wanted and not installed."""
    if cfg.scaling:
        return []
    wanted = {p.library for p in PEERS if not cfg.only or p.name in cfg.only}
    return [
        f"skipped: {name} is not installed ({ADVICE})"
        for name in PINS
        if name in wanted - set(found)
    ]


def other_versions(found: dict[str, str]) -> list[str]:
    """Return a line for each peer of another version than the drivers were written for."""
    return [
        f"{name} {version} is installed; its driver was written for {PINS[name]}"
        for name, version in found.items()
        if version != PINS[name]
    ]


def make_rows(
    cfg: BenchConfig, todo: Sequence[Block], place: Path, progress: Progress
) -> dict[int, tuple[str, int]]:
    """Write the rows that the blocks train on, one file for each width; returns width -> (file, rows)."""
    need: dict[int, int] = {}
    for block in todo:
        for size in {job.size.batch: job.size for job in block.jobs}.values():
            rows = rows_for(size.d_in, size.batch, block.steps, HELDOUT)
            need[size.d_in] = max(need.get(size.d_in, 0), rows)
    made = {}
    with progress("making activations", len(need), "files") as tick:
        for d_in, rows in need.items():
            path = place / f"rows-{d_in}"
            if cfg.acts is None:
                write_mixtures(path, rows, d_in, cfg.seed)
            else:
                rows = _real(cfg, path, d_in, rows, todo)
            made[d_in] = (str(path), rows)
            tick(1)
    return made


def _real(cfg: BenchConfig, path: Path, d_in: int, rows: int, todo: Sequence[Block]) -> int:
    """Write the rows of a file of activations, as many as it has; returns their number."""
    assert cfg.acts is not None
    source = Path(cfg.acts)
    x = opened(source)
    if x.shape[1] != d_in:
        raise UserError(
            f"--acts {source}: rows of width {x.shape[1]}, the size has d_in {d_in}; use --d-in {x.shape[1]}"
        )
    largest = max(job.size.batch for block in todo for job in block.jobs)
    if len(x) < HELDOUT + largest:
        raise UserError(
            f"--acts {source}: {len(x)} rows, at least {HELDOUT + largest} are needed; lower --batch"
        )
    rows = min(rows, len(x))
    write_array(path, source, rows, cfg.seed)
    return rows
