"""What a score is compared with: latents nobody trained, and explanations that belong to other latents.

A control is an ordinary SAE, or ordinary contexts, so that nothing downstream knows the difference. The floor of every
score is an SAE that learned nothing, of the same shape and sparsity, measured on the same rows. A score that a random
direction, a neuron or a principal direction reaches too says nothing about training; what the shuffled contexts reach
is chance. The costliest control is an SAE trained the same way on the same text, of a model that learned nothing:
latents of a randomly initialised transformer can be explained too, since they still see words (Heap et al. 2025), and
what they reach is the part of a score that says nothing about the trained model.
"""

import shutil
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from wsae.acts.stream import HeldOut, Language
from wsae.core.artifact import MANIFEST
from wsae.core.errors import UserError
from wsae.core.files import digest, read_json, write_json
from wsae.core.progress import Progress, quiet
from wsae.core.seeds import seed_for
from wsae.evals.config import CONTROL, Control
from wsae.evals.interpret.windows import Collected, Fragments
from wsae.sae import SAE, SAEConfig, TopK
from wsae.train.config import TrainConfig

if TYPE_CHECKING:
    from wsae.acts.config import HarvestConfig
    from wsae.acts.live import LiveSource


def random_control(like: SAE, mean: Float64[Tensor, " d_in"], l0: float, seed: int) -> SAE:
    """Return an untied Top-k SAE: random unit decoder rows, encoder = transpose, k = L0, centred on the mean of rows.

    Its b_dec is that mean, of what it reads; a transcoder's b_enc takes it off in place of that, and its encoder is
    random by itself. Its seed is another than any member's start, so it shares no direction with them. No order of
    activations depends on the scale of its encoder, but its errors do: see `fit_scale`. Of a crosscoder the rows are
    random at the scale at which its sources vary alike.
    """
    k = min(max(1, round(l0)), like.cfg.d_sae)
    widths = {"d_in": like.cfg.d_in, "d_sae": like.cfg.d_sae, "d_out": like.cfg.d_out}
    cfg = SAEConfig(**widths, activation=TopK(k=k))
    control = SAE(cfg, seed=seed_for(seed, "evals", CONTROL))
    assert control.b_dec is not None
    assert control.b_enc is not None
    assert control.W_enc_t is not None
    with torch.no_grad():
        if cfg.transcoder:
            control.b_enc.copy_(-mean.to(control.W_enc) @ control.W_enc)
        else:
            control.b_dec.copy_(mean)
        if like.cfg.sources is not None:
            scales = like.scales.to(control.W_dec)
            control.W_enc_t.mul_(scales)
            control.W_dec.div_(scales)
    return control.to(like.W_dec.device).requires_grad_(False)


FITTED_ROWS = 4096
"""Rows that set the control's scale: one number, which they give to a part in a thousand."""


def fit_scale(
    control: SAE,
    rows: Float[Tensor, "rows d_in"],
    target: Float[Tensor, "rows d_out"] | None = None,
) -> float:
    """Scale the encoder so that the squared error on the rows is least, and return the factor s.

    With codes z and y = x_hat - b_dec at the old scale, s = sum (x - b_dec) . y / sum |y|^2 >= 0, because the code of
    s W_enc is s z. Where every code is 0 nothing changes (s = 1). A transcoder is to give the `target` in place of x:
    s may be 0, as its directions know nothing of the target's.
    """
    assert control.b_dec is not None
    assert control.W_enc_t is not None
    assert control.b_enc is not None
    with torch.no_grad():
        x = rows.to(control.W_dec.device)
        goal = x if target is None else target.to(x.device)
        y = (control.decode(control.encode(x)) - control.b_dec).double()
        power = float(y.square().sum())
        scale = float(((goal - control.b_dec).double() * y).sum()) / power if power else 1.0
        scale = max(0.0, scale)
        control.W_enc_t.mul_(scale)
        control.b_enc.mul_(scale)
    return scale


Explained = TypeVar("Explained", Collected, Fragments)
NAMES: dict[Control, str] = {
    "random_sae": CONTROL,
    "neurons": "control-neurons",
    "pca": "control-pca",
    "shuffled": "control-shuffled",
    "random_model": "control-random-model",
}
"""Control -> its name among the members."""
ABOUT: dict[Control, str] = {
    "random_sae": "random directions, as sparse as the plain member",
    "neurons": "dimensions of the activations, standardised, both signs",
    "pca": "principal directions of the activations, whitened, both signs",
    "shuffled": "the plain member's latents, each judged by the explaining windows of another: chance",
    "random_model": "the plain member trained the same way on the model with random weights",
}
_RANK = 1e-9
"""Principal directions with less than this share of the largest variance are rounding, and never fire."""


