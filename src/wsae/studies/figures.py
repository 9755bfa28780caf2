"""Figures 2 and 3 of the paper: one sweep over toy models, panels with verdicts (Section 5.1, Appendix B.3).

The paper prints curves, no numbers, so what is compared is its statements. Figure 3 is tried under every reading of
what the paper leaves open too: the features' importances, the optimiser, the SAE's form and start, and how long it
trains; L_GT may compare latent i with feature i as written (Eq. 10), or match them first. Beside WSAE with the paper's
raw weights stand WSAE with mean weight 1, and the plain SAE at WSAE's loss scale: what both share is not due to
weighting.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, Literal

from wsae.core.config import Config
from wsae.sae.config import GammaConfig
from wsae.studies.engine import (
    Mean,
    Panel,
    Reproduction,
    Row,
    Series,
    Table,
    as_series,
    cell,
    comparable,
    differences,
    judged,
    mean_interval,
    rank_correlation,
    select,
    series,
    span,
    steps_down,
)
from wsae.studies.sweep import CLOSED_FORM, RANDOM, run_sweep
from wsae.studies.sweep_config import (
    LR,
    PLAIN,
    SCALED,
    UNIT,
    WSAE,
    Preset,
    ToySweepConfig,
    methods,
    paper_method,
    preset_training,
    toy_sweep,
)
from wsae.toy.config import (
    Anisotropic,
    DecayingImportance,
    EqualImportance,
    Isotropic,
    Noise,
)

LOW = 0.5
"""Sparsity levels up to this are the paper's "relatively low"."""
NEGLIGIBLE = 0.01
"""A relative difference under 1 % is not called an effect, however sure it is."""

ACTIVATED = {
    "activated_sum": "summed response above 1 (Appendix B.3)",
    "activated_mean": "mean response above 0.05",
    "activated_relative": "mean response above a tenth of the strongest",
    "activated_participation": "participation ratio (no threshold)",
}


def figure2(rows: Sequence[Row]) -> list[Panel]:
    """Return Figure 2, average activated features against S, in four readings of "activated".

    The paper states no threshold. The random SAE beside it shows what a score does without any training.
    """
    return [_figure2_panel(rows, score, words) for score, words in ACTIVATED.items()]


def _figure2_panel(rows: Sequence[Row], score: str, words: str) -> Panel:
    lines = _lines(rows, (PLAIN, WSAE, RANDOM, CLOSED_FORM), score)
    plain, random = lines[0], next(line for line in lines if line.method == RANDOM)
    rho = rank_correlation(plain.levels, plain.mean)
    control = rank_correlation(random.levels, random.mean)
    down, steps = steps_down(plain.mean), len(plain.mean) - 1
    lowest = min(range(steps + 1), key=lambda i: plain.mean[i])
    ours = (
        f"{plain.mean[0]:.3g} at S = {plain.levels[0]:g}, lowest {plain.mean[lowest]:.3g} at {plain.levels[lowest]:g}, "
        f"{plain.mean[-1]:.3g} at {plain.levels[-1]:g}; "
        f"falls in {down} of {steps} steps (Spearman {rho:+.2f}); untrained SAE {control:+.2f}"
    )
    verdict = "reproduced" if down == steps else "partly" if rho < -0.8 else "not reproduced"
    return Panel(
        panel=f"2: {words}",
        score=score,
        paper="a clear decrease with S",
        ours=ours,
        verdict="opposite" if rho > 0.8 else verdict,
        series=lines,
    )


def _lines(rows: Sequence[Row], names: Sequence[str], score: str) -> tuple[Series, ...]:
    """Return a line for each of the methods that there are."""
    there = [name for name in names if select(rows, method=name)]
    return tuple(as_series(name, series(rows, name, score)) for name in there)


_PANELS = (
    ("3a", "gt_{}", "WSAE lower when S is low", True),
    ("3b", "gt_{}_active", "on non-zero features: WSAE lower when S is low, by more", True),
    ("3c", "sae_loss", "SAE and WSAE comparable", None),
    ("3d", "latent_variance_mean", "WSAE higher when S is low", False),
)


def figure3(rows: Sequence[Row], loss: str = "raw") -> list[Panel]:
    """Return Figure 3's panels: SAE, WSAE and controls, judged on WSAE minus SAE, paired by seed, at S <= 0.5.

    `loss` reads L_GT as "raw" (Eq. 10 as written), "matched" or "scaled".
    """
    return [
        _figure3_panel(rows, name, score.format(loss), paper, lower)
        for name, score, paper, lower in _PANELS
    ]


def _figure3_panel(
    rows: Sequence[Row], name: str, score: str, paper: str, lower: bool | None
) -> Panel:
    low = relative(rows, WSAE, PLAIN, score)
    levels = [level for level in low if level <= LOW] or list(low)[:1]
    found = [low[level] for level in levels]
    mean = mean_interval([d.value for d in found]).value
    largest = max(found, key=lambda d: abs(d.value))
    every = mean_interval([d.value for d in low.values()]).value
    return Panel(
        panel=name,
        score=score,
        paper=paper,
        ours=(
            f"WSAE differs by {mean:+.2%} on average over S <= {levels[-1]:g}, "
            f"at most {largest.value:+.2%}{span(largest, 1.0, '+.2%')}"
        ),
        verdict=comparable(abs(every)) if lower is None else judged(found, lower, NEGLIGIBLE),
        series=_lines(rows, (PLAIN, WSAE, UNIT, SCALED), score),
    )


