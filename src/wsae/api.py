"""What a notebook user types: fit, fit_family, evaluate, recovery. Nothing is written to disk."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from wsae.acts.source import ActivationSource, ArraySource, open_source
from wsae.core.progress import Progress, quiet
from wsae.evals.recovery import Recovery, recovery
from wsae.evals.run import evaluate
from wsae.losses.gamma import gamma_from_proxy
from wsae.sae.config import make_activation
from wsae.sae.model import SparseAutoencoder
from wsae.train.batched import fits_a_bank, train_batched
from wsae.train.config import MemberConfig, TrainConfig
from wsae.train.counters import metrics_row
from wsae.train.covariance import covariances
from wsae.train.family import Family as TrainedFamily
from wsae.train.family import finished, make_family
from wsae.train.loop import run_steps

__all__ = [
    "Family",
    "Member",
    "Recovery",
    "evaluate",
    "fit",
    "fit_family",
    "gamma_from_proxy",
    "recovery",
]

Acts = Shaped[np.ndarray, "..."] | Float[Tensor, "..."] | ActivationSource | str
EPOCHS = 4
"""Passes over the data where no number of tokens is given."""
_GAMMA = ("alpha", "normalise", "robust", "quantile", "ridge")


def Member(  # noqa: N802  (reads as the value it makes)
    gamma: str | Float[Tensor, " d_in"] | Float[np.ndarray, " d_in"] = "none",
    k: int = 32,
    activation: str = "topk",
    **fields: Any,
) -> MemberConfig:
    """Return one member of a family: a gamma rule's name (or the proxy itself, one value per dimension) and the rest.

    `fields` are those of MemberConfig (d_sae, expansion, tied, lr, seed, l1, l0, auxk, k_aux, label) and of GammaConfig
    (alpha, normalise, robust, quantile, ridge). Raises UserError naming an unknown one.
    """
    weights: dict[str, Any] = {key: fields.pop(key) for key in _GAMMA if key in fields}
    if isinstance(gamma, str):
        weights["rule"] = gamma
    else:
        weights |= {"rule": "vector", "vector": tuple(torch.as_tensor(gamma).tolist())}
    kind = make_activation(activation, k)
    data = {"gamma": weights, "activation": kind, **fields}
    return MemberConfig.parse(data, where="member")


@dataclass(frozen=True)
class Family:
    """A trained family: one SAE per member, in order, its last training metrics, and the record of its gamma."""

    saes: list[SparseAutoencoder]
    names: list[str]
    metrics: list[dict[str, float]]
    gamma: dict[str, Any]


def fit(
    acts: Acts,
    k: int = 32,
    d_sae: int | None = None,
    gamma: str | Float[Tensor, " d_in"] | Float[np.ndarray, " d_in"] = "none",
    **options: Any,
) -> SparseAutoencoder:
    """Train one SAE on activations [rows, d_in] (numpy, torch, memmap, a path, or a source with one hook).

    `options` are those of `Member` and of `fit_family`; `labels` [rows] serve the rule consistency.
    """
    run = {key: options.pop(key) for key in list(options) if key in _RUN}
    member = Member(gamma=gamma, k=k, d_sae=d_sae, **options)
    return fit_family(acts, [member], **run).saes[0]


def fit_family(
    acts: Acts,
    members: Sequence[MemberConfig],
    tokens: int | None = None,
    labels: Shaped[np.ndarray, " rows"] | None = None,
    progress: Progress = quiet,
    **options: Any,
) -> Family:
    """Train members on the same batches from the same start; all rows are trained on.

    `tokens`: rows per member (default: four passes over the data). `options` are TrainConfig's: batch_size, warmup,
    decay, dtype, dead_after, seed, log_every ..., and `device`. Many small members (batch x d_sae x 4 bytes at
    most 512 KiB each) train in one batched computation. Raises UserError for data or options that do not fit.
    """
    device = str(options.pop("device", "cpu"))
    source = _source(acts, labels)
    rows = tokens or EPOCHS * (source.n_rows or 0)
    if source.n_rows is not None and "batch_size" not in options:
        options["batch_size"] = min(2048, source.n_rows)
    data = {"members": tuple(members), "tokens": rows, **options}
    cfg = TrainConfig.parse(data, where="fit")
    stats = source.stats(progress)
    family = make_family(cfg, stats, device, covariances(cfg, source, stats, progress))
    if fits_a_bank(cfg, family, source):
        train_batched(cfg, family, source, progress)
    else:
        _train_in_turn(cfg, family, source, progress)
    trained = [member for _, member in family.all()]
    (record,) = family.gamma_record.values()
    return Family(
        [finished(m) for m in trained],
        [m.name for m in trained],
        [metrics_row(m) for m in trained],
        record,
    )


def _train_in_turn(
    cfg: TrainConfig, family: TrainedFamily, source: ActivationSource, progress: Progress
) -> None:
    stream = source.stream(cfg.batch_size, cfg.seed)
    with progress("train", cfg.steps * cfg.batch_size, "tokens") as tick:

        def on_step(done: int) -> None:
            if done % cfg.log_every == 0 and done < cfg.steps:
                for _, member in family.all():
                    member.reset_sums()

        run_steps(cfg, family, stream, 0, tick, on_step)


_RUN = frozenset(TrainConfig.model_fields) - {"members"} | {"labels", "progress", "device"}


def _source(acts: Acts, labels: np.ndarray | None) -> ActivationSource:
    if isinstance(acts, np.ndarray | Tensor):
        return ArraySource(acts, heldout_fraction=0.0, labels=labels)
    return open_source(acts) if isinstance(acts, str) else acts
