"""The report's key figure as a picture for documents: members side by side, with intervals. Needs matplotlib."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from wsae.core.errors import UserError
from wsae.core.files import writing
from wsae.report.rundata import RunData, finite, is_control, read_run
from wsae.report.words import weighting

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#7d828c", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#b58900", "#56b4e9")
"""Grey for the plain twin, then Okabe and Ito's colours, which the colour-blind can tell apart."""
_FLOOR = -5.0
"""log10 of the density below which latents are drawn together."""


def summary_figure(run: Path, path: Path, hook: str | None = None) -> Path:
    """Write one PNG comparing a run's members at a hook (the first by default) and return its path.

    Panels: FVU with 95 % intervals, gamma by rank of input variance, density histograms; training curves of FVU stand
    in for what was not evaluated. Raises UserError when the run or the hook is missing or matplotlib is not installed.
    """
    data = read_run(Path(run))
    hook = data.hooks[0] if hook is None else hook
    if hook not in data.hooks:
        raise UserError(f"{run}: has no hook '{hook}' (it has {', '.join(data.hooks)})")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("matplotlib is not installed; pip install 'wsae[report]'") from error
    panels = [draw for draw, there in _panels(data, hook) if there]
    if not panels:
        raise UserError(f"{run}: has neither metrics nor an evaluation of '{hook}' to draw")
    figure = Figure(figsize=(4.1 * len(panels), 3.7), layout="constrained")
    for draw, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        draw(axes, data, hook)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    with writing(Path(path)) as temporary:
        figure.savefig(temporary, format="png", dpi=160, metadata={"Software": None})
    return Path(path)


def _panels(run: RunData, hook: str):
    evaluated = bool(run.evaluated(hook).get("members"))
    has = {
        name: any(key.startswith(f"{hook}|") and key.endswith(f"|{name}") for key in run.arrays)
        for name in ("gamma", "density")
    }
    yield _fvu, evaluated
    yield _gamma, has["gamma"]
    yield _training, bool(run.metrics.get(hook)) and not has["density"]
    yield _density, has["density"]


def _trained(run: RunData, hook: str) -> list[tuple[str, str, str]]:
    """Return (member, colour, label) of the trained members."""
    names = [name for name in run.members(hook) if not is_control(name)]
    return [
        (name, COLOURS[i % len(COLOURS)], _label(run, hook, name)) for i, name in enumerate(names)
    ]


def _label(run: RunData, hook: str, member: str) -> str:
    return (
        member if run.is_plain(hook, member) else weighting(run.gamma_record(hook, member), member)
    )


def _fvu(axes: "Axes", run: RunData, hook: str) -> None:
    members = run.evaluated(hook)["members"]
    for place, (name, colour, _) in enumerate(_trained(run, hook)):
        metrics = members.get(name, {}).get("metrics", {})
        for key, filled, shift in (("fvu", True, -0.12), ("fvu_weighted", False, 0.12)):
            record = metrics.get(key, {})
            value, low, high = (finite(record.get(part)) for part in ("value", "low", "high"))
            if value is None:
                continue
            spread = None if low is None or high is None else [[value - low], [high - value]]
            face = colour if filled else "white"
            axes.errorbar(
                value, place + shift, xerr=spread, fmt="o", color=colour, mfc=face, ms=6, capsize=4
            )
    axes.set_yticks(range(len(_trained(run, hook))), [name for name, *_ in _trained(run, hook)])
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.margins(y=0.25)
    axes.set_title("Held-out error, 95 % intervals", loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel("FVU (● plain, ○ under its own γ)")


def _gamma(axes: "Axes", run: RunData, hook: str) -> None:
    for name, colour, label in _trained(run, hook):
        gamma, variance = run.array(hook, name, "gamma"), run.array(hook, name, "input_variance")
        if gamma is not None:
            order = np.argsort(-(gamma if variance is None else variance), kind="stable")
            axes.loglog(np.arange(1, len(gamma) + 1), gamma[order], color=colour, lw=2, label=label)
    axes.set_title("Loss weight of each dimension", loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel("rank by input variance")
    axes.set_ylabel("γ")


def _density(axes: "Axes", run: RunData, hook: str) -> None:
    for name, colour, label in _trained(run, hook):
        density = run.array(hook, name, "density")
        if density is not None:
            alive = np.log10(density[density > 0])
            bins = np.arange(_FLOOR, 0.01, 0.2).tolist()
            axes.hist(
                np.clip(alive, _FLOOR, 0),
                bins=bins,
                histtype="step",
                lw=1.8,
                color=colour,
                label=label,
            )
    axes.set_title("How often latents fire", loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel("log₁₀ density (share of rows)")
    axes.set_ylabel("latents")


def _training(axes: "Axes", run: RunData, hook: str) -> None:
    for name, colour, label in _trained(run, hook):
        rows = run.metrics.get(hook, {}).get(name, [])
        pairs = [(row.get("tokens"), finite(row.get("fvu"))) for row in rows]
        kept = [(x, y) for x, y in pairs if x is not None and y is not None]
        axes.plot([x for x, _ in kept], [y for _, y in kept], color=colour, lw=1.8, label=label)
    axes.set_yscale("log")
    axes.set_title("Training", loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel("training rows")
    axes.set_ylabel("plain FVU")
