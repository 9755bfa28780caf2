"""Scores every SAE of a sweep against the truth, with two answers that need no training beside them."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from wsae.core.progress import Progress, quiet
from wsae.core.seeds import seed_for
from wsae.evals.recovery import Codes, GroundTruth, ground_truth, score_codes
from wsae.evals.recovery.isolated import isolated
from wsae.experiments.sweep.config import TrainingConfig
from wsae.experiments.sweep.training import Trained
from wsae.experiments.sweep.trials import Rows, Trial
from wsae.sae.config import ReLU, SAEConfig
from wsae.sae.model import SparseAutoencoder

Row = dict[str, Any]
"""One SAE's labels and scores, flat."""
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
    with progress("score", len(trials), "worlds") as tick, _pool() as pool:

        def score(w: int) -> list[Row]:
            truth = _truth(trials[w], cfg.rows)
            width = trained.saes[groups[w][0]].cfg.d_sae if groups[w] else len(trials[w].W_p[0])
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


def controls(trial: Trial, d_sae: int) -> list[tuple[str, SparseAutoencoder]]:
    """Return a random tied ReLU SAE and, where d_sae >= n_features, the closed form W_m = (W_p, 0)^T."""
    d_in, n = trial.W_p.shape
    cfg = SAEConfig(d_in=d_in, d_sae=d_sae, activation=ReLU(), tied=True)
    out = [(RANDOM, SparseAutoencoder(cfg, seed=seed_for(trial.seed, "sweep", "random")))]
    if d_sae >= n:
        closed = SparseAutoencoder(cfg)
        closed.W_dec.data.zero_()
        closed.W_dec.data[:n] = trial.W_p.T
        out.append((CLOSED_FORM, closed))
    return [(name, sae.requires_grad_(False)) for name, sae in out]


def _truth(trial: Trial, count: int) -> GroundTruth:
    stream = Rows([trial], "score", count)
    return ground_truth(stream.features(0)[0].clone(), stream.acts(0)[0], trial.W_p)


def _scores(truth: GroundTruth, sae: SparseAutoencoder, cfg: TrainingConfig) -> dict[str, float]:
    assert truth.acts is not None
    assert truth.W_p is not None
    latents = sae.encode(truth.acts.float())
    codes = Codes(latents, sae.W_dec, sae.decode(latents), isolated(truth, truth.W_p, sae))
    return score_codes(truth, codes, cfg.recovery).scores


def _pool() -> ThreadPoolExecutor:
    """Threads for whole worlds; each computes on one core."""
    count = torch.get_num_threads()
    return ThreadPoolExecutor(count, "wsae-score", torch.set_num_threads, (1,))
