"""A training run on many ranks, as the directory that one process would make."""

import contextlib
import shutil
from pathlib import Path
from typing import Any

from wsae.acts.stream import ActivationSource
from wsae.core.artifact import MANIFEST, read_manifest, write_manifest
from wsae.core.errors import UserError
from wsae.core.files import write_json
from wsae.core.progress import Progress, quiet
from wsae.losses.gamma import describe_gamma
from wsae.sae.model import SparseAutoencoder
from wsae.train.config import TrainConfig
from wsae.train.covariance import covariances
from wsae.train.directory import enter, held, same_run
from wsae.train.family import gamma_record, initial_gamma, power_of_two_scale
from wsae.train.parallel.checkpoint import load, place_of
from wsae.train.parallel.config import even_part
from wsae.train.parallel.data import only_hooks, rows_of
from wsae.train.parallel.loop import Recorder, run_steps, stopping
from wsae.train.parallel.shard import Shard, Start, make_shard
from wsae.train.parallel.whole import read_whole
from wsae.train.parallel.world import World


def train_parallel(
    cfg: TrainConfig,
    source: ActivationSource,
    out: Path,
    world: World,
    progress: Progress = quiet,
    resume: bool = False,
) -> Path:
    """Train a family into the directory `out` with all ranks of `world`, and return `out`; every rank calls this.

    The run is that of `train_run` up to the order of fp32 sums, and continues with `resume` on any number of ranks.
    Raises UserError as `train_run` does and for a mesh that does not fit, `Stopped` on all ranks when one is
    interrupted, and RuntimeError from torch.distributed when a rank is gone.
    """
    _check(cfg, source, world)
    with held(out) if world.first else contextlib.nullcontext():
        identity = world.from_first(lambda: _entered(cfg, source, out, resume))
        if identity is None:
            return out
        pairs = [(hook, i) for hook in source.hooks for i in range(len(cfg.members))]
        own = pairs[even_part(len(pairs), world.layout.layers, world.layer)]
        part = only_hooks(source, tuple(dict.fromkeys(hook for hook, _ in own)))
        shards, about = _shards(cfg, part, own, world, progress)
        told = _merged(world.to_first(about if world.place.leads else {}))
        if world.first:
            write_json(out / "gamma.json", told["gamma"])
        rates = {
            f"{hook}|{cfg.names()[i]}": cfg.members[i].learning_rate(source.hooks[hook])
            for hook, i in pairs
        }
        recorder = Recorder(out, cfg, shards, rates, world)
        last = _train(cfg, part, recorder, world, progress)
        finals = world.to_first(_write_members(out, last, shards))
        if world.first:
            _finish(out, identity, _merged([told, *finals]), list(source.hooks), cfg)
        world.from_first(lambda: None)  # nobody leaves before the manifest is there
    return out


def _check(cfg: TrainConfig, source: ActivationSource, world: World) -> None:
    layout, pairs = world.layout, len(source.hooks) * len(cfg.members)
    if layout.data > cfg.batch_size:
        raise UserError(
            f"--mesh data={layout.data}: a batch of {cfg.batch_size} rows leaves a rank without; use fewer"
        )
    if layout.layers > pairs:
        raise UserError(
            f"--mesh layers={layout.layers}: there are {len(source.hooks)} hooks of {len(cfg.members)} members to "
            f"divide; use at most {pairs}"
        )
    if cfg.kernels == "native":
        raise UserError("kernels 'native' are for one process; use auto or eager on several")


def _entered(
    cfg: TrainConfig, source: ActivationSource, out: Path, resume: bool
) -> dict[str, Any] | None:
    """Return the run's identity once `out` is ready for it, None when it holds the finished run."""
    identity = {"train": cfg.to_dict(), "data": source.digest(), "source": source.describe()}
    if (out / MANIFEST).exists():
        read_manifest(out, "run")
        same_run(out, identity)
        shutil.rmtree(out / "checkpoints", ignore_errors=True)  # killed before it could
        return None
    enter(out, identity, resume)
    return identity