def relative(rows: Sequence[Row], method: str, against: str, score: str) -> dict[float, Mean]:
    """Return level -> (method - against) / mean of against, paired by seed."""
    base = series(rows, against, score)
    found = {}
    for level, mean in differences(rows, method, against, score).items():
        by = abs(base[level].value) or 1.0
        low, high = (None if edge is None else edge / by for edge in (mean.low, mean.high))
        found[level] = Mean(mean.value / by, low, high, mean.n)
    return found


# Figure 3 under every reading of what the paper leaves open.

SGD_LR = 3e-3
"""The largest of 1e-4, 3e-4, 1e-3, 3e-3, 1e-2 at which gradient descent is stable at every S."""
SHORT = 0.1
"""Length of a short training, as a share of the long one."""


class Reading(Config):
    """One combination of what the paper leaves open."""

    importance: Literal["equal", "decay"]
    optimizer: Literal["adam", "sgd"]
    form: Literal["tied", "tied, small start", "untied"]
    """tied: unit rows at the start. small start: rows of length 0.1. untied: with biases, unit decoder rows."""
    length: Literal["long", "short"]

    @property
    def label(self) -> str:
        """A short name."""
        return f"{self.importance} importance, {self.optimizer}, {self.form}, {self.length}"


def all_readings() -> Iterator[Reading]:
    """Yield every combination."""
    forms = ("tied", "tied, small start", "untied")
    choices = product(("equal", "decay"), ("adam", "sgd"), forms, ("long", "short"))
    for importance, optimizer, form, length in choices:
        yield Reading(importance=importance, optimizer=optimizer, form=form, length=length)


def reading_sweep(reading: Reading, preset: Preset, seed: int) -> ToySweepConfig:
    """Return the sweep of one reading."""
    base = toy_sweep(preset, seed)
    long = base.training.bank.steps if preset == "tiny" else 3000
    steps = long if reading.length == "long" else max(1, round(SHORT * long))
    form: dict[str, Any] = {"tied": reading.form != "untied"}
    if reading.form == "tied, small start":
        form["init_scale"] = 0.1
    lr = LR if reading.optimizer == "adam" else SGD_LR
    decay = DecayingImportance(last=0.01)
    levels = base.sparsities if preset == "tiny" else (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99)
    return base.model_copy(
        update={
            "importance": decay if reading.importance == "decay" else EqualImportance(),
            "sparsities": levels,
            "seeds": min(3, base.seeds),
            "methods": methods(base.n_features, lr=lr, **form),
            "training": preset_training(preset, steps=steps, optimizer=reading.optimizer),
        }
    )


def run_readings(at: Reproduction) -> list[dict[str, Any]]:
    """Run every reading (each kept in its own directory of `at.out`) and return one summary per reading."""
    found = []
    for i, reading in enumerate(all_readings()):
        at.say(f"reading {i + 1}: {reading.label}")
        cfg = reading_sweep(reading, at.preset, at.seed)
        place, toys = at.out / f"reading-{i:02d}", at.out / f"toy-{reading.importance}"
        rows = run_sweep(cfg, place, at.device, at.progress, toys)
        found.append({**reading.to_dict(), "label": reading.label, **_summary(rows)})
    return found


def _summary(rows: list[Row]) -> dict[str, Any]:
    """Return what one reading says of each panel: relative differences at low S, and verdicts."""
    plain = series(rows, PLAIN, "activated_sum")
    out: dict[str, Any] = {
        "figure 2": rank_correlation(list(plain), [m.value for m in plain.values()]),
        "settled": max(row.get("loss_still_falling", 0.0) for row in rows),
    }

    def low(method: str, score: str) -> list[Mean]:
        found = relative(rows, method, PLAIN, score)
        return [d for level, d in found.items() if level <= LOW]

    for panel, pattern, _, lower in _PANELS:
        for loss in ("raw", "matched") if "{}" in pattern else ("",):
            name, score = f"{panel} {loss}".strip(), pattern.format(loss)
            beside = {"": WSAE, ", scale alone": SCALED, ", weights alone": UNIT}
            for words, method in beside.items():
                out[name + words] = mean_interval([d.value for d in low(method, score)]).value
            if lower is not None:
                out[f"{name} verdict"] = judged(low(WSAE, score), lower, NEGLIGIBLE)
    return out


# Figure 3 under readings of the world: its size and importances, one W_p for all S, noise.

ONE_S = 0.9
"""S that the one W_p is trained at."""
NOISE_LEVEL = 0.1
ALPHAS = (0.5, 1.0, 2.0)
Size = Literal["20 in 5", "200 in 20"]
Form = Literal["tied", "untied"]


