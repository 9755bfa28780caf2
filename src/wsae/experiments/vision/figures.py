"""Figures 4 and 5 as panels with verdicts: differences from the plain SAE, paired by seed, with Student intervals.

The copies of the paper at hand give no number for either figure, and of Figure 5 the caption alone: compared are the
text's statement ("a notable improvement in semantic consistency") and what the captions name.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wsae.core.files import read_json
from wsae.evals.glossary import CLASS_SCORES
from wsae.experiments.engine import Row, Table
from wsae.experiments.figures import Panel, Series, Verdict, judged
from wsae.experiments.sweep.table import Mean, mean_interval, select
from wsae.experiments.vision.config import PLAIN, BackboneRun, Weighting
from wsae.report.panel_figures import panels_figure

# One row per SAE or control: what it is, how well it reconstructs, how its latents go with the
# classes. JSON-ready.

WAYS = ("all", "matched", "density", "adjusted", "within", "images")
"""Over what a member is compared with the plain one (`wsae.evals.classes.run`)."""


def run_rows(planned: BackboneRun, path: Path) -> list[Row]:
    """Return the rows of one finished run: its members, then its controls."""
    hook = planned.hook
    gamma = read_json(path / "gamma.json")[hook]
    metrics = read_json(path / "evaluation" / "evaluation.json")["hooks"][hook]["members"]
    scores = read_json(path / "classes" / "classes.json")["hooks"][hook]
    base = {"backbone": planned.backbone, "hook": hook, "seed": planned.seed}
    rows = []
    for weighting in planned.weightings:
        name = weighting.label
        found = metrics[name]["metrics"]
        row = base | _about(weighting) | _flat(scores["members"][name])
        row |= {"fvu": found["fvu"]["value"], "fvu_weighted": found["fvu_weighted"]["value"]}
        row["effective_dimensions"] = gamma[name]["effective_dimensions"]
        rows.append(row | {"differences": _differences(scores["comparisons"], name)})
    for name, entry in scores["controls"].items():
        rows.append(base | {"member": name, "proxy": "control"} | _flat(entry))
    return rows


def _about(weighting: Weighting) -> Row:
    alpha = 0.0 if weighting.proxy == "none" else weighting.alpha
    return {"member": weighting.label, "proxy": weighting.proxy, "alpha": alpha}


def _flat(entry: Row) -> Row:
    """Return the means of the scores by name, beside the whole entry."""
    means = {name: score["value"] for name, score in entry["scores"].items()}
    coverage = {f"share_{key}": value for key, value in entry["coverage"].items()}
    return means | coverage | {"ncl_minibatch": entry["ncl"]["minibatch"], "classes": entry}


def _differences(lines: list[Row], member: str) -> dict[str, dict[str, Row]]:
    """Return score -> way -> the member minus the plain one."""
    out: dict[str, dict[str, Row]] = {}
    for line in lines:
        if line["a"] == member and line["b"] == PLAIN and line["over"] in WAYS:
            part = {key: line[key] for key in ("difference", "low", "high", "n")}
            out.setdefault(line["metric"], {})[line["over"]] = part
    return out


WSAE = "consistency-a1"
"""The paper names no alpha for Figure 4; 1 is its choice elsewhere."""
TOP = "top-a1"
NEGLIGIBLE = 0.005
"""A difference under half a point is not called an effect, however sure it is."""
READINGS = {
    "consistency_ncl": "all active latents, as NCL's code counts",
    "consistency_top": "the strongest samples of each latent, as the paper words it",
    "consistency_corrected": "less chance, latents with enough support",
}
"""The readings of "semantic consistency" that are judged, each on its own."""
PROXIES = {
    "consistency": "consistency",
    "top": "consistency of the strongest images",
    "variance": "variance",
}
COMPARABLE, FAR = 0.1, 0.5
"""Relative differences in reconstruction error called comparable, and no longer comparable (as for Figure 3c)."""


def figure4(rows: Sequence[Row]) -> list[Panel]:
    """Return, for every backbone, hook and reading, SAE against WSAE (alpha 1)."""
    return [
        _sae_against_wsae(select(rows, backbone=backbone, hook=hook), f"{backbone}, {hook}", score)
        for score in READINGS
        for backbone, hook in places(rows)
    ]


def _sae_against_wsae(rows: list[Row], where: str, score: str) -> Panel:
    found = paired(rows, WSAE, score)
    pair = [over_seeds(rows, name, score) for name in (PLAIN, WSAE)]
    controls = dict.fromkeys(row["member"] for row in select(rows, proxy="control"))
    names = {PLAIN: "SAE", WSAE: "WSAE", TOP: "WSAE, weights from the strongest images"}
    names |= {name: name for name in controls}
    means = {shown: over_seeds(rows, name, score) for name, shown in names.items()}
    ours = f"{_pair(pair)}{points(found)}{_chance(rows, score)}"
    return Panel(
        panel=f"4: {where}",
        score=score,
        paper="WSAE notably above SAE",
        ours=ours,
        verdict=_verdict([found]),
        series=tuple(_series(shown, [(0.0, mean)]) for shown, mean in means.items() if mean),
    )


def figure5(rows: Sequence[Row]) -> list[Panel]:
    """Return (a) consistency against alpha, (b) by proxy, (c) the reconstruction error against alpha."""
    panels = []
    for backbone, hook in places(rows):
        here = select(rows, backbone=backbone, hook=hook)
        if len(_alphas(here)) > 2:
            where = f"{backbone}, {hook}"
            panels += [_against_alpha(here, where, score) for score in READINGS]
            panels += [_by_proxy(here, where, score) for score in READINGS]
            panels.append(_error(here, where))
    order = ("5a", "5b", "5c")
    return sorted(panels, key=lambda panel: order.index(panel.panel[:2]))


def _against_alpha(rows: list[Row], where: str, score: str) -> Panel:
    names = _alphas(rows)
    found = {a: paired(rows, name, score) for a, name in names.items() if a > 0}
    shown = "; ".join(f"alpha {a:g}: {points(d).strip(' :')}" for a, d in found.items())
    line = [(a, mean) for a, name in names.items() if (mean := over_seeds(rows, name, score))]
    return Panel(
        panel=f"5a: {where}",
        score=score,
        paper="(caption only) consistency under different alpha; above alpha 0 by Figure 4",
        ours=shown,
        verdict=_verdict(list(found.values())),
        series=(_series("WSAE (alpha 0: SAE)", line),),
    )


def _by_proxy(rows: list[Row], where: str, score: str) -> Panel:
    names = [PLAIN, *(f"{proxy}-a1" for proxy in PROXIES)]
    found = {name: paired(rows, name, score) for name in names[1:]}
    shown = "; ".join(f"{name}: {points(d).strip(' :')}" for name, d in found.items())
    places = enumerate(names)
    line = [(float(i), mean) for i, name in places if (mean := over_seeds(rows, name, score))]
    return Panel(
        panel=f"5b: {where}",
        score=score,
        paper="(caption only) SAE beside WSAEs by semantic consistency and by variance; both above it by Figure 4",
        ours=shown,
        verdict=_verdict([found["consistency-a1"], found["variance-a1"]]),
        series=(_series("SAE and WSAEs, alpha 1", line),),
    )


def _error(rows: list[Row], where: str) -> Panel:
    names = _alphas(rows)
    lines = {
        key: [(a, mean) for a, name in names.items() if (mean := over_seeds(rows, name, key))]
        for key in ("fvu", "fvu_weighted")
    }
    base = lines["fvu"][0][1].value
    ratios = {a: mean.value / base - 1 for a, mean in lines["fvu"] if a > 0}
    worst = max(abs(ratio) for ratio in ratios.values())
    verdict = "reproduced" if worst < COMPARABLE else "partly" if worst < FAR else "not reproduced"
    shown = ", ".join(f"alpha {a:g}: {ratio:+.1%}" for a, ratio in ratios.items())
    return Panel(
        panel=f"5c: {where}",
        score="fvu",
        paper="(caption only) SAE reconstruction error under different alpha; taken as comparable, as in Figure 3(c)",
        ours=f"plain FVU {base:.3f} at alpha 0; {shown}",
        verdict=verdict,
        series=(
            _series("plain FVU", lines["fvu"]),
            _series("FVU under the member's own weights", lines["fvu_weighted"]),
        ),
    )


def places(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Return backbones and hooks in order."""
    return list(dict.fromkeys((row["backbone"], row["hook"]) for row in rows))


