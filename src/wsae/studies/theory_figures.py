"""The pictures of docs/theory.md, drawn from the theory library. Needs matplotlib."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from wsae.core.progress import Progress, quiet
from wsae.core.seeds import seed_for
from wsae.studies.drawing import need_matplotlib, new_figure, save_figure
from wsae.theory.claims.minima import best_over_closed_form, turned_digons
from wsae.theory.claims.ours import (
    ACTIVE,
    alpha_norm,
    linear_program_success,
    orthogonal_rows,
    readout,
    recovered_share,
    uneven_world,
)
from wsae.theory.geometry import digons, polygon, simplex
from wsae.theory.losses import (
    closed_form,
    code,
    energy,
    grid,
    ground_truth_loss,
    sae_loss,
    superpose,
)
from wsae.theory.shrinkage import shrinkage, simplex_shrinkage

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#7d828c", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#b58900", "#56b4e9")

_SIZE = (4.6, 3.4)
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def theory_figures(place: Path, seed: int = 0, progress: Progress = quiet) -> list[Path]:
    """Write theory-NAME.png and .svg for every picture into `place` and return their paths."""
    need_matplotlib()
    import matplotlib

    written = []
    with progress("pictures", len(PICTURES), "pictures") as tick:
        for name, draw in PICTURES.items():
            with matplotlib.rc_context(_STYLE):
                figure = new_figure(*_SIZE)
                draw(figure.subplots(), seed)
                written += save_figure(figure, place / f"theory-{name}", 160)
            tick(1)
    return written


def _landscape(axes: "Axes", seed: int) -> None:  # noqa: ARG001  (nothing random)
    """Loss of c W_p^T on the triangle: c = 1 is not the minimum."""
    W_p = polygon(3)
    scales = torch.linspace(0.7, 1.5, 161, dtype=torch.float64)
    for S, colour in zip((0.2, 0.5, 0.8), COLOURS[1:], strict=False):
        features, probability = grid(3, S, 1)
        given = (W_p, features, probability)
        loss = sae_loss(scales[:, None, None] * closed_form(W_p), *given) / energy(*given)
        best = int(loss.argmin())
        axes.plot(scales, loss, color=colour, lw=1.8, label=f"S = {S:g}")
        axes.plot(scales[best], loss[best], "o", color=colour, ms=6)
    axes.axvline(1, color=COLOURS[0], lw=1, ls="--")
    axes.text(1.005, axes.get_ylim()[1] * 0.97, "$W_p^T$", color=COLOURS[0], va="top")
    _finish(axes, "Triangle: a multiple of $W_p^T$ loses less", "c in $W_m = c\\,W_p^T$")
    axes.set_ylabel("$L_{SAE}\\;/\\;E\\|x_p\\|^2$")
    axes.legend()


def _rotation(axes: "Axes", seed: int) -> None:  # noqa: ARG001  (nothing random)
    """Two digons: the loss is 0 for every rotation, the true features are found only at multiples of 90 degrees."""
    W_p = digons(2)
    features, probability = grid(4, 0.9, 4)
    degrees = torch.linspace(0, 90, 91, dtype=torch.float64)
    members = torch.stack([turned_digons(float(a)) for a in torch.deg2rad(degrees)])
    signal = float(features.square().sum(1) @ probability)
    truth = torch.stack(
        [
            ground_truth_loss(members[:, list(order)], W_p, features, probability)
            for order in itertools.permutations(range(4))
        ]
    )  # the best order of latents for each rotation is the fair comparison
    penalty = code(members, superpose(W_p, features)).sum(-1) @ probability
    own = sae_loss(members, W_p, features, probability) / signal
    axes.plot(degrees, own, color=COLOURS[2], lw=1.8, label="$L_{SAE}$")
    axes.plot(
        degrees,
        truth.amin(0) / signal,
        color=COLOURS[1],
        lw=1.8,
        label="best $L_{GT}\\,/\\,E\\|x\\|^2$",
    )
    axes.plot(degrees, penalty / penalty[0] - 1, color=COLOURS[3], lw=1.8, label="extra $l_1$ norm")
    axes.set_xticks([0, 15, 30, 45, 60, 75, 90])
    _finish(
        axes, "Two digons: reconstruction cannot choose", "rotation R in $W_m = [R; -R]$, degrees"
    )
    axes.legend()


def _shrinkage(axes: "Axes", seed: int) -> None:  # noqa: ARG001  (nothing random)
    """Shrinkage against the number of entangled features."""
    sizes = list(range(1, 9))
    for S, colour in zip((0.0, 0.5, 0.9, 0.99), COLOURS[1:], strict=False):
        ratios = [simplex_shrinkage(p, S)[0] for p in sizes]
        axes.plot(sizes, ratios, "o-", color=colour, lw=1.8, ms=4, label=f"simplex, S = {S:g}")
    planar = [3, 5, 7]
    ratios = [float(shrinkage(polygon(p), 0.5).ratio.mean()) for p in planar]
    axes.plot(planar, ratios, "s--", color=COLOURS[2], lw=1.2, ms=4, label="polygon, S = 0.5")
    axes.set_ylim(0, 1.05)
    _finish(axes, "More entangled, more shrunk: simplices only", "features in the block, p")
    axes.set_ylabel("$E[x_{m,i}]\\;/\\;E[x_i]$ where $x_i > 0$")
    axes.legend(ncols=2, fontsize=7.5)


def _limit(axes: "Axes", seed: int) -> None:
    """How much lower than W_p^T the best W_m found is, as S -> 1."""
    distances = (0.5, 0.2, 0.05, 0.01, 0.001)
    worlds = (
        ("triangle", polygon(3), 3),
        ("tetrahedron", simplex(4), 4),
        ("tetrahedron, one spare latent", simplex(4), 5),
    )
    for (name, W_p, d_sae), colour in zip(worlds, COLOURS[1:], strict=False):
        lower = [1 - best_over_closed_form(W_p, d_sae, 1 - x, seed, 12) for x in distances]
        axes.plot(distances, lower, "o-", color=colour, lw=1.8, ms=4, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.invert_xaxis()
    _finish(axes, "Towards extreme sparsity", "1 - S  (sparser to the right)")
    axes.set_ylabel("best found is lower than $W_p^T$ by")
    axes.legend(fontsize=7.5)


def _mirror(axes: "Axes", seed: int) -> None:  # noqa: ARG001  (nothing random)
    """The triangle's two solutions of Eq. 33."""
    W_p = polygon(3)
    for W_m, colour, label in (
        (closed_form(W_p), COLOURS[2], "$W_p^T$"),
        (-(2**0.5) * closed_form(W_p), COLOURS[1], "$-\\sqrt{2}\\,W_p^T$"),
    ):
        for x, y in W_m.tolist():
            arrow = {"arrowstyle": "-|>", "color": colour, "lw": 1.8, "shrinkA": 0, "shrinkB": 0}
            axes.annotate("", (x, y), (0, 0), arrowprops=arrow)
        axes.plot([], [], color=colour, lw=1.8, label=label)
    axes.set_xlim(-1.9, 1.9)
    axes.set_ylim(-1.6, 1.3)
    axes.set_aspect("equal")
    axes.set_axis_off()
    _finish(axes, "Triangle: two SAEs without 1-sparse loss")
    axes.legend(loc="lower right", title="rows of $W_m$")