def _shards(
    cfg: TrainConfig,
    source: ActivationSource,
    own: list[tuple[str, int]],
    world: World,
    progress: Progress,
) -> tuple[list[Shard], dict[str, Any]]:
    """Return this rank's shards at step 0, and what the run's records say of them."""
    stats = source.stats(progress)
    found = covariances(cfg, source, stats, progress)
    shards, about = [], {"gamma": {}, "d_in": {}, "scale": {}, "rows": {}}
    for hook, number in own:
        s, member = stats[hook], cfg.members[number]
        start = Start(s.kept.mean, s.kept.variance.sqrt(), power_of_two_scale(s.kept))
        shard = make_shard(hook, cfg.names()[number], member, cfg, start, world)
        gamma = initial_gamma(member.gamma, s, found.get(hook))
        shard.member.sae.set_gamma(gamma)
        record = gamma_record(member.gamma, gamma, s, found.get(hook))
        about["gamma"].setdefault(hook, {})[shard.member.name] = record
        about["d_in"][hook], about["rows"][hook] = s.kept.d_in, s.kept.n
        about["scale"][hook] = start.scale
        shards.append(shard)
    return shards, about


def _merged(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return nested dicts as one; where two have a value the later wins."""
    whole: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            whole[key] = _merged([whole.get(key, {}), value]) if isinstance(value, dict) else value
    return whole


def _train(
    cfg: TrainConfig,
    source: ActivationSource,
    recorder: Recorder,
    world: World,
    progress: Progress,
) -> Path:
    """Train to the end and return the checkpoint of the last step, from which the members are written."""
    place = load(recorder.run, recorder.shards, world)
    first = int(place["step"]) if place else 0
    data = world.place.data
    rows = even_part(cfg.batch_size, data.size, data.index)
    stream = rows_of(source, cfg.batch_size, cfg.seed, place["stream"] if place else None, rows)
    recorder.begin(stream, first)
    if world.first:
        recorder.metrics.back_to(place)
    total = cfg.steps * cfg.batch_size
    copied = recorder.mirror.following(recorder.run) if world.first else contextlib.nullcontext()
    with stopping(recorder), copied:
        if first == cfg.steps:  # killed between the last step and the members
            return place_of(recorder.run, first)
        with progress("train", total, "tokens", first * cfg.batch_size) as tick:
            run_steps(
                cfg,
                recorder.shards,
                stream,
                first,
                lambda n, **fields: tick(n, **recorder.fields, **fields),
                recorder.on_step,
            )
    return recorder.save(cfg.steps)


def _write_members(out: Path, last: Path, shards: list[Shard]) -> dict[str, Any]:
    """Write the members this rank speaks for (scale folded in), one after the other, and return their final gamma."""
    told: dict[str, Any] = {"gamma": {}}
    for shard in shards:
        if not shard.piece.place.leads:
            continue
        member = shard.member
        sae = SparseAutoencoder(member.cfg.sae_config(len(member.mean)))
        sae.set_tensors(read_whole(last, f"{shard.key}|sae."), str(last))
        sae = sae.scaled(member.scale).requires_grad_(False)
        sae.save(out / "members" / shard.hook / member.name)
        if member.cfg.gamma.rule == "latent_variance":
            final = describe_gamma(member.cfg.gamma, sae.gamma)
            told["gamma"].setdefault(shard.hook, {})[member.name] = final
    return told


def _finish(
    out: Path, identity: dict[str, Any], told: dict[str, Any], hooks: list[str], cfg: TrainConfig
) -> None:
    """Write the records and the manifest, then drop the checkpoints."""
    names = {hook: cfg.names() for hook in hooks}
    files = ["config.json", "gamma.json", "metrics.jsonl"]
    for hook in hooks:
        for name in names[hook]:
            place = Path("members") / hook / name
            files += [str(place / file) for file in ("config.json", "sae.safetensors", MANIFEST)]
    write_json(out / "gamma.json", told["gamma"])
    info = {"members": names, **{key: told[key] for key in ("d_in", "scale", "rows")}}
    write_manifest(out, "run", identity, files, inputs={"data": identity["data"]}, info=info)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
