"""One sweep over toy models from end to end, kept in a directory and made once."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from wsae.core.artifact import MANIFEST, read_manifest, write_manifest
from wsae.core.errors import UserError, nearest
from wsae.core.files import locked, read_json, write_json
from wsae.core.progress import Progress, quiet
from wsae.core.seeds import seed_for
from wsae.evals.glossary import RECOVERY
from wsae.evals.recovery import GroundTruth, ground_truth, isolated, score_codes
from wsae.sae.config import GammaConfig, Normalise, ReLU, SAEConfig
from wsae.sae.gamma import gamma_from_covariance, gamma_from_proxy, normalise_matrix, whitening
from wsae.sae.model import SAE
from wsae.stats.moments import Covariance
from wsae.studies.engine import Mean, Row, differences, select, series
from wsae.studies.sweep_config import Method, ToySweepConfig, TrainingConfig
from wsae.toy.config import FeatureConfig, ToyModelConfig
from wsae.toy.features import FeatureStream
from wsae.toy.model import ToyModels, train_toy_models
from wsae.toy.world import NoiseStream, World, noise_shape
from wsae.train.bank import Batches, Entry, make_entry, train_bank
from wsae.train.config import MemberConfig

# Trials: worlds to train on, each with its seed and the labels its scores are kept under.


@dataclass(frozen=True)
class Trial:
    """One world under one seed."""

    world: World
    seed: int
    labels: dict[str, Any]


def toy_trials(cfg: ToySweepConfig, models: ToyModels) -> list[Trial]:
    """Return one trial per sparsity level and seed, on that level's toy model, or on the one for all levels."""
    per_level = cfg.seeds if cfg.toy_seeds == "each" else 1
    trials = []
    for i, level in enumerate(cfg.sparsities):
        for seed in range(cfg.seeds):
            model = (i if cfg.toy_sparsity is None else 0) * per_level + seed % per_level
            labels = {"world": "toy", "sparsity": level, "seed": seed}
            features = FeatureConfig(n_features=cfg.n_features, sparsity=level)
            world = World(models.W_p[model], features, noise=cfg.noise)
            trials.append(Trial(world, cfg.seed + seed, labels))
    return trials


class Rows:
    """Rows of many worlds at once, for one use ("train", "statistics", "score"); uses never share a draw."""

    def __init__(self, trials: Sequence[Trial], use: str, rows: int) -> None:
        seeds = [seed_for(trial.seed, "sweep", use) for trial in trials]
        worlds = [trial.world for trial in trials]
        self._features = FeatureStream([world.features for world in worlds], seeds, rows)
        self._W_p = torch.stack([world.W_p for world in worlds])
        self._noise = NoiseStream(worlds, seeds)

    def features(self, step: int) -> Float[Tensor, "worlds rows n_features"]:
        """Return a step's features, valid until the next call."""
        return self._features.batch(step)

    def acts(self, step: int) -> Float[Tensor, "worlds rows d_in"]:
        """Return a step's activations, x_p = W_p x (Eq. 1) with the worlds' noise."""
        x_p = torch.bmm(self.features(step), self._W_p.mT)
        self._noise.add_to(x_p, step)
        return x_p


# Trains every method on every trial, all in one bank.

_BLOCK = 4096


@dataclass(frozen=True)
class Trained:
    """The SAEs of a sweep: trial by trial, within a trial method by method."""

    saes: list[SAE]
    labels: list[dict[str, Any]]
    trial: list[int]
    losses: Float[np.ndarray, "records saes"]
    """Mean weighted reconstruction loss over each stretch of steps, in the units trained in."""
    settled: list[float]
    """Fall of the loss over the last tenth of the records, as a share of the first: near 0 when it has converged."""


