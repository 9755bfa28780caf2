"""Trains every method on every trial, all in one bank."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from wsae.core.errors import UserError
from wsae.core.progress import Progress, quiet
from wsae.core.seeds import seed_for
from wsae.experiments.sweep.config import Method, TrainingConfig
from wsae.experiments.sweep.trials import Rows, Trial
from wsae.losses.config import GammaConfig
from wsae.losses.gamma import gamma_from_covariance, gamma_from_proxy
from wsae.losses.weigh import Weights
from wsae.sae.model import SparseAutoencoder
from wsae.stats.covariance import Covariance
from wsae.toy.config import FeatureConfig
from wsae.train.bank.chunk import Batches
from wsae.train.bank.entry import Entry, make_entry
from wsae.train.bank.run import train_bank
from wsae.train.config import MemberConfig

_BLOCK = 4096


@dataclass(frozen=True)
class Trained:
    """The SAEs of a sweep: trial by trial, within a trial method by method."""

    saes: list[SparseAutoencoder]
    labels: list[dict[str, Any]]
    trial: list[int]
    losses: Float[np.ndarray, "records saes"]
    """Mean weighted reconstruction loss over each stretch of steps, in the units trained in."""
    settled: list[float]
    """Fall of the loss over the last tenth of the records, as a share of the first record."""


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
    saes = [_finished(entry.sae, scales[entry.world]) for entry in entries]
    return Trained(saes, labels, owners, losses, _settled(losses))


def trial_statistics(trials: Sequence[Trial], rows: int) -> list[Covariance]:
    """Return the mean and covariance of every trial's activations over `rows` fresh rows (at least 4096)."""
    block = min(rows, _BLOCK)
    stream = Rows(trials, "statistics", block)
    found = [Covariance(len(trial.W_p)) for trial in trials]
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


def with_true_k(member: MemberConfig, features: FeatureConfig) -> MemberConfig:
    """Return the member with k at the mean number of active features, at least 1 and at most half its latents."""
    active = round(features.n_features * (1 - features.sparsity))
    k = max(1, min(active, member.width(features.n_features) // 2))
    activation = member.activation.model_copy(update={"k": k})
    return member.model_copy(update={"activation": activation})


def _entry(method: Method, trial: Trial, statistics: Covariance, scale: float, world: int) -> Entry:
    gamma: Weights = world_gamma(method.member.gamma, statistics.covariance)
    if method.scale_as is not None:
        gamma = gamma * world_gamma(method.scale_as, statistics.covariance).square().mean().sqrt()
    mean = (statistics.mean / scale).float()
    member = with_true_k(method.member, trial.features) if method.k_from_truth else method.member
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


def _finished(sae: SparseAutoencoder, scale: float) -> SparseAutoencoder:
    if scale != 1.0:
        gamma, sae = sae.gamma, sae.scaled(scale)
        sae.set_gamma(gamma)
    return sae.requires_grad_(False)


def _settled(losses: np.ndarray) -> list[float]:
    """Fall of the loss over the last tenth of the records, as a share of the first: near 0 when it has converged."""
    if len(losses) < 2:
        return [0.0] * losses.shape[1]
    tail = max(1, len(losses) // 10)
    fall = losses[-2 * tail : -tail].mean(0) - losses[-tail:].mean(0)
    return [float(x) for x in fall / np.where(losses[0] > 0, losses[0], 1.0)]