def over_seeds(rows: Sequence[Row], member: str, score: str) -> Mean | None:
    """Return the mean of a score over a member's seeds; None where some seed has none."""
    values = [row[score] for row in select(rows, member=member)]
    return mean_interval(values) if values and None not in values else None


def paired(rows: Sequence[Row], member: str, score: str) -> Mean | None:
    """Return the mean over seeds of (member - plain); None where some seed lacks either."""
    plain = {row["seed"]: row[score] for row in select(rows, member=PLAIN)}
    found = [(row[score], plain.get(row["seed"])) for row in select(rows, member=member)]
    if not found or any(None in pair for pair in found):
        return None
    return mean_interval([float(a) - float(b) for a, b in found if b is not None])


def points(found: Mean | None) -> str:
    """Return ": +1.2 points [0.3, 2.1] over 3 seeds"."""
    if found is None:
        return ": not scored"
    span = ""
    if found.low is not None and found.high is not None:
        span = f" [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
    return f": {100 * found.value:+.1f} points{span} over {found.n} seeds"


def _verdict(differences: Sequence[Mean | None]) -> Verdict:
    found = [difference for difference in differences if difference is not None]
    return (
        judged(found, lower_is_claimed=False, negligible=NEGLIGIBLE) if found else "not reproduced"
    )


