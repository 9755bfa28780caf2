"""What a run leaves: results.csv, steps.csv, bench.json and the pictures."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wsae.core.artifact import write_manifest
from wsae.core.files import write_json, write_text
from wsae.experiments.bench.figures import scaling_figure, speed_figure
from wsae.experiments.bench.rounds import Samples

HARDWARE = ("cpu", "flags", "cores", "memory_gib", "python", "commit")


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
    """Return one row for each variant and setting, with the hardware beside it; the floor is a row of its own."""
    machine = {key: result["machine"][key] for key in HARDWARE}
    rows = []
    for block in result["blocks"]:
        for row in block["rows"]:
            floor = {"floor_ms": block["floor_ms"], "block": block["kind"]}
            rows.append({**machine, **row, **floor})
    return rows


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
