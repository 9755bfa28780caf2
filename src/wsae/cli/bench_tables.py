"""Cells of the tables of `wsae bench`."""

from collections.abc import Sequence
from typing import Any

Table = tuple[list[str], list[list[str]]]


def speed(block: dict[str, Any]) -> Table:
    """Return a block's variants: time, speed and its ratios, memory, fit and what else the machine did."""
    families = block["kind"] in ("families", "kinds", "scaling")
    header = ["variant", "ms/step", "min-max", "tokens/s"]
    header += ["x first" if families else "x fastest peer", "share of floor"]
    header += ["extra MiB", "peak MiB", "lr", _fvu_title(block), "L0", "other load"]
    ratio = "cost_of_first" if families else "of_fastest_peer"
    return header, [_speed_row(row, ratio, len(header)) for row in block["rows"]]


def primitives(block: dict[str, Any]) -> Table:
    """Return the machine's primitives in the order of a step."""
    from wsae.experiments.bench.table import PRIMITIVES

    rows = [
        [
            words,
            f"{found['ms']:,.1f}",
            f"{found['min_ms']:,.1f}",
            _cell(found.get("gflops"), ",.0f"),
        ]
        for name, words in PRIMITIVES.items()
        if (found := block["primitives"].get(name))
    ]
    floor = ["floor: faster encoder product + fused Adam", f"{block['floor_ms']:,.1f}", "", ""]
    return ["primitive", "ms (median)", "min", "GFLOP/s"], [*rows, floor]


def scaling(fits: Sequence[dict[str, Any]]) -> Table:
    """Return the fitted exponents with their intervals."""
    header = ["cost", "against", "exponent", "95 % interval", "points"]
    rows = [
        [
            fit["quantity"],
            fit["axis"],
            f"{fit['exponent']:.2f}",
            f"{fit['low']:.2f} to {fit['high']:.2f}",
            ", ".join(f"{x:g}: {y:,.0f}" for x, y in fit["points"]),
        ]
        for fit in fits
    ]
    return header, rows


def _speed_row(row: dict[str, Any], ratio: str, width: int) -> list[str]:
    if "ms" not in row:
        return [row["variant"], "failed", *[""] * (width - 2)]
    return [
        row["variant"],
        f"{row['ms']:,.1f}",
        f"{row['ms_min']:,.1f}-{row['ms_max']:,.1f}",
        f"{row['tokens_per_s']:,.0f}",
        _cell(row[ratio], ".2f"),
        _cell(row["floor_share"], ".0%"),
        f"{row['extra_mib']:,.0f}",
        f"{row['peak_mib']:,.0f}",
        _cell(row["lr"], ".2e"),
        _cell(row["fvu"], ".4f"),
        _cell(row["l0"], ".1f"),
        f"{row['other_load']:.2f}",
    ]


def _fvu_title(block: dict[str, Any]) -> str:
    tokens = [row["fvu_tokens"] for row in block["rows"] if "ms" in row]
    return f"FVU at {max(tokens):,} tokens" if tokens else "FVU"


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
