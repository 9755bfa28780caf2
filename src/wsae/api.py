"""What a notebook user types: fit, fit_family, evaluate, probe, recovery. Nothing is written to disk."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from wsae.acts.source import (
    ActivationSource,
    AlignedSource,
    ArraySource,
    JoinedSource,
    StoreSource,
    as_path,
    is_folder_of_arrays,
    open_source,
)
from wsae.core.calls import own_settings, tensor, usable_device
from wsae.core.errors import UserError, nearest
from wsae.core.progress import Progress, quiet
from wsae.evals.probing.run import probe
from wsae.evals.recovery import Recovery, recovery
from wsae.evals.run import evaluate
from wsae.sae.config import ActivationConfig, GammaConfig, make_activation
from wsae.sae.gamma import gamma_from_proxy
from wsae.sae.model import SAE, an_sae
from wsae.train.bank import fits_a_bank, train_batched
from wsae.train.config import MemberConfig, TrainConfig
from wsae.train.family import FamilyState, Start, finished
from wsae.train.loop import batches, run_steps
from wsae.train.run import begun_from, start_family
from wsae.train.state import metrics_row

__all__ = [
    "Family",
    "Member",
    "Recovery",
    "evaluate",
    "fit",
    "fit_family",
    "gamma_from_proxy",
    "probe",
    "recovery",
]

Acts = object
"""Activations [rows, d_in] or [n, seq, d_in]: an array, a tensor, a table or lists (`wsae.core.calls.numbers`); the
path of an array file, of a folder of them or of a store (`str` or `os.PathLike`); or a source with one hook. A mapping
{source: activations} of the same rows makes a crosscoder, which reads them side by side."""
EPOCHS = 4
"""Passes over the data where no number of tokens is given."""
_GAMMA = ("alpha", "normalise", "robust", "quantile", "ridge", "rounds")
_MAP = ("power", "shrinkage")


def Member(  # noqa: N802  (reads as the value it makes)
    gamma: object = "none",
    k: int | None = None,
    activation: str | Mapping[str, Any] | ActivationConfig = "topk",
    precondition: str = "none",
    **fields: Any,
) -> MemberConfig:
    """Return one member of a family: a gamma rule's name (or the proxy itself, one value per dimension) and the rest.

    Gamma and activation may be configs too, an activation what a run's config.json says of one; the name of a Top-k
    kind takes `k` (default 32). `precondition` is
    standardise, whiten or residual, to train on mapped activations. `fields` are those of MemberConfig (d_sae,
    expansion, tied, lr, seed, l1, l0, target_l0, auxk, k_aux, label, ...), of GammaConfig (alpha, normalise, robust,
    quantile, ridge, rounds) and of PreconditionConfig (power, shrinkage). Raises UserError naming an unknown one, or a
    value that does not fit.
    """
    mapped: dict[str, Any] | None = {key: fields.pop(key) for key in _MAP if key in fields}
    if precondition != "none":
        mapped = {"kind": precondition, **mapped}
    elif mapped:
        raise UserError(
            f"member: {next(iter(mapped))} is of a preconditioner; give precondition too, 'whiten' say"
        )
    else:
        mapped = None
    weights: dict[str, Any] = {key: fields.pop(key) for key in _GAMMA if key in fields}
    if isinstance(gamma, str):
        weights["rule"] = gamma
    elif isinstance(gamma, GammaConfig):
        weights = gamma.model_dump() | weights
    else:
        proxy = tensor(gamma, "gamma").detach()
        if proxy.ndim != 1:
            raise UserError(
                f"gamma: shape {tuple(proxy.shape)}; give one value per dimension, [d_in]"
            )
        weights |= {"rule": "vector", "vector": tuple(proxy.double().tolist())}
    kind: object = activation
    if isinstance(activation, str):
        kind = make_activation(activation, 32 if k is None else k)
    elif k is not None and isinstance(activation, Mapping | ActivationConfig):
        own = dict(activation).get("k")
        if own != k:
            raise UserError(f"member: k is {k}, the activation's own is {own}; give one of them")
    data = {"gamma": weights, "activation": kind, "precondition": mapped, **fields}
    return MemberConfig.parse(data, where="member")


@dataclass(frozen=True)
class Family:
    """A trained family: one SAE per member, in order, its last training metrics, and the record of its gamma."""

    saes: list[SAE]
    names: list[str]
    metrics: list[dict[str, float]]
    gamma: dict[str, Any]


def fit(
    acts: Acts,
    k: int | None = None,
    d_sae: int | None = None,
    gamma: object = "none",
    **options: Any,
) -> SAE:
    """Train one SAE on activations (see `Acts`); all rows are trained on, those of a store but for its held-out ones.

    `options` are those of `Member` (where k is 32 by default) and of `fit_family`; `labels` [rows] serve the rule
    consistency, `target` [rows, d_out] makes it a transcoder. Raises UserError for data or options that do not fit.
    """
    for key in options.keys() - _OPTIONS:
        raise UserError(f"fit: unknown key {key!r}{nearest(key, _OPTIONS)}")
    run = {key: options.pop(key) for key in list(options) if key in _RUN}
    member = Member(gamma=gamma, k=k, d_sae=d_sae, **options)
    return fit_family(acts, [member], **run).saes[0]


@own_settings
def fit_family(
    acts: Acts,
    members: MemberConfig | Sequence[MemberConfig],
    tokens: int | None = None,
    labels: object = None,
    progress: Progress = quiet,
    init_from: SAE | None = None,
    target: object = None,
    **options: Any,
) -> Family:
    """Train members on the same batches from the same start; all rows of an array or a file of one are trained on.

    `target` [rows, d_out] makes transcoders of them, which are to give it; of a store with several hooks the option
    `hook_out` = {HOOK: HOOK_OUT} does. `tokens`: rows per member (default: four passes over the data). `init_from`: an
    SAE of the members' kind and width that they go on with. `options` are TrainConfig's: batch_size, warmup, decay,
    dtype, dead_after, seed, log_every ..., and `device`. Many small members (batch x d_sae x 4 bytes at most 512 KiB
    each) train in one batched computation. Raises UserError for data or options that do not fit.
    """
    device = usable_device(str(options.pop("device", "cpu")))
    given = [members] if isinstance(members, MemberConfig) else list(members)
    source = _source(acts, labels, options.get("hook_out") is not None)
    if target is not None:
        if isinstance(source, JoinedSource):
            raise UserError("target: is of transcoders; a crosscoder gives what it reads")
        source, options["hook_out"] = _both(source, target)
    if isinstance(source, JoinedSource):
        parts = source.parts.items()
        options["crosscoder"] = [{"name": name, "width": width} for name, width in parts]
    rows = EPOCHS * (source.n_rows or 0) if tokens is None else tokens
    if source.n_rows is not None and "batch_size" not in options:
        options["batch_size"] = min(2048, source.n_rows)
    data = {"members": tuple(given), "tokens": rows, **options}
    start = None
    if init_from is not None:
        start = Start(dict.fromkeys(source.hooks, an_sae(init_from, "init_from")))
    cfg = begun_from(TrainConfig.parse(data, where="fit"), source, start)
    stats = source.stats(progress)
    family = start_family(cfg, source, stats, device, progress, start=start)
    if cfg.loss is None and fits_a_bank(cfg, family, source):
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
    cfg: TrainConfig, family: FamilyState, source: ActivationSource, progress: Progress
) -> None:
    stream = batches(cfg, source)
    with progress("train", cfg.trained, "tokens") as tick:

        def on_step(done: int) -> None:
            if done % cfg.log_every == 0 and done < cfg.steps:
                for _, member in family.all():
                    member.window.zero_()

        run_steps(cfg, family, stream, 0, tick, on_step)


_RUN = frozenset(TrainConfig.model_fields) - {"members"} | {
    "labels",
    "progress",
    "device",
    "target",
}


_OPTIONS = _RUN | set(MemberConfig.model_fields) | {*_GAMMA, *_MAP}
"""All that `fit` takes beside its own parameters."""


class _Sides(NamedTuple):
    source: ActivationSource
    hook_out: dict[str, str]


def _both(source: ActivationSource, target: object) -> _Sides:
    """Return both sides of transcoders, row by row; raises UserError where the rows are not as many."""
    (hook,) = source.hooks
    given = target if isinstance(target, ActivationSource) else ArraySource(target, 0.0, "target")
    return _Sides(AlignedSource(source, given), {hook: next(iter(given.hooks))})


def _source(acts: Acts, labels: object, several: bool = False) -> ActivationSource:
    """Return the data with one hook, nothing held out; raises UserError for others, unless `several` are wanted."""
    if isinstance(acts, Mapping):
        if labels is not None:
            raise UserError("labels: go with one array")
        if not acts:
            raise UserError("acts: {} names no source; give {NAME: activations, ...}")
        parts = (ArraySource(x, 0.0, str(name)) for name, x in acts.items())
        return JoinedSource(AlignedSource(*parts))
    path = as_path(acts)
    store = path is not None and path.is_dir() and not is_folder_of_arrays(path)
    if isinstance(acts, ActivationSource) or store:
        source = acts if isinstance(acts, ActivationSource) else open_source(acts)
        if labels is not None:
            kind = "a store" if isinstance(source, StoreSource) else "a source"
            raise UserError(f"labels: go with an array, {kind} has its own")
    else:
        source = open_source(acts, heldout_fraction=0.0)
        if labels is not None and isinstance(source, ArraySource):
            source.with_labels(_classes(labels))
    if len(source.hooks) != 1 and not several:
        few = ", ".join(list(source.hooks)[:4])
        raise UserError(
            f"the data have {len(source.hooks)} hooks ({few}); give one: open_source(path, hooks=(NAME,))"
        )
    return source


def _classes(labels: object) -> np.ndarray:
    found = np.asarray(tensor(labels, "labels").detach().cpu())
    whole = found.astype(np.int64)
    if found.ndim != 1 or not (found == whole).all():
        raise UserError(
            f"labels: shape {found.shape}, dtype {found.dtype}; give one whole number a row"
        )
    return whole