class WorldReading(Config):
    """One reading of the world behind Figure 3, for an SAE trained with Adam as there."""

    size: Size
    """200 in 20: the paper's sizes, equal importance. 20 in 5: with importance 0.9^i, as Elhage et al. (2022)."""
    matrix: Literal["each S", "all S"]
    """each S: every level has its own W_p. all S: the W_p trained at S = 0.9 serves all levels."""
    noise: Noise
    form: Form

    @property
    def label(self) -> str:
        """A short name."""
        noise = f"{self.noise.kind} noise" if self.noise.level else "no noise"
        return f"{self.size}, W_p for {self.matrix}, {noise}, {self.form}"

    @property
    def toys(self) -> str:
        """The directory of its toy models, which other readings share."""
        return f"toy-{self.size}-{self.matrix}".replace(" ", "-")


def world_readings() -> Iterator[WorldReading]:
    """Yield every combination; untied SAEs at the smaller size alone."""
    noises = (Isotropic(), Isotropic(level=NOISE_LEVEL), Anisotropic(level=NOISE_LEVEL))
    sizes: dict[Size, tuple[Form, ...]] = {"20 in 5": ("tied", "untied"), "200 in 20": ("tied",)}
    for size, forms in sizes.items():
        for matrix, noise, form in product(("each S", "all S"), noises, forms):
            yield WorldReading(size=size, matrix=matrix, noise=noise, form=form)


def world_sweep(reading: WorldReading, preset: Preset, seed: int) -> ToySweepConfig:
    """Return the sweep of one reading of the world; preset tiny shrinks the larger world, and training."""
    tiny, small = preset == "tiny", reading.size == "20 in 5"
    n, d_in = (20, 5) if small else (30, 6) if tiny else (200, 20)
    importance = DecayingImportance(base=0.9) if small else EqualImportance()
    own = {"lr": LR, "tied": reading.form == "tied"}
    rules = {f"{WSAE}, alpha {a:g}": GammaConfig(rule="variance", alpha=a) for a in ALPHAS}
    changes: dict[str, Any] = {
        "n_features": n,
        "d_in": d_in,
        "sparsities": (0.0, 0.3, 0.5, 0.9),
        "seeds": 2 if tiny else 8,
        "toy_seeds": "each" if small else "one",
        "toy_sparsity": ONE_S if reading.matrix == "all S" else None,
        "importance": importance,
        "noise": reading.noise,
        "methods": [
            paper_method(PLAIN, n, **own),
            *(paper_method(name, n, gamma, **own) for name, gamma in rules.items()),
        ],
    }
    base = toy_sweep(preset, seed, **changes)
    steps = base.training.bank.steps if tiny else 3000
    training = preset_training(preset, steps=steps).model_copy(update={"batch_size": 32})
    return base.model_copy(update={"training": training})


def run_worlds(at: Reproduction) -> dict[str, Any]:
    """Run every reading of the world and return a table of WSAE minus SAE at low S, with intervals."""
    found = {}
    for i, reading in enumerate(world_readings()):
        at.say(f"reading {i + 1}: {reading.label}")
        cfg = world_sweep(reading, at.preset, at.seed)
        place = at.out / f"world-{i:02d}"
        found[reading.label] = run_sweep(cfg, place, at.device, at.progress, at.out / reading.toys)
    return {"tables": {"WSAE minus SAE in per cent, S <= 0.5": worlds_table(found)}}


def worlds_table(found: dict[str, list[Row]]) -> Table:
    """Return (reading, alpha) x panel -> the relative difference at low S in per cent, latents matched to features.

    *: the 95 % interval over seeds leaves out 0. **: so does the one at 1 - 0.05 / m, m all cells (Bonferroni).
    """
    panels = [(name, score.format("matched")) for name, score, _, _ in _PANELS]
    strict = 1 - 0.05 / (len(found) * len(panels) * len(ALPHAS))

    def shown(rows: list[Row], alpha: float, score: str) -> str:
        each = low_differences(rows, f"{WSAE}, alpha {alpha:g}", score)
        wide = mean_interval(each)
        return cell(wide, 100.0, "+.2f") + "*" * (wide.sure + mean_interval(each, strict).sure)

    lines = [
        [label, f"{alpha:g}", *(shown(rows, alpha, score) for _, score in panels)]
        for label, rows in found.items()
        for alpha in ALPHAS
    ]
    return {"header": ["reading", "alpha", *(name for name, _ in panels)], "rows": lines}


def low_differences(rows: Sequence[Row], method: str, score: str) -> list[float]:
    """Return, per seed, the mean over S <= 0.5 of (method - SAE) / mean of SAE at that S."""
    base = {S: mean.value for S, mean in series(rows, PLAIN, score).items() if S <= LOW}
    plain, other = (
        {(row["sparsity"], row["seed"]): row[score] for row in select(rows, method=name)}
        for name in (PLAIN, method)
    )
    seeds = sorted({row["seed"] for row in rows})
    return [
        sum((other[S, seed] - plain[S, seed]) / value for S, value in base.items()) / len(base)
        for seed in seeds
    ]
