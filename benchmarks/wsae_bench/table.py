"""From steps to the rows of a table: medians, ratios, shares of the floor, memory and fit."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from wsae.core.errors import UserError
from wsae.core.files import writing
from wsae_bench.config import FACTORS, LIMITS, Block, Job
from wsae_bench.rounds import Samples

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Pictures of a run: tokens per second beside the floor, and how cost scales. Needs matplotlib.

OURS, PEER, FLOOR = "#d55e00", "#3b4252", "#009e73"
LABELS = {"ms": "ms a step", "extra_mib": "peak memory above the imports, MiB"}


def need_matplotlib() -> None:
    """Raise UserError when matplotlib is not installed, so that no run is lost over its pictures."""
    try:
        import matplotlib.figure  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise UserError(
            "--out draws pictures: matplotlib is not installed; pip install 'wsae[report]'"
        ) from error


def speed_figure(blocks: Sequence[dict[str, Any]], path: Path) -> Path:
    """Draw each block's tokens/s as bars, ours in colour, the floor as a line; returns `path`, a PNG."""
    from matplotlib.figure import Figure

    height = sum(max(1, len(_measured(block))) for block in blocks)
    figure = Figure(figsize=(8, 0.28 * height + 0.9 * len(blocks)), layout="constrained")
    ratios = [max(1, len(_measured(block))) + 1 for block in blocks]
    axes = figure.subplots(len(blocks), 1, squeeze=False, height_ratios=ratios).flat
    for ax, block in zip(axes, blocks, strict=True):
        _bars(ax, block)
    return _save(figure, path)


def scaling_figure(fits: Sequence[dict[str, Any]], path: Path) -> Path:
    """Draw time and memory against every axis, log-log, with the fitted power; returns `path`, a PNG."""
    from matplotlib.figure import Figure

    axes_names = list(dict.fromkeys(fit["axis"] for fit in fits))
    quantities = list(dict.fromkeys(fit["quantity"] for fit in fits))
    figure = Figure(figsize=(3.4 * len(axes_names), 3.0 * len(quantities)), layout="constrained")
    grid = figure.subplots(len(quantities), len(axes_names), squeeze=False)
    for fit in fits:
        ax = grid[quantities.index(fit["quantity"]), axes_names.index(fit["axis"])]
        _power(ax, fit)
    return _save(figure, path)


def _measured(block: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in block["rows"] if "ms" in row]


def _bars(ax: "Axes", block: dict[str, Any]) -> None:
    rows = sorted(_measured(block), key=lambda row: row["tokens_per_s"])
    speeds = [row["tokens_per_s"] for row in rows]
    colours = [OURS if row["library"] == "wsae" else PEER for row in rows]
    ax.barh([row["variant"] for row in rows], speeds, color=colours)
    for place, speed in enumerate(speeds):
        ax.text(speed, place, f" {speed:,.0f}", va="center", fontsize=7)
    if block["floor_ms"] and rows:
        floor = 1e3 * rows[0]["batch"] / block["floor_ms"]
        ax.axvline(floor, color=FLOOR, ls="--", lw=1)
        ax.text(floor, len(rows) - 0.4, "floor", color=FLOOR, fontsize=7, ha="right")
    ax.set_title(block["title"], loc="left", fontsize=8)
    ax.set_xlabel("tokens/s", fontsize=8)
    ax.tick_params(labelsize=7)
    ax.spines[["top", "right"]].set_visible(False)


def _power(ax: "Axes", fit: dict[str, Any]) -> None:
    x, y = zip(*fit["points"], strict=True)
    ax.loglog(x, y, "o", color=OURS, ms=4)
    middle = (x[0] * x[-1]) ** 0.5
    height = 1.0
    for value in y:
        height *= value ** (1 / len(y))
    ends = [height * (end / middle) ** fit["exponent"] for end in (x[0], x[-1])]
    ax.loglog([x[0], x[-1]], ends, color=PEER, lw=1)
    ax.set_xticks(x, [f"{value:g}" for value in x], fontsize=7, minor=False)
    ax.set_ylim(min(y) / 1.5, max(y) * 1.5)
    ticks: list[float] = []
    for value in sorted(y):  # those too near to the one below would be printed over it
        if not ticks or value > ticks[-1] * (2.25 * max(y) / min(y)) ** 0.06:
            ticks.append(value)
    ax.set_yticks(ticks, [f"{value:,.3g}" for value in ticks], fontsize=7)
    ax.minorticks_off()
    ax.set_title(f"exponent {fit['exponent']:.2f}", loc="left", fontsize=9)
    ax.set_xlabel(fit["axis"])
    ax.set_ylabel(LABELS[fit["quantity"]], fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)


