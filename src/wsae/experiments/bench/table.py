"""From steps to the rows of a table: medians, ratios, shares of the floor, memory and fit."""

from collections.abc import Sequence
from statistics import median
from typing import Any

from wsae.experiments.bench.config import LIMITS, Block, Job
from wsae.experiments.bench.rounds import Samples

PRIMITIVES = {
    "mm_fp32": "encoder product, fp32",
    "mm_bf16": "encoder product, bf16",
    "cast_to_bf16": "cast batch and weights to bf16",
    "topk": "torch.topk of the whole product",
    "embedding_bag": "sparse decode (embedding_bag)",
    "grad_sparse_csr": "weight gradient as a CSR product",
    "grad_dense": "weight gradient as a dense product",
    "copy_matrix": "copy of one weight matrix",
    "adam_fused": "fused Adam, both matrices",
    "adam_foreach": "foreach Adam, both matrices",
}
Row = dict[str, Any]


def summarise(block: Block, samples: Sequence[Samples]) -> dict[str, Any]:
    """Return a block's rows, its primitives in ms and its floor."""
    limits = primitives(next((s for s in samples if s.job.name == LIMITS), None))
    floor = floor_ms(limits)
    rows = [row(block, s, floor) for s in samples if s.job.name != LIMITS]
    add_ratios(rows)
    failed = [f"{s.job.name}: {s.error}" for s in samples if s.error]
    return {
        "kind": block.kind,
        "title": block.title,
        "rows": rows,
        "primitives": limits,
        "floor_ms": floor,
        "failed": failed,
    }


def primitives(of: Samples | None) -> dict[str, dict[str, float]]:
    """Return median and minimum of every primitive in ms, with the rate of the products in GFLOP/s."""
    if of is None or not of.steps:
        return {}
    found = {}
    size = of.job.size
    operations = 2.0 * size.batch * size.d_in * size.d_sae
    for name in PRIMITIVES:
        times = [step[name] for step in of.steps]
        found[name] = {"ms": 1e3 * median(times), "min_ms": 1e3 * min(times)}
        if name in ("mm_fp32", "mm_bf16", "grad_dense"):
            found[name]["gflops"] = operations / median(times) / 1e9
    return found


def floor_ms(limits: dict[str, dict[str, float]]) -> float | None:
    """Return the faster encoder product plus fused Adam over both matrices, medians in ms."""
    if not limits:
        return None
    product = min(limits["mm_fp32"]["ms"], limits["mm_bf16"]["ms"])
    return product + limits["adam_fused"]["ms"]


def row(block: Block, of: Samples, floor: float | None) -> Row:
    """Return one job's row; without measured steps it holds names and the error only."""
    job, size = of.job, of.job.size
    found: Row = {
        "variant": job.name,
        "library": job.variant.library,
        "version": of.built.get("version", ""),
        "torch": of.built.get("torch", ""),
        "size": size.name,
        **{"d_in": size.d_in, "d_sae": size.d_sae, "k": size.k, "batch": size.batch},
        **{"members": members(job), "dtype": job.dtype, "threads": job.threads},
        "lr": of.built.get("lr"),
        "error": of.error,
    }
    if not of.steps:
        return found
    wall = [step["s"] for step in of.steps]
    ms = 1e3 * median(wall)
    base = of.built["base_mib"]
    return found | {
        "steps": len(wall),
        "ms": ms,
        "ms_min": 1e3 * min(wall),
        "ms_max": 1e3 * max(wall),
        "cpu_ms": 1e3 * median(step["cpu_s"] for step in of.steps),
        "tokens_per_s": 1e3 * size.batch / ms,
        "floor_share": members(job) * floor / ms if floor is not None else None,
        "other_load": median(step["other_load"] for step in of.steps),
        "peak_mib": of.peak_mib,
        "extra_mib": of.peak_mib - base,
        "fvu": of.fit.get("fvu"),
        "l0": of.fit.get("l0"),
        "fvu_tokens": of.trained * size.batch,
        "block": block.kind,
    }


def members(job: Job) -> int:
    """Return how many SAEs the job trains at once."""
    return int(job.variant.settings.get("members", 1))


def add_ratios(rows: Sequence[Row]) -> None:
    """Add to each row its speed relative to the block's fastest peer and to its first row, in place."""
    measured = [r for r in rows if "ms" in r]
    peers = [r["tokens_per_s"] for r in measured if r["library"] != "wsae"]
    for r in measured:
        r["of_fastest_peer"] = r["tokens_per_s"] / max(peers) if peers else None
        r["cost_of_first"] = r["ms"] / measured[0]["ms"]
