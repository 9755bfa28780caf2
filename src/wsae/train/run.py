"""A training run: its family started from data, and its directory, config first, members and manifest last.

What a start takes of the data are covariances, and what pilots leave, where a member asks for them.
"""

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wsae.acts.flow import SourceStats
from wsae.acts.stream import ActivationSource
from wsae.core.artifact import (
    CHECKPOINTS,
    CONFIG,
    GAMMA_FILE,
    MANIFEST,
    MEMBERS,
    METRICS_FILE,
    contained,
    read_manifest,
    write_manifest,
)
from wsae.core.calls import own_settings
from wsae.core.errors import Buffer, UserError, explained, understood
from wsae.core.files import write_json
from wsae.core.progress import Progress, quiet
from wsae.sae.config import GammaConfig
from wsae.sae.gamma import describe_gamma
from wsae.sae.model import SAE, WEIGHTS
from wsae.stats.moments import Covariance
from wsae.train.config import MemberConfig, TrainConfig
from wsae.train.family import FamilyState, Inputs, Start, finished, make_family, power_of_two_scale
from wsae.train.loop import FamilyJob, enter, held, run_steps, train_job
from wsae.train.native import as_usual
from wsae.train.state import MemberState, make_batch

MAX_ROWS = 131_072
"""Rows behind a covariance at most: 32 for each of 4096 dimensions."""
_BATCH = 4096


