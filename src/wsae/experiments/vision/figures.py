"""Figures 4 and 5 as panels with verdicts: differences from the plain SAE, paired by seed, with Student intervals.

The copies of the paper at hand give no number for either figure, and of Figure 5 the caption alone: compared are the
text's statement ("a notable improvement in semantic consistency") and what the captions name.
"""

from collections.abc import Sequence

from wsae.experiments.panels import Panel, Series, Verdict, judged
from wsae.experiments.sweep.table import Mean, mean_interval, select
from wsae.experiments.vision.plan import PLAIN
from wsae.experiments.vision.rows import Row

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
