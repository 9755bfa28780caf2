"""A training run as a directory: config first, checkpoints on the way, members and manifest last."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsae.acts.stream import ActivationSource
from wsae.acts.tally import SourceStats
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
from wsae.core.errors import understood
from wsae.core.files import write_json
from wsae.core.memory import Buffer, explained
from wsae.core.progress import Progress, quiet
from wsae.losses.gamma import describe_gamma
from wsae.sae.model import WEIGHTS, SparseAutoencoder
from wsae.train.config import TrainConfig
from wsae.train.family import Family, covariances, finished, make_family
from wsae.train.loop import FamilyJob, enter, held, same_run, train_job

# What training allocates, by name: for the message when it does not fit.

_SHAPE = "--d-sae, --expansion or the number of members"


def training_buffers(cfg: TrainConfig, widths: Mapping[str, int]) -> list[Buffer]:
    """Return the buffers of every member's weights and step on hooks of these widths."""
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
            if member.gamma.needs_covariance:
                found.append(Buffer("covariance", (d_in, d_in), 8, "the width: name another hook"))
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class RunResult:
    """A finished run: its directory and every member's SAE, by hook and name."""

    path: Path
    saes: dict[str, dict[str, SparseAutoencoder]]


@own_settings()
def train_run(
    cfg: TrainConfig,
    source: ActivationSource,
    out: Path,
    progress: Progress = quiet,
    resume: bool = False,
    device: str = "cpu",
) -> RunResult:
    """Train a family into the directory `out`; a killed run continues bit for bit with `resume`.

    A finished run of the same config and data is returned as it is. Raises UserError when `out` holds another run
    or an unfinished one and `resume` is not set, and `Stopped` (a KeyboardInterrupt) when interrupted, after
    writing a checkpoint.
    """
    identity = {"train": cfg.to_dict(), "data": source.digest(), "source": source.describe()}
    with held(out):
        if (out / MANIFEST).exists():
            read_manifest(out, "run")
            same_run(out, identity)
            shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)  # killed before it could
            return load_run(out)
        enter(out, identity, resume)
        with explained("training", lambda: training_buffers(cfg, source.hooks)):
            stats = source.stats(progress)
            family = make_family(cfg, stats, device, covariances(cfg, source, stats, progress))
            write_json(out / GAMMA_FILE, family.gamma_record)
            train_job(FamilyJob(cfg, family, source), out, progress)
            return _finish(out, identity, family, stats)


def load_run(path: Path) -> RunResult:
    """Read a finished run; raises UserError when it is not one, or a file was cut or altered."""
    manifest = read_manifest(path, "run")
    with understood(path / MANIFEST):
        places = {
            hook: {name: contained(path, f"{MEMBERS}/{hook}/{name}") for name in names}
            for hook, names in manifest.info["members"].items()
        }
    saes = {
        hook: {name: SparseAutoencoder.load(place) for name, place in named.items()}
        for hook, named in places.items()
    }
    return RunResult(path, saes)


def _finish(
    out: Path, identity: dict[str, Any], family: Family, stats: dict[str, SourceStats]
) -> RunResult:
    """Write the members (scale folded in) and the manifest, then drop the checkpoints."""
    files = [CONFIG, GAMMA_FILE, METRICS_FILE]
    saes: dict[str, dict[str, SparseAutoencoder]] = {}
    for hook, member in family.all():
        sae = finished(member)
        saes.setdefault(hook, {})[member.name] = sae
        place = Path(MEMBERS) / hook / member.name
        sae.save(out / place)
        files += [str(place / name) for name in (CONFIG, WEIGHTS, MANIFEST)]
        if member.cfg.gamma.rule == "latent_variance":
            final = describe_gamma(member.cfg.gamma, sae.gamma)
            family.gamma_record[hook][member.name] |= final
    write_json(out / GAMMA_FILE, family.gamma_record)
    info = {
        "members": {hook: list(named) for hook, named in saes.items()},
        "d_in": {hook: stats[hook].kept.d_in for hook in saes},
        "scale": {hook: members[0].scale for hook, members in family.members.items()},
        "rows": {hook: stats[hook].kept.n for hook in saes},
    }
    write_manifest(out, "run", identity, files, inputs={"data": identity["data"]}, info=info)
    shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
    return RunResult(out, saes)