def _power(axes: "Axes", seed: int) -> None:
    """How well C^-p w reads its feature: best at p = 1, in every world."""
    powers = torch.linspace(-1, 2, 61, dtype=torch.float64)
    for i, colour in zip(range(4), COLOURS[1:], strict=False):
        W_p, C = uneven_world(seed_for(seed, "filter", i))
        curve = torch.stack([readout(C, W_p[:, 0], float(p)) for p in powers])
        axes.plot(powers, curve / readout(C, W_p[:, 0], 0.0), color=colour, lw=1.8)
    for power, name in ((0.0, "plain"), (0.5, "half-whitened"), (1.0, "whitened")):
        axes.axvline(power, color=COLOURS[0], lw=0.8, ls=":")
        axes.text(power + 0.02, 0.02, name, rotation=90, fontsize=7.5, va="bottom")
    axes.set_ylim(0, None)
    _finish(axes, "Whitening is the matched filter", "power p of the readout $C^{-p}w$")
    axes.set_ylabel("correlation with the feature / plain")


def _threshold(axes: "Axes", seed: int) -> None:
    """How often a linear program that knows W_p finds x, by S."""
    success = linear_program_success(200, 20, ACTIVE, 60, seed)
    sparsity = torch.linspace(0.88, 0.999, 80, dtype=torch.float64)
    found = [recovered_share(success, 200, float(S)) for S in sparsity]
    axes.plot(sparsity, found, color=COLOURS[2], lw=1.8)
    for S in (0.9, 0.99):
        axes.axvline(S, color=COLOURS[0], lw=0.8, ls=":")
        axes.text(S - 0.002, 0.5, f"S = {S:g}", rotation=90, fontsize=7.5, ha="right", va="center")
    _finish(axes, "200 features in 20 dimensions: how sparse?", "sparsity S")
    axes.set_ylabel("x found by a program that knows $W_p$")


def _alpha(axes: "Axes", seed: int) -> None:
    """The gap's size under gamma = s^alpha for W_p with orthogonal rows: least at -1/2."""
    alphas = torch.linspace(-2, 2, 81, dtype=torch.float64)
    for i, colour in zip(range(4), COLOURS[1:], strict=False):
        W_p = orthogonal_rows(4, 9, seed_for(seed, "rows", i))
        norms = torch.tensor([alpha_norm(W_p, float(a)) for a in alphas]) / alpha_norm(W_p, 0.0)
        axes.plot(alphas, norms, color=colour, lw=1.8)
    for alpha, name in ((-0.5, "least"), (0.0, "plain"), (1.0, "the paper's")):
        axes.axvline(alpha, color=COLOURS[0], lw=0.8, ls=":")
        edge = ("top", 1) if alpha < 0 else ("bottom", 0)  # where no curve runs
        axes.text(
            alpha + 0.03, axes.get_ylim()[edge[1]], name, rotation=90, fontsize=7.5, va=edge[0]
        )
    _finish(axes, "The gap by the exponent of the variance", "alpha in $\\gamma_i = s_i^\\alpha$")
    axes.set_ylabel("least $\\|c W_p^T \\Gamma^2 W_p - I\\|$ / plain")


def _finish(axes: "Axes", title: str, x: str = "") -> None:
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.set_xlabel(x)


PICTURES: dict[str, Callable[["Axes", int], None]] = {
    "landscape": _landscape,
    "shrinkage": _shrinkage,
    "limit": _limit,
    "rotation": _rotation,
    "mirror": _mirror,
    "power": _power,
    "threshold": _threshold,
    "alpha": _alpha,
}
"""Each picture's name and how it is drawn."""
