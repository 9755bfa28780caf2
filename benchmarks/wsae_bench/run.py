"""`wsae bench`: every block of a run, one after another, on rows made once."""

import contextlib
import csv
import io
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from wsae.core.artifact import write_manifest
from wsae.core.errors import UserError
from wsae.core.files import locked, write_json, write_text, writing
from wsae.core.progress import Progress, quiet
from wsae.core.seeds import Permutation, seed_for
from wsae.core.tensors import mapped_npy
from wsae.kernels.native.build import why_not
from wsae_bench.config import HELDOUT, PEERS, PINS, BenchConfig, Block, blocks, scaling_blocks
from wsae_bench.rounds import Samples, Setting, installed, run_block
from wsae_bench.table import (
    exponents,
    need_matplotlib,
    scaling_figure,
    speed_figure,
    summarise,
)

# The rows that every variant trains on: a file of float32, the held-out rows first, mean |x|^2 =
# d_in.

ACTIVE = 24.0
"""Mean number of active directions of a row."""
OVERCOMPLETE = 4
MOST = 0.5
"""No direction is active more often than this."""
OFFSET, NOISE, LOUD = 0.5, 0.15, 2.5
"""Norms of the offset, of the noise and of a loud dimension, as shares of the mixture's root mean square norm."""
RARE = 64
"""One row in so many has the loud dimension, as in language models (Sun et al. 2024, "Massive activations")."""
CHUNK = 2048
LIMIT = 1 << 30
"""Bytes a file of rows may take; a longer run sees its rows again."""