def _pair(pair: list[Mean | None]) -> str:
    shown = [
        f"{name} {100 * mean.value:.1f} %"
        for name, mean in zip(("SAE", "WSAE"), pair, strict=True)
        if mean
    ]
    return ", ".join(shown)


def _chance(rows: list[Row], score: str) -> str:
    """Return what the shuffled classes give for the same score, where that control was scored."""
    mean = over_seeds(rows, "control-shuffled", score)
    return "" if mean is None else f"; shuffled classes {100 * mean.value:.1f} %"


def _alphas(rows: Sequence[Row]) -> dict[float, str]:
    """Return alpha -> member, the plain SAE at 0."""
    found = {row["alpha"]: row["member"] for row in rows if row["proxy"] in ("none", "consistency")}
    return dict(sorted(found.items()))


def _series(method: str, line: list[tuple[float, Mean]]) -> Series:
    return Series(
        method=method,
        levels=tuple(level for level, _ in line),
        mean=tuple(mean.value for _, mean in line),
        low=tuple(mean.low for _, mean in line),
        high=tuple(mean.high for _, mean in line),
        n=max((mean.n for _, mean in line), default=0),
    )


# Pictures of Figures 4 and 5.

_AXES = {
    "5a": "alpha",
    "5b": "weights by",
    "5c": "alpha",
}


def draw(name: str, panels: Sequence[Panel], out: Path) -> list[Path]:
    """Draw a figure's panels; returns the paths of its pictures."""
    if name == "figure4":
        return panels_figure(_figure4(panels), out / name, "embeddings", 3)
    paths = []
    for part, xlabel in _AXES.items():
        shown = [_drawn(panel) for panel in panels if panel.panel.startswith(part)]
        if shown:
            paths += panels_figure(shown, out / f"{name}{part[1:]}", xlabel, 3)
    return paths


def _figure4(panels: Sequence[Panel]) -> list[dict[str, Any]]:
    """Return a panel for each reading: SAE, WSAE and controls at every backbone and hook."""
    out = []
    for score, words in READINGS.items():
        mine = [panel for panel in panels if panel.score == score]
        lines: dict[str, dict[str, Any]] = {}
        for place, panel in enumerate(mine):
            for series in panel.series:
                line = lines.setdefault(
                    series.method,
                    {"method": series.method, "levels": [], "mean": [], "low": [], "high": []},
                )
                line["levels"].append(place)
                for key in ("mean", "low", "high"):
                    line[key].append(getattr(series, key)[0])
        ticks = [
            f"{panel.panel.partition(': ')[2]}\n{panel.verdict}".replace(", ", "\n")
            for panel in mine
        ]
        title = words[0].upper() + words[1:]
        series = list(lines.values())
        out.append({"title": title, "ylabel": "consistency", "series": series, "ticks": ticks})
    return out