def train_trials(
    trials: Sequence[Trial],
    methods: Sequence[Method],
    cfg: TrainingConfig,
    device: str = "cpu",
    progress: Progress = quiet,
) -> Trained:
    """Train one SAE per trial and method. Methods of a trial share start (by seed) and batches.

    All trials must have the same widths. Raises UserError as `train_bank` and the gamma rules do.
    """
    statistics = trial_statistics(trials, cfg.statistics_rows)
    scales = [_scale(s.covariance) if cfg.unit_scale else 1.0 for s in statistics]
    entries, labels = [], []
    for w, trial in enumerate(trials):
        for method in methods:
            entries.append(_entry(method, trial, statistics[w], scales[w], w))
            labels.append({**trial.labels, "method": method.name})
    divisor = torch.tensor(scales)

    def data(worlds: list[int]) -> Batches:
        rows = Rows([trials[w] for w in worlds], "train", cfg.batch_size)
        scale = divisor[worlds][:, None, None]
        return lambda step: rows.acts(step).div_(scale)

    losses = train_bank(entries, data, cfg.bank, device, progress=progress)
    owners = [entry.world for entry in entries]
    saes = []
    for entry in entries:
        sae, scale = entry.sae, scales[entry.world]
        if scale != 1.0:
            gamma, sae = sae.gamma, sae.scaled(scale)
            sae.set_gamma(gamma)
        saes.append(sae.requires_grad_(False))
    settled = [0.0] * len(saes)
    if len(losses) >= 2:
        tail = max(1, len(losses) // 10)
        fall = losses[-2 * tail : -tail].mean(0) - losses[-tail:].mean(0)
        settled = [float(x) for x in fall / np.where(losses[0] > 0, losses[0], 1.0)]
    return Trained(saes, labels, owners, losses, settled)


def trial_statistics(trials: Sequence[Trial], rows: int) -> list[Covariance]:
    """Return the mean and covariance of every trial's activations over `rows` fresh rows (at least 4096)."""
    block = min(rows, _BLOCK)
    stream = Rows(trials, "statistics", block)
    found = [Covariance(trial.world.d_in) for trial in trials]
    for step in range(-(-rows // block)):
        for covariance, acts in zip(found, stream.acts(step), strict=True):
            covariance.update(acts)
    return found


def world_gamma(
    cfg: GammaConfig, covariance: Float64[Tensor, "d_in d_in"]
) -> Float64[Tensor, " d_in"] | Float64[Tensor, "d_in d_in"]:
    """Return the weights a rule gives for activations of this covariance; ones for latent_variance, which moves."""
    match cfg.rule:
        case "variance":
            return gamma_from_proxy(cfg, covariance.diagonal())
        case "gap" | "whiten":
            return gamma_from_covariance(cfg, covariance)
        case "vector":
            return gamma_from_proxy(cfg, torch.tensor(cfg.vector, dtype=torch.float64))
        case _:
            return torch.ones(len(covariance), dtype=torch.float64)


def oracle_gamma(
    world: World, normalise: Normalise = "rms"
) -> Float64[Tensor, " d_in"] | Float64[Tensor, "d_in d_in"]:
    """Return Gamma = Sigma^(-1/2), normalised: the best weights for any known support; ones without noise."""
    if not world.noise.level:
        return torch.ones(world.d_in, dtype=torch.float64)
    return normalise_matrix(whitening(world.noise_covariance, ridge=0.0), normalise)


def with_true_k(member: MemberConfig, features: FeatureConfig) -> MemberConfig:
    """Return the member with k at the mean number of active features, at least 1 and at most half its latents."""
    active = round(features.n_features * (1 - features.sparsity))
    k = max(1, min(active, member.width(features.n_features) // 2))
    activation = member.activation.model_copy(update={"k": k})
    return member.model_copy(update={"activation": activation})


def _entry(method: Method, trial: Trial, statistics: Covariance, scale: float, world: int) -> Entry:
    gamma = world_gamma(method.member.gamma, statistics.covariance)
    if method.gamma_from_truth:
        gamma = oracle_gamma(trial.world, method.member.gamma.normalise)
    if method.scale_as is not None:
        gamma = gamma * world_gamma(method.scale_as, statistics.covariance).square().mean().sqrt()
    mean = (statistics.mean / scale).float()
    member = method.member
    if method.k_from_truth:
        member = with_true_k(member, trial.world.features)
    seed = seed_for(trial.seed, "sweep", "sae")
    entry = make_entry(member, gamma, mean, world, seed)
    if entry.sae.cfg.tied:
        entry.sae.W_dec.data.mul_(method.init_scale)
    return entry


def _scale(covariance: Tensor) -> float:
    if not bool(covariance.diagonal().any()):
        raise UserError(
            "a world's activations never vary (S too near 1?); there is nothing to learn"
        )
    return 2.0 ** round(0.5 * float(covariance.diagonal().mean().log2()))


# Scores every SAE of a sweep against the truth, with two answers that need no training beside them.

RANDOM, CLOSED_FORM = "random", "closed form"
"""The controls: an untrained tied ReLU SAE, and the paper's W_p^T (Theorem 1)."""


def score_trials(
    trials: Sequence[Trial], trained: Trained, cfg: TrainingConfig, progress: Progress = quiet
) -> list[Row]:
    """Return one row per SAE, and per trial one for each control (`random`, `closed form`).

    All SAEs of a trial see the same rows, which no SAE was trained on.
    """
    groups: list[list[int]] = [[] for _ in trials]
    for i, owner in enumerate(trained.trial):
        groups[owner].append(i)
    rows: list[Row] = []
    threads = ThreadPoolExecutor(torch.get_num_threads(), "wsae-score", torch.set_num_threads, (1,))
    with progress("score", len(trials), "worlds") as tick, threads as pool:  # each on one core

        def score(w: int) -> list[Row]:
            stream = Rows([trials[w]], "score", cfg.rows)
            features = stream.features(0)[0].clone()
            world = trials[w].world
            truth = ground_truth(features, stream.acts(0)[0], world.W_p)
            width = trained.saes[groups[w][0]].cfg.d_sae if groups[w] else world.n_features
            named = [(trained.labels[i]["method"], trained.saes[i]) for i in groups[w]]
            settled = [trained.settled[i] for i in groups[w]]
            named += controls(trials[w], width)
            found = [
                {**trials[w].labels, "method": name, **_scores(truth, sae, cfg)}
                for name, sae in named
            ]
            for row, value in zip(found, settled, strict=False):
                row["loss_still_falling"] = value
            tick(1)
            return found

        for part in pool.map(score, range(len(trials))):
            rows += part
    return rows


def controls(trial: Trial, d_sae: int) -> list[tuple[str, SAE]]:
    """Return a random tied ReLU SAE and, where d_sae >= n_features, the closed form W_m = (W_p, 0)^T."""
    d_in, n = trial.world.W_p.shape
    cfg = SAEConfig(d_in=d_in, d_sae=d_sae, activation=ReLU(), tied=True)
    out = [(RANDOM, SAE(cfg, seed=seed_for(trial.seed, "sweep", "random")))]
    if d_sae >= n:
        closed = SAE(cfg)
        closed.W_dec.data.zero_()
        closed.W_dec.data[:n] = trial.world.W_p.T
        out.append((CLOSED_FORM, closed))
    return [(name, sae.requires_grad_(False)) for name, sae in out]


def _scores(truth: GroundTruth, sae: SAE, cfg: TrainingConfig) -> dict[str, float]:
    assert truth.acts is not None
    assert truth.W_p is not None
    latents = sae.encode(truth.acts.float())
    x_hat, alone = sae.decode(latents), isolated(truth, truth.W_p, sae)
    return score_codes(truth, latents, sae.W_dec, x_hat, alone, cfg.recovery).scores


ROWS = "rows.json"


def run_sweep(
    cfg: ToySweepConfig,
    out: Path,
    device: str = "cpu",
    progress: Progress = quiet,
    toys: Path | None = None,
) -> list[Row]:
    """Train the sweep's toy models and SAEs, score them, and return one row per SAE.

    The toy models are kept in `toys`, by default `out`/toy.
    Rows are written to `out`; a finished sweep of the same settings is read, not run again.
    Raises UserError as training does.
    """

    def made() -> list[Row]:
        models = toy_models(cfg.toy_models(), toys or out / "toy", device, progress)
        trials = toy_trials(cfg, models)
        trained = train_trials(trials, cfg.methods, cfg.training, device, progress)
        return score_trials(trials, trained, cfg.training, progress)

    return kept_rows(cfg.to_dict(), out, made)


def kept_rows(settings: dict[str, Any], out: Path, make: Callable[[], list[Row]]) -> list[Row]:
    """Return the rows of a finished sweep of these settings in `out`, made and kept there where there are none."""
    rows = read_rows(settings, out)
    if rows is None:
        rows = make()
        write_rows(rows, settings, out)
    return rows


def write_rows(rows: list[Row], settings: dict[str, Any], out: Path) -> None:
    """Write the rows of a finished sweep, its settings in the manifest."""
    (out / MANIFEST).unlink(missing_ok=True)  # of other settings
    write_json(out / ROWS, rows)
    write_manifest(out, "sweep", settings, [ROWS], info={"rows": len(rows)})


def read_rows(settings: dict[str, Any], out: Path) -> list[Row] | None:
    """Return the rows of a finished sweep of these settings in `out`, or None."""
    if not (out / MANIFEST).exists():
        return None
    manifest = read_manifest(out, "sweep")
    return read_json(out / ROWS) if manifest.config == settings else None


def toy_models(
    cfgs: list[ToyModelConfig], place: Path, device: str = "cpu", progress: Progress = quiet
) -> ToyModels:
    """Return these toy models, from `place` if they are there, else trained and kept there."""
    if (place / MANIFEST).exists():
        models = ToyModels.load(place)
        if list(models.configs) == cfgs:
            return models
    models = train_toy_models(cfgs, progress, device)
    models.save(place)
    return models


# `wsae toy`: SAEs of several kinds beside their plain twins, on toy models over levels of S.

CHANCE = "chance"
"""Beside mcc_direction: what random directions reach on the same W_p."""
RESULT, TOYS = "toy.json", "toy"
LEAST_ACTIVE = 30
"""A level whose scored rows hold fewer active features than this on average is refused."""


def check_toy(cfg: ToySweepConfig, scores: Sequence[str]) -> list[str]:
    """Return what a reader should know of a sweep before it runs; raises UserError for one that cannot run."""
    noise_shape(cfg.noise, cfg.d_in)
    for level in cfg.sparsities:
        active = cfg.training.rows * cfg.n_features * (1 - level)
        if active < LEAST_ACTIVE:
            raise UserError(
                f"sparsity {level:g}: only about {active:.2g} active features in the {cfg.training.rows:,} rows "
                "scored; use a lower one, or more features"
            )
        features = FeatureConfig(n_features=cfg.n_features, sparsity=level)
        for method in cfg.methods:
            member = with_true_k(method.member, features) if method.k_from_truth else method.member
            member.sae_config(cfg.d_in)
    d_sae = cfg.methods[0].member.width(cfg.d_in)
    narrow = d_sae < cfg.n_features
    for score in scores:
        if score not in RECOVERY:
            raise UserError(f"score '{score}' is unknown{nearest(score, RECOVERY)}")
        if narrow and score.startswith("gt_raw"):
            raise UserError(
                f"score {score}: takes latent i as feature i, but d_sae = {d_sae} is below "
                f"n_features = {cfg.n_features}; use gt_matched, or a larger --d-sae"
            )
    notes = []
    if cfg.d_in >= cfg.n_features:
        notes.append(
            f"n_features = {cfg.n_features} fit into d_in = {cfg.d_in} dimensions, so there is no need of superposition"
        )
    if narrow:
        notes.append(
            f"d_sae = {d_sae} is below n_features = {cfg.n_features}: some features have no latent, and there is "
            f"no '{CLOSED_FORM}' to compare with"
        )
    if cfg.seeds == 1:
        notes.append("one seed gives no intervals")
    return notes


def run_toy(
    cfg: ToySweepConfig,
    scores: Sequence[str],
    out: Path,
    device: str = "cpu",
    progress: Progress = quiet,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Run the sweep into `out` (toy models, rows.json, toy.json) and return its rows with `summary`.

    A finished sweep of the same settings is read, not run again; its toy models serve other settings that need the
    same ones. Raises UserError, before anything is written, for a sweep that cannot run.
    """
    for note in check_toy(cfg, scores):
        say(f"note: {note}")
    with locked(out):
        if read_rows(cfg.to_dict(), out) is not None:
            say(f"{out} holds this sweep already; it is read")
        elif (out / MANIFEST).exists():
            say(f"{out} holds a sweep of other settings; its rows are replaced")
        rows = run_sweep(cfg, out, device, progress, out / TOYS)
        found = {"config": cfg.to_dict(), **summary(rows, cfg, scores)}
        write_json(out / RESULT, found)
    return {**found, "rows": rows, "files": [str(out / name) for name in (RESULT, ROWS, TOYS)]}


def summary(rows: Sequence[Row], cfg: ToySweepConfig, scores: Sequence[str]) -> dict[str, Any]:
    """Return means over seeds and paired differences from the plain twins, as flat records with intervals.

    `summaries`: one per score, method and level. `differences`: a - b for every method a with weights, b its twin.
    """
    names = [method.name for method in cfg.methods]
    controls = [name for name in (RANDOM, CLOSED_FORM) if select(rows, method=name)]
    summaries, paired = [], []
    for score in scores:
        for name in [*names, *controls]:
            means = series(rows, name, score)
            summaries += [_record(score, level, m, method=name) for level, m in means.items()]
        if score == "mcc_direction":
            chance = series(rows, names[0], "mcc_direction_chance")
            summaries += [_record(score, level, m, method=CHANCE) for level, m in chance.items()]
        for method in cfg.methods:
            twin = twin_of(method, cfg.methods)
            if method.name != twin:
                means = differences(rows, method.name, twin, score)
                paired += [
                    _record(score, level, m, a=method.name, b=twin) for level, m in means.items()
                ]
    falling = max(row.get("loss_still_falling", 0.0) for row in rows)
    return {"summaries": summaries, "differences": paired, "loss_still_falling": falling}


def twin_of(method: Method, methods: Sequence[Method]) -> str:
    """Return the name of the method that is this one without weights."""
    plain = method.member.model_copy(update={"gamma": GammaConfig()})
    return next(other.name for other in methods if other.member == plain)


def _record(score: str, level: float, mean: Mean, **names: str) -> dict[str, Any]:
    return {"score": score, **names, "sparsity": level, **mean._asdict()}