def rows_for(d_in: int, batch: int, steps: int, heldout: int) -> int:
    """Return how many rows a run of so many steps needs, within the limit."""
    most = max(batch, LIMIT // (4 * d_in) - heldout)
    return heldout + min(batch * steps, most)


def write_mixtures(path: Path, rows: int, d_in: int, seed: int) -> None:
    """Write x = s (sum_j a_j D_j + o + e): 4 d_in unit directions D_j, about 24 of them active, a_j ~ U(0.5, 1.5).

    Frequencies are Zipf's, o is one fixed offset, e Gaussian noise, one dimension loud now and then; s makes the first
    chunk's mean |x|^2 d_in.
    """
    generator = torch.Generator().manual_seed(seed_for(seed, "bench", d_in))
    n = OVERCOMPLETE * d_in
    directions = torch.randn(n, d_in, generator=generator, dtype=torch.float32)
    directions /= directions.norm(dim=1, keepdim=True)
    chance = zipf(n)
    norm = float((chance.sum() * 13 / 12).sqrt())  # E a^2 = 1 + 1/12
    offset = torch.randn(d_in, generator=generator, dtype=torch.float32) * (
        OFFSET * norm / d_in**0.5
    )
    scale = 0.0
    with writing(path) as temporary, temporary.open("wb") as file:
        for first in range(0, rows, CHUNK):
            shape = (min(CHUNK, rows - first), n)
            active = torch.rand(shape, generator=generator, dtype=torch.float32) < chance
            codes = (
                torch.rand(shape, generator=generator, dtype=torch.float32).add_(0.5).mul_(active)
            )
            noise = torch.randn(shape[0], d_in, generator=generator, dtype=torch.float32) * (
                NOISE * norm / d_in**0.5
            )
            x = codes @ directions + offset + noise
            x[::RARE, 0] += LOUD * norm
            scale = scale or unit_scale(x)
            file.write((x * scale).numpy().tobytes())


def zipf(n: int) -> Float[Tensor, " n"]:
    """Return min(c / j, 0.5) for j = 1 ... n, with c so that the sum is the mean number of active directions."""
    harmonic = 1.0 / torch.arange(1, n + 1, dtype=torch.float64)
    low, high = 0.0, float(n)
    for _ in range(60):
        middle = (low + high) / 2
        enough = float((middle * harmonic).clamp(max=MOST).sum()) >= min(ACTIVE, MOST * n)
        low, high = (low, middle) if enough else (middle, high)
    return (high * harmonic).clamp(max=MOST).float()


def unit_scale(x: Float[Tensor, "rows d_in"]) -> float:
    """Return s so that the mean of |s x|^2 is d_in."""
    return float((x.shape[1] / x.double().square().sum(1).mean()).sqrt())


def write_array(path: Path, source: Path, rows: int, seed: int) -> None:
    """Write `rows` random rows of a .npy array, scaled alike; raises UserError when there are not enough."""
    x = opened(source)
    if len(x) < rows:
        raise UserError(
            f"--acts {source}: {len(x)} rows, {rows} are needed; lower --batch or --rounds"
        )
    order = Permutation(len(x), seed_for(seed, "bench", "rows"))(np.arange(rows))
    scale = 0.0
    with writing(path) as temporary, temporary.open("wb") as file:
        for first in range(0, rows, CHUNK):
            chunk = np.asarray(x[order[first : first + CHUNK]], dtype=np.float32)
            if not np.isfinite(chunk).all():
                raise UserError(f"--acts {source}: holds NaN or infinity; remove those rows")
            scale = scale or unit_scale(torch.from_numpy(chunk))
            file.write((chunk * np.float32(scale)).tobytes())


def opened(source: Path) -> np.ndarray:
    """Return a .npy matrix of floats, memory-mapped; raises UserError for anything else."""
    x = mapped_npy(source, f"--acts {source}")
    if x.ndim != 2 or x.dtype.kind != "f" or not x.size:
        raise UserError(f"--acts {source}: needed is a .npy matrix of floats, rows x d_in")
    return x


# What a run leaves: results.csv, steps.csv, bench.json and the pictures.


def write_files(
    out: Path,
    result: dict[str, Any],
    steps: Sequence[tuple[str, Samples]],
    config: dict[str, Any],
) -> list[str]:
    """Write everything of a run to `out`, the manifest last, and return the paths."""
    names = ["results.csv", "steps.csv", "bench.json"]
    write_text(out / "results.csv", table_text(results(result)))
    write_text(out / "steps.csv", table_text(step_rows(steps)))
    write_json(out / "bench.json", result)
    compared = [b for b in result["blocks"] if b["kind"] in ("speed", "kinds", "fit")]
    if any("ms" in row for block in compared for row in block["rows"]):
        names.append(speed_figure(compared, out / "speed.png").name)
    if result["scaling"]:
        names.append(scaling_figure(result["scaling"], out / "scaling.png").name)
    write_manifest(out, "bench", config, names, info=result["machine"])
    return [str(out / name) for name in names]


def results(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one row for each variant and setting, with the hardware beside it."""
    return [
        {
            **result["machine"],
            **row,
            **{key: block[key] for key in ("floor_ms", "floor_8_ms")},
            "block": block["kind"],
        }
        for block in result["blocks"]
        for row in block["rows"]
    ]


def step_rows(steps: Sequence[tuple[str, Samples]]) -> list[dict[str, Any]]:
    """Return every measured step of every job."""
    return [
        {
            "block": kind,
            "variant": of.job.name,
            "size": of.job.size.name,
            "dtype": of.job.dtype,
            "threads": of.job.threads,
            "lr": of.built.get("lr"),
            **step,
        }
        for kind, of in steps
        for step in of.steps
    ]


def table_text(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows as CSV; the columns are all keys in order of appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


# What was measured on: processor, memory, versions and commit.

BF16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""Features of a processor that multiplies bf16 itself; others emulate it, several times slower than fp32."""
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


def describe(root: Path | None = None) -> dict[str, str]:
    """Return the processor's name, those of its features that matter here, cores, memory, Python and commit."""
    model, flags = processor()
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": model,
        "flags": " ".join(flag for flag in FLAGS if flag in flags),
        "cores": str(os.cpu_count() or 1),
        "memory_gib": f"{pages / 2**30:.0f}",
        "python": platform.python_version(),
        "commit": commit(root or Path(__file__).resolve().parent),
    }


def native_dtypes() -> tuple[str, ...]:
    """Return the number formats this processor multiplies without emulation."""
    return ("float32", "bfloat16") if processor()[1] & BF16 else ("float32",)


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, frozenset[str]]:
    """Return the processor's name and its feature flags, as the kernel tells them."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine(), frozenset()
    pairs = (line.partition(":") for line in reversed(lines))
    fields = {name.strip(): value.strip() for name, _, value in pairs}
    return fields.get("model name", platform.machine()), frozenset(fields.get("flags", "").split())


def commit(start: Path) -> str:
    """Return the commit checked out around `start`, or "unknown"; changes beside it are not seen."""
    for place in (start, *start.parents):
        if (place / ".git").exists() and (place / "src" / "wsae").is_dir():
            words = ["git", "-C", str(place), "rev-parse", "--verify", "--quiet", "HEAD"]
            with contextlib.suppress(OSError):  # git may not be there
                done = subprocess.run(words, capture_output=True, text=True, check=False)
                return done.stdout.strip() or "unknown"
    return "unknown"


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
            peers_python=str(cfg.peers_python or sys.executable),
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
    source = cfg.acts
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
