"""Write src/wsae/interop/releases.yaml: SAELens' registry, its ids folded into patterns.

    python benchmarks/interop_fixtures/make_releases.py pretrained_saes.yaml > src/wsae/interop/releases.yaml

Only what wsae can open is kept. Ids that differ in some tokens alone become one line if together they are a product of
these tokens' values; paths are written in terms of the id's values, or as a list of their own.
"""

import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml

from wsae.interop.releases import LOADERS, expanded

HEAD = """\
# Published SAEs, under the names of SAELens' registry ({version}); used where the package sae-lens is not installed.
# {{a,b}} and {{0..3}} in an id stand for each value; {{1}} in a path for the value of the id's first braces, any other
# braces there for one value an id. Made by benchmarks/interop_fixtures/make_releases.py.
"""
VERSION = "6.54.12"
_TOKEN = re.compile(r"\d+|[A-Za-z]+|[^A-Za-z\d]")
Box = list[list[str]]


def boxes(ids: list[str]) -> list[Box]:
    """Return products of token values that together are exactly these ids."""
    shapes: dict[int, list[Box]] = defaultdict(list)
    for one in ids:
        tokens = _TOKEN.findall(one)
        shapes[len(tokens)].append([[token] for token in tokens])
    found = []
    for n, parts in shapes.items():
        for axis in reversed(range(n)):
            merged: dict[str, Box] = {}
            for box in parts:
                key = repr(box[:axis] + box[axis + 1 :])
                if key in merged:
                    merged[key][axis] += box[axis]
                else:
                    merged[key] = box
            parts = list(merged.values())
        found += parts
    return found


def pattern(values: list[str]) -> str:
    """Return a token that stands for these values."""
    if len(values) == 1:
        return values[0]
    if all(v.isdecimal() for v in values):
        parts: list[list[int]] = []
        for number in map(int, values):
            if parts and number == parts[-1][-1] + 1:
                parts[-1].append(number)
            else:
                parts.append([number])
        values = [f"{p[0]}..{p[-1]}" if len(p) > 2 else ",".join(map(str, p)) for p in parts]
    return f"{{{','.join(values)}}}"


def sorted_box(box: Box) -> Box:
    """Return a box whose numbers are in order."""
    return [
        sorted(v, key=lambda x: (not x.isdecimal(), int(x) if x.isdecimal() else 0, x)) for v in box
    ]


def path_pattern(paths: list[str], groups: list[list[str]]) -> str | None:
    """Return a pattern for the paths of a box's ids, `groups` being the ids' values; None where they differ in form."""
    split = [_TOKEN.findall(path) for path in paths]
    if len({len(tokens) for tokens in split}) > 1:
        return None
    out = ""
    for column in zip(*split, strict=True):
        values = list(column)
        same = next((k for k, group in enumerate(groups, 1) if group == values), None)
        if len(set(values)) == 1:
            out += values[0]
        else:
            out += f"{{{same}}}" if same else f"{{{','.join(values)}}}"
    return out


def entries(saes: list[dict[str, Any]]) -> list[dict[str, Any] | str]:
    """Return the lines of a release."""
    by_id = {sae["id"]: sae for sae in saes}
    lines: list[dict[str, Any] | str] = []
    for found in boxes(list(by_id)):
        box = sorted_box(found)
        name = "".join(pattern(values) for values in box)
        ids = expanded(name)
        picked = [by_id[one] for one in ids]
        tokens = [_TOKEN.findall(one) for one in ids]
        groups = [[t[i] for t in tokens] for i, values in enumerate(box) if len(values) > 1]
        path = path_pattern([str(sae["path"]) for sae in picked], groups)
        factors = [sae.get("norm_scaling_factor") for sae in picked]
        if path is None or (any(factors) and not all(factors)):
            lines += [line for one in picked for line in entries([one])]
        elif ids == [str(sae["path"]) for sae in picked] and not any(factors):
            lines.append(name)
        else:
            line: dict[str, Any] = {"id": name, "path": path}
            if any(factors):
                listed = ",".join(f"{factor!r}" for factor in factors)
                line["norm_scaling_factor"] = factors[0] if len(factors) == 1 else f"{{{listed}}}"
            lines.append(line)
    return lines


def main() -> None:
    """Write the table."""
    registry = yaml.load(Path(sys.argv[1]).read_text(), Loader=yaml.CSafeLoader)
    kept = {}
    for name, release in registry.items():
        loader = release.get("conversion_func") or "sae_lens"
        if loader not in LOADERS:
            continue
        keep = {
            k: release[k]
            for k in ("model", "repo_id", "conversion_func", "config_overrides")
            if release.get(k)
        }
        saes = release["saes"]
        if loader == "llama_scope":  # its files say the factor
            saes = [{k: v for k, v in sae.items() if k != "norm_scaling_factor"} for sae in saes]
        kept[name] = {**keep, "saes": entries(saes)}
    sys.stdout.write(HEAD.format(version=VERSION))
    for name, release in kept.items():
        sys.stdout.write(f"{name}:\n")
        for key, value in release.items():
            if key != "saes":
                sys.stdout.write(f"  {key}: {flow(value)}\n")
        sys.stdout.write("  saes:\n")
        for line in release["saes"]:
            sys.stdout.write(f"  - {flow(line)}\n")


def flow(value: object) -> str:
    """Return a value as YAML of one line."""
    text = yaml.safe_dump(value, sort_keys=False, width=10**6, default_flow_style=True)
    return text.removesuffix("...\n").strip()


if __name__ == "__main__":
    main()