def covariances(
    cfg: TrainConfig,
    source: ActivationSource,
    stats: dict[str, SourceStats],
    progress: Progress = quiet,
) -> dict[str, Covariance]:
    """Return each hook's covariance over shuffled training rows of one epoch, 131,072 at most; {} if no rule needs it.

    Rows are counted as the statistics are: a live model's first `stats_tokens`. Memory is d_in^2 x 8 bytes per hook and
    one batch. The sample is that of the run's seed, so a resumed run sees the same one.
    """
    if not any(member.needs_covariance for member in cfg.members):
        return {}
    wanted = min(MAX_ROWS, *(s.kept.n for s in stats.values()))
    even = wanted // math.ceil(wanted / _BATCH)  # whole batches that leave almost no row out
    batch = even if source.n_rows is not None else min(cfg.batch_size, wanted)
    stream = source.stream(batch, cfg.seed)
    found = {hook: Covariance(d_in) for hook, d_in in source.hooks.items()}
    with progress("covariance", wanted // batch * batch, "rows") as tick:
        for _ in range(wanted // batch):
            rows = stream.next()
            if stream.state().get("epoch", 0) != 0:
                break  # a short text has begun again
            for hook, covariance in found.items():
                covariance.update(rows[hook])
            tick(batch)
    return found


PILOT = 4
"""A pilot is trained on one in so many of the run's rows."""


def start_family(
    cfg: TrainConfig,
    source: ActivationSource,
    stats: dict[str, SourceStats],
    device: str = "cpu",
    progress: Progress = quiet,
    make: Callable[[str, str, MemberConfig, Inputs], MemberState | None] | None = None,
    start: Start | None = None,
) -> FamilyState:
    """Return every hook's members at step 0, with what the data say of their loss weights and preconditioners.

    `make` and `start` are those of `make_family`; pilots start there too. With a `make`, pilots are trained on the CPU,
    where all processes get the same bits.
    """
    found = covariances(cfg, source, stats, progress)
    pilots = "cpu" if make else device
    left = residuals(cfg, source, stats, found, pilots, progress, start)
    return make_family(cfg, stats, device, found, left, make, start)


def residuals(
    cfg: TrainConfig,
    source: ActivationSource,
    stats: dict[str, SourceStats],
    covariances: dict[str, Covariance],
    device: str = "cpu",
    progress: Progress = quiet,
    start: Start | None = None,
) -> dict[str, dict[str, Covariance]]:
    """Return hook -> member -> covariance of the residual x - x_hat of its pilot, for members that ask for one.

    A pilot is the member without weights (in round 2: with those of round 1) and without a map made of what it leaves,
    trained on the run's first batches, a quarter of all, by its squared error; the covariance is taken over shuffled
    training rows, 131,072 at most, of what the SAE sees: with another preconditioner that is P x. Members that differ
    in nothing else share one. Pilots are not kept: a resumed run trains them again, to the same bits on a CPU. Raises
    UserError for a map made of what a pilot leaves with a `start`, whose rows are of norm 1 in other coordinates.
    """
    asked = dict(zip(cfg.names(), cfg.members, strict=True))
    asked = {name: member for name, member in asked.items() if member.needs_pilot}
    if start is not None and any(not m.gamma.needs_pilot for m in asked.values()):
        raise UserError(
            "precondition residual: does not go on with an SAE, whose rows are of norm 1 elsewhere; leave out one of "
            "--precondition and --init-from"
        )
    left: dict[str, dict[str, Covariance]] = {}
    for number in range(1, 1 + max((m.gamma.rounds or 1 for m in asked.values()), default=0)):
        alike: dict[MemberConfig, list[str]] = {}
        for name, member in asked.items():
            if (member.gamma.rounds or 1) >= number:
                alike.setdefault(_pilot(member, number), []).append(name)
        named = tuple(
            pilot.model_copy(update={"label": names[0]}) for pilot, names in alike.items()
        )
        tokens = max(cfg.batch_size, cfg.tokens // PILOT)
        pilot = cfg.model_copy(update={"members": named, "tokens": tokens, "loss": None})
        family = make_family(pilot, stats, device, covariances, left, start=start)
        stream = source.stream(pilot.batch_size, pilot.seed)
        with progress(f"pilot {number}", pilot.trained, "tokens") as tick:
            run_steps(pilot, family, stream, 0, tick, lambda _: None)
        left = _left(pilot, family, source, stats, left)
        for found in left.values():
            found |= {name: found[names[0]] for names in alike.values() for name in names}
    return left


def _pilot(member: MemberConfig, number: int) -> MemberConfig:
    """Return the SAE, unnamed, whose errors a member's weights or map are made of in a round."""
    mapped = member.precondition
    own = {"gamma": GammaConfig()} if number == 1 else {}
    own |= {"precondition": None} if mapped is not None and mapped.needs_pilot else {}
    return member.model_copy(update={**own, "label": None})


@torch.no_grad()
def _left(
    cfg: TrainConfig,
    family: FamilyState,
    source: ActivationSource,
    stats: dict[str, SourceStats],
    before: dict[str, dict[str, Covariance]],
) -> dict[str, dict[str, Covariance]]:
    """Return the covariance of what each trained pilot leaves, beside those of `before`."""
    found = {hook: dict(before.get(hook, {})) for hook in family.members}
    for hook, member in family.all():
        found[hook][member.name] = Covariance(len(member.mean))
    stream = source.stream(cfg.batch_size, cfg.seed)
    rows = min(MAX_ROWS, *(s.kept.n for s in stats.values()))
    for _ in range(max(1, rows // cfg.batch_size)):
        batch = stream.next()
        for hook, member in family.all():
            with as_usual(member):
                out, device = cfg.given(hook), member.mean.device
                y = None if out is None else batch[out].to(device)
                made = make_batch(batch[hook].to(device), member, y)
                found[hook][member.name].update((made.target - member.sae(made.x)) * member.scale)
    return found


# The run and its directory.

_SHAPE = "--d-sae, --expansion or the number of members"


def training_buffers(cfg: TrainConfig, widths: Mapping[str, int]) -> list[Buffer]:
    """Return the buffers of every member's weights and step on hooks of these widths, for when they do not fit."""
    batch, found = cfg.batch_size, []
    for d_in in set(widths.values()):
        found.append(Buffer("activations of a batch", (batch, d_in), 4, "--batch-size"))
        for member in cfg.members:
            d_sae = member.width(d_in)
            found += [
                Buffer("pre-activations", (batch, d_sae), 4, "--batch-size or --d-sae"),
                Buffer("bfloat16 pre-activations", (batch, d_sae), 2, "--batch-size or --d-sae"),
                Buffer("mask of active latents", (batch, d_sae), 1, "--batch-size or --d-sae"),
                Buffer("weights, their gradient or Adam's moments", (d_sae, d_in), 4, _SHAPE),
            ]
            if member.needs_covariance:
                found.append(Buffer("covariance", (d_in, d_in), 8, "the width: name another hook"))
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class RunResult:
    """A finished run: its directory and every member's SAE, by hook and name."""

    path: Path
    saes: dict[str, dict[str, SAE]]


@own_settings
def train_run(
    cfg: TrainConfig,
    source: ActivationSource,
    out: Path,
    progress: Progress = quiet,
    resume: bool = False,
    device: str = "cpu",
    start: Start | None = None,
) -> RunResult:
    """Train a family into the directory `out`, from the SAEs of `start` or from new ones.

    A killed run continues bit for bit with `resume`.

    A finished run of the same config and data is returned as it is. Raises UserError when `out` holds another run
    or an unfinished one and `resume` is not set, and `Stopped` (a KeyboardInterrupt) when interrupted, after
    writing a checkpoint.
    """
    cfg = begun_from(cfg, source, start)
    identity = identity_of(cfg, source, start)
    with held(out):
        if not enter(out, "run", identity, resume):
            return load_run(out)
        with explained("training", lambda: training_buffers(cfg, source.hooks)):
            stats = source.stats(progress)
            family = start_family(cfg, source, stats, device, progress, start=start)
            write_json(out / GAMMA_FILE, family.gamma_record)
            train_job(FamilyJob(cfg, family, source), out, progress)
            saes: dict[str, dict[str, SAE]] = {}
            for hook, member in family.all():
                sae = saes.setdefault(hook, {})[member.name] = finished(member)
                family.gamma_record[hook][member.name] |= write_member(out, hook, member, sae)
            finish_run(out, identity, cfg, family.gamma_record, about(stats))
            return RunResult(out, saes)


def begun_from(cfg: TrainConfig, source: ActivationSource, start: Start | None) -> TrainConfig:
    """Return the config with the digest of what training starts from; raises UserError where it does not fit."""
    if start is not None:
        start.check(cfg, source.hooks)
    return cfg.model_copy(update={"init_from": None if start is None else start.digest()})


def identity_of(
    cfg: TrainConfig, source: ActivationSource, start: Start | None = None
) -> dict[str, Any]:
    """Return what a run is, as its config.json keeps it; where things lie may change."""
    found = {"init_from": start.address} if start is not None else {}
    places = {**source.describe(), **found}
    return {"train": cfg.to_dict(), "data": source.digest(), "source": places}


def load_run(path: Path) -> RunResult:
    """Read a finished run; raises UserError when it is not one, or a file was cut or altered."""
    manifest = read_manifest(path, "run")
    with understood(path / MANIFEST):
        places = {
            hook: {name: contained(path, f"{MEMBERS}/{hook}/{name}") for name in names}
            for hook, names in manifest.info["members"].items()
        }
    saes = {
        hook: {name: SAE.load(place) for name, place in named.items()}
        for hook, named in places.items()
    }
    return RunResult(path, saes)


def about(stats: dict[str, SourceStats]) -> dict[str, dict[str, int | float]]:
    """Return what a run's manifest says of each hook's activations."""
    return {
        "d_in": {hook: s.kept.d_in for hook, s in stats.items()},
        "scale": {hook: power_of_two_scale(s.kept.variance, s.kept.n) for hook, s in stats.items()},
        "rows": {hook: s.kept.n for hook, s in stats.items()},
    }


def write_member(out: Path, hook: str, member: MemberState, sae: SAE) -> dict[str, Any]:
    """Write a trained SAE (scale folded in); return what is new in the record of its gamma."""
    sae.save(out / MEMBERS / hook / member.name)
    moved = member.cfg.gamma.rule == "latent_variance"
    return describe_gamma(member.cfg.gamma, sae.gamma) if moved else {}


def finish_run(
    out: Path,
    identity: dict[str, Any],
    cfg: TrainConfig,
    gamma: dict[str, dict[str, Any]],
    told: dict[str, dict[str, int | float]],
) -> None:
    """Write the record of the loss weights and the manifest, then drop the checkpoints."""
    write_json(out / GAMMA_FILE, gamma)
    members = {hook: cfg.names() for hook in gamma}
    files = [CONFIG, GAMMA_FILE, METRICS_FILE]
    for hook, names in members.items():
        for name in names:
            place = Path(MEMBERS) / hook / name
            files += [str(place / file) for file in (CONFIG, WEIGHTS, MANIFEST)]
    info = {"members": members, **told}
    inputs = {"data": identity["data"]}
    inputs |= {} if cfg.init_from is None else {"init_from": cfg.init_from}
    write_manifest(out, "run", identity, files, inputs=inputs, info=info)
    shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