def _save(figure: Any, path: Path) -> Path:
    with writing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150, metadata={"Software": None})
    return path


PRIMITIVES = {
    "mm_fp32": "encoder product, fp32",
    "mm_bf16": "encoder product, bf16",
    "mm_int8": "encoder product, 8 bits",
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
    floors = {"floor": floor_ms(limits), "floor_8": floor_8_ms(limits)}
    rows = [row(block, s, floors) for s in samples if s.job.name != LIMITS]
    add_ratios(rows)
    failed = [f"{s.job.name}: {s.error}" for s in samples if s.error]
    return {
        "kind": block.kind,
        "title": block.title,
        "rows": rows,
        "primitives": limits,
        **{f"{name}_ms": ms for name, ms in floors.items()},
        "failed": failed,
    }


def primitives(of: Samples | None) -> dict[str, dict[str, float]]:
    """Return median and minimum of every primitive in ms, with the rate of the products in GFLOP/s."""
    if of is None or not of.steps:
        return {}
    found = {}
    size = of.job.size
    operations = 2.0 * size.batch * size.d_in * size.d_sae
    for name in (name for name in PRIMITIVES if name in of.steps[0]):
        times = [step[name] for step in of.steps]
        found[name] = {"ms": 1e3 * median(times), "min_ms": 1e3 * min(times)}
        if name in ("mm_fp32", "mm_bf16", "mm_int8", "grad_dense"):
            found[name]["gflops"] = operations / median(times) / 1e9
    return found


def floor_ms(limits: dict[str, dict[str, float]]) -> float | None:
    """Return the faster encoder product plus fused Adam over both matrices, medians in ms."""
    if not limits:
        return None
    product = min(limits["mm_fp32"]["ms"], limits["mm_bf16"]["ms"])
    return product + limits["adam_fused"]["ms"]


def floor_8_ms(limits: dict[str, dict[str, float]]) -> float | None:
    """Return the 8-bit encoder product plus fused Adam, medians in ms; None where no kernel multiplies 8 bits."""
    return limits["mm_int8"]["ms"] + limits["adam_fused"]["ms"] if "mm_int8" in limits else None


def row(block: Block, of: Samples, floors: dict[str, float | None]) -> Row:
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
        **{
            f"{name}_share": members(job) * floor / ms if floor is not None else None
            for name, floor in floors.items()
        },
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


# How the trainer's time and memory grow.

STEEP = 1.1
"""An exponent above this is worth a warning: the cost grows faster than the work."""
QUANTITIES = {"ms": "time of a step", "extra_mib": "peak memory"}


def exponents(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return, per axis and quantity, the exponent p of quantity ~ axis^p and its 95 % interval, and the points."""
    found = []
    for axis in FACTORS:
        here = [r for r in rows if r["variant"].startswith(f"{axis}=") and "ms" in r]
        for quantity, words in QUANTITIES.items():
            points = [(float(r[axis]), float(r[quantity])) for r in here if r[quantity] > 0]
            if len(points) >= 3:
                p, low, high = exponent(points)
                steep = f"{words} grows as {axis}^{p:.2f}" if p > STEEP else ""
                found.append(
                    {
                        **{"axis": axis, "quantity": quantity, "points": points},
                        **{"exponent": p, "low": low, "high": high, "warning": steep},
                    }
                )
    return found


def exponent(points: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """Return the least-squares slope of log y against log x with its 95 % interval (Student's t, n - 2)."""
    x, y = np.log(np.array(points)).T
    dx, free = x - x.mean(), len(points) - 2
    slope = float(dx @ y / (dx @ dx))
    rest = y - y.mean() - slope * dx
    error = float(np.sqrt(rest @ rest / free / (dx @ dx)))
    half = float(stats.t.ppf(0.975, free)) * error
    return slope, slope - half, slope + half


# What the command prints.


def shown(result: dict[str, Any]) -> Iterator[tuple[str, list[str], list[list[str]], list[str]]]:
    """Yield title, header and rows of every table of a run, and the lines below it."""
    measured: dict[str, dict[str, Any]] = {}
    for block in result["blocks"]:
        yield block["title"], *speeds(block), [*(f"failed: {line}" for line in block["failed"]), ""]
        if block["primitives"] and block["rows"]:
            row = block["rows"][0]
            measured.setdefault(f"primitives, size {row['size']}, threads {row['threads']}", block)
    for title, block in measured.items():
        found = block["primitives"]
        rows = [
            [
                words,
                *(_cell(found[name].get(key), form) for key, form in PRIMITIVE_COLUMNS.values()),
            ]
            for name, words in PRIMITIVES.items()
            if name in found
        ]
        for words, key in FLOORS.items():
            if block[key] is not None:
                rows.append([words, f"{block[key]:,.1f}", "", ""])
        yield title, ["primitive", *PRIMITIVE_COLUMNS], rows, [""]
    yield from by_kind(result["blocks"])
    if result["scaling"]:
        rows = [
            [
                fit["quantity"],
                fit["axis"],
                f"{fit['exponent']:.2f}",
                f"{fit['low']:.2f} to {fit['high']:.2f}",
                ", ".join(f"{x:g}: {y:,.0f}" for x, y in fit["points"]),
            ]
            for fit in result["scaling"]
        ]
        yield "how cost grows", ["cost", "against", "exponent", "95 % interval", "points"], rows, []


def by_kind(
    blocks: Sequence[dict[str, Any]],
) -> Iterator[tuple[str, list[str], list[list[str]], list[str]]]:
    """Yield a table per size: a row for each kind of SAE, a column for wsae and each library that trains it."""
    tables: dict[str, dict[str, dict[str, str]]] = {}
    for block in blocks:
        if block["kind"] == "kinds":
            kind, _, rest = block["title"].removeprefix("kinds ").partition(", ")
            cells = tables.setdefault(rest, {}).setdefault(kind, {})
            for row in block["rows"]:
                column = "wsae-eager" if row["variant"] == "wsae-eager" else row["library"]
                if "ms" in row and column not in cells:  # a library's first way is its own default
                    cells[column] = ", ".join(
                        f"{words}{_cell(row[key], form)}"
                        for words, (key, form) in KIND_CELLS.items()
                    )
    for rest, kinds in tables.items():
        columns = list(dict.fromkeys(column for cells in kinds.values() for column in cells))
        rows = [[kind, *(cells.get(c, "") for c in columns)] for kind, cells in kinds.items()]
        yield f"every kind: tokens/s, memory, FVU, L0; {rest}", ["kind", *columns], rows, [""]


KIND_CELLS = {
    "": ("tokens_per_s", ",.0f"),
    "MiB ": ("extra_mib", ",.0f"),
    "FVU ": ("fvu", ".3f"),
    "L0 ": ("l0", ".0f"),
}
FLOORS = {
    "floor: faster encoder product + fused Adam": "floor_ms",
    "8-bit floor: 8-bit encoder product + fused Adam": "floor_8_ms",
}
PRIMITIVE_COLUMNS = {
    "ms (median)": ("ms", ",.1f"),
    "min": ("min_ms", ",.1f"),
    "GFLOP/s": ("gflops", ",.0f"),
}


def speeds(block: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return a block's variants: time, speed and its ratios, memory, fit and what else the machine did."""
    ours = block["kind"] in ("families", "scaling")
    ratio, words = ("cost_of_first", "x first") if ours else ("of_fastest_peer", "x fastest peer")
    tokens = [row["fvu_tokens"] for row in block["rows"] if "ms" in row]
    columns = {
        "ms/step": ("ms", ",.1f"),
        "min-max": ("ms_min", ",.1f"),
        "tokens/s": ("tokens_per_s", ",.0f"),
        words: (ratio, ".2f"),
        "share of floor": ("floor_share", ".0%"),
        "of 8-bit floor": ("floor_8_share", ".0%"),
        "extra MiB": ("extra_mib", ",.0f"),
        "peak MiB": ("peak_mib", ",.0f"),
        "lr": ("lr", ".2e"),
        f"FVU at {max(tokens):,} tokens" if tokens else "FVU": ("fvu", ".4f"),
        "L0": ("l0", ".1f"),
        "other load": ("other_load", ".2f"),
    }
    rows = []
    for row in block["rows"]:
        cells = ["failed", *[""] * (len(columns) - 1)]
        if "ms" in row:
            cells = [_cell(row[key], form) for key, form in columns.values()]
            cells[1] += f"-{row['ms_max']:,.1f}"
        rows.append([row["variant"], *cells])
    return ["variant", *columns], rows


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