def _drawn(panel: Panel) -> dict[str, Any]:
    part, _, where = panel.panel.partition(": ")
    words = READINGS.get(panel.score, "reconstruction error")
    found: dict[str, Any] = {
        "title": f"({part[1:]}) {where}: {words}\n{panel.verdict}",
        "ylabel": "consistency" if panel.score in READINGS else "FVU",
        "series": [line.to_dict() for line in panel.series],
        "bottom": min(min(line.mean) for line in panel.series if line.mean),
    }
    if part == "5b":
        found["ticks"] = ["SAE", *(word.replace(" of ", "\nof ") for word in PROXIES.values())]
    return found


# Tables of Figures 4 and 5 as header and rows of text; scores in percent, intervals over seeds.

NONE = "-"
COLUMNS = {
    "NCL": "consistency_ncl",
    "one mini-batch": "ncl_minibatch",
    "top": "consistency_top",
    "corrected": "consistency_corrected",
    "selectivity": "selectivity",
    "alive": "share_alive",
    "supported": "share_supported",
}


def tables(rows: Sequence[Row]) -> dict[str, Table]:
    """Return every table by title, backbone by backbone and hook by hook."""
    out = {}
    for backbone, hook in places(rows):
        here = select(rows, backbone=backbone, hook=hook)
        out[f"{backbone}, {hook}: semantic consistency in %, mean over seeds"] = _scores(here)
        out[f"{backbone}, {hook}: weighted minus plain, points (information in bits)"] = _gains(
            here
        )
    return out


def _scores(rows: list[Row]) -> Table:
    body = []
    for name in dict.fromkeys(row["member"] for row in rows):
        cells = [_cell(over_seeds(rows, name, key), 100.0) for key in COLUMNS.values()]
        bits = _cell(over_seeds(rows, name, "information"), 1.0, ".4f")
        trained = "fvu" in select(rows, member=name)[0]
        others = ("fvu", "fvu_weighted", "effective_dimensions")
        shown = [
            _cell(over_seeds(rows, name, key), 1.0, ".4g") if trained else NONE for key in others
        ]
        body.append([name, *cells, bits, *shown])
    header = ["", *COLUMNS, "information, bits", "FVU", "weighted FVU", "effective dimensions"]
    return {"header": header, "rows": body}


def _gains(rows: list[Row]) -> Table:
    body = []
    members = dict.fromkeys(row["member"] for row in rows if row.get("differences"))
    for name in members:
        mine = select(rows, member=name)
        for score in CLASS_SCORES:
            form = (1.0, "+.4f") if score == "information" else (100.0, "+.1f")
            found = ([row["differences"][score].get(way) for row in mine] for way in WAYS)
            cells = [_over_seeds(list(parts), *form) for parts in found]
            body.append([name, score, *cells])
    return {"header": ["", "score", *WAYS], "rows": body}


def _over_seeds(found: list[Row | None], scale: float, form: str) -> str:
    """Return the mean difference over seeds with Student's interval; one seed keeps its own interval."""
    values = [part["difference"] for part in found if part and part["difference"] is not None]
    if not found or len(values) < len(found):
        return NONE
    if len(values) == 1 and found[0]:
        return _cell(Mean(values[0], found[0]["low"], found[0]["high"], 1), scale, form)
    return _cell(mean_interval(values), scale, form)


def _cell(mean: Mean | None, scale: float, form: str = ".1f") -> str:
    if mean is None:
        return NONE
    shown = f"{scale * mean.value:{form}}"
    if mean.low is None or mean.high is None:
        return shown
    return f"{shown} [{scale * mean.low:{form}}, {scale * mean.high:{form}}]"