def direction_sae(
    axes: Float[Tensor, "n d_in"],
    spread: Float[Tensor, " n"],
    mean: Float[Tensor, " d_in"],
    l0: float,
) -> SAE:
    """Return the Top-k SAE whose latents are the standardised coordinates along orthonormal axes, both signs.

    z_i = relu((x - mean) . a_i / s_i),  z_(n+i) = relu(-(x - mean) . a_i / s_i),  the k = L0 largest kept;
    x_hat = mean + sum_i (z_i - z_(n+i)) s_i a_i, so with k = 2n and n = d_in it gives x back. Where s_i = 0 the
    latents never fire.
    """
    n, d_in = axes.shape
    k = min(max(1, round(l0)), 2 * n)
    sae = SAE(SAEConfig(d_in=d_in, d_sae=2 * n, activation=TopK(k=k)))
    wide, spread = axes.double(), spread.double()
    inverse = torch.where(spread > 0, 1 / spread, torch.zeros_like(spread))
    encoder, decoder = wide * inverse[:, None], wide * spread[:, None]
    assert sae.W_enc_t is not None
    assert sae.b_dec is not None
    with torch.no_grad():
        sae.W_enc_t.copy_(torch.cat([encoder, -encoder]))
        sae.W_dec.copy_(torch.cat([decoder, -decoder]))
        sae.b_dec.copy_(mean)
    return sae.requires_grad_(False)


def neurons(mean: Float64[Tensor, " d_in"], variance: Float64[Tensor, " d_in"], l0: float) -> SAE:
    """Return the neurons control: latent i is dimension i above its mean, latent d_in + i below, in deviations."""
    return direction_sae(
        torch.eye(len(mean), dtype=torch.float32), variance.clamp_min(0).sqrt(), mean, l0
    )


def pca(mean: Float64[Tensor, " d_in"], covariance: Float64[Tensor, "d_in d_in"], l0: float) -> SAE:
    """Return the PCA control: principal directions, largest variance first, scaled to unit variance."""
    values, vectors = torch.linalg.eigh(covariance)
    values, axes = values.flip(0), vectors.T.flip(0)
    kept = torch.where(values > _RANK * values[0], values, torch.zeros_like(values))
    return direction_sae(axes, kept.sqrt(), mean, l0)


def subset(found: Explained, latents: Collection[int]) -> Explained:
    """Return the part of some latents."""
    return replace(found, latents=[one for one in found.latents if one.latent in latents])


def shuffled(found: Explained, seed: int, *names: str) -> Explained:
    """Return the same latents and what they are scored on, each latent with another one's explaining windows.

    Who gets whose is one random cycle through all of them, so nobody keeps their own. A lone latent has no other: it
    is skipped and counted.
    """
    latents = found.latents
    if len(latents) < 2:
        return replace(found, latents=[], skipped={"alone": len(latents)})
    giver = derangement(len(latents), seed_for(seed, "shuffled", *names))
    swapped = [replace(one, explain=latents[giver[i]].explain) for i, one in enumerate(latents)]
    return replace(found, latents=swapped, skipped={})


def derangement(n: int, seed: int) -> Int64[np.ndarray, " n"]:
    """Return a random permutation of range(n) that is one cycle, so that it moves every element (n >= 2)."""
    order = np.random.default_rng(seed).permutation(n)
    out = np.empty(n, dtype=np.int64)
    out[order] = np.roll(order, -1)
    return out


IDENTITY = "identity.json"


def random_model(
    source: HeldOut,
    language: Language | None,
    train: TrainConfig,
    member: str,
    place: Path,
    seed: int = 0,
    keep_store: bool = False,
    progress: Progress = quiet,
) -> tuple[dict[str, SAE], "LiveSource"]:
    """Train `member` as `train` says (or finish, or just open it) in `place`, on the model with random weights.

    Returns the SAEs by hook, and that model as a source. A run on a store harvests the same text once; that store is
    removed when training is done unless it is to be kept. A run on a live model trains on the live model. Raises
    UserError where there is no model behind the data.
    """
    from wsae.acts.harvest import harvest
    from wsae.acts.language import LanguageModel, reinitialised
    from wsae.acts.live import LiveSource
    from wsae.acts.source import StoreSource
    from wsae.train.run import load_run, train_run

    cfg = harvest_config(source)
    if cfg is None or not isinstance(language, LanguageModel):
        raise UserError(
            "control random_model: this run's data have no language model behind them; leave it out"
        )
    language, name = reinitialised(language, seed_for(seed, "random model")), "random-model"
    members = dict(zip(train.names(), train.members, strict=True))
    alone = members[member].model_copy(update={"label": name})
    train = train.model_copy(update={"members": (alone,), "init_from": None, "loss": None})
    live, run, store = LiveSource(cfg, language=language), place / "run", place / "store"
    known, identity = place / IDENTITY, digest([live.digest(), train.to_dict()])
    if place.is_dir() and (not known.is_file() or read_json(known) != identity):
        shutil.rmtree(place)  # of another model, text or training
    write_json(known, identity)
    if not (run / MANIFEST).exists():
        data = live
        if not isinstance(source, LiveSource):
            rows = cfg.model_copy(update={"heldout_tokens": 0})
            data = StoreSource(harvest(rows, store, progress, language).path, verify=False)
        train_run(train, data, run, progress, resume=True, device=str(language.device))
    if not keep_store:
        shutil.rmtree(store, ignore_errors=True)
    return {hook: saes[name] for hook, saes in load_run(run).saes.items()}, live


def harvest_config(source: HeldOut) -> "HarvestConfig | None":
    """Return how a store or a live source reads its model, for all of its hooks; None for arrays."""
    from wsae.acts.config import HarvestConfig
    from wsae.acts.live import LiveSource
    from wsae.acts.source import StoreSource

    if isinstance(source, LiveSource):
        return source.cfg
    if not isinstance(source, StoreSource):
        return None
    cfg = HarvestConfig.parse(source.store.manifest.config, where=f"{source.store.path}")
    return cfg.model_copy(update={"hooks": tuple(source.hooks)})
