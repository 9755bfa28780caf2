"""A training run as a directory: config first, checkpoints on the way, members and manifest last."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsae.acts.stream import ActivationSource
from wsae.acts.tally import SourceStats
from wsae.core.artifact import MANIFEST, contained, read_manifest, write_manifest
from wsae.core.calls import own_settings
from wsae.core.errors import understood
from wsae.core.files import write_json
from wsae.core.memory import explained
from wsae.core.progress import Progress, quiet
from wsae.losses.gamma import describe_gamma
from wsae.sae.model import SparseAutoencoder
from wsae.train.config import TrainConfig
from wsae.train.covariance import covariances
from wsae.train.directory import enter, held, same_run, train_job
from wsae.train.family import Family, finished, make_family
from wsae.train.job import FamilyJob
from wsae.train.memory import training_buffers


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
            shutil.rmtree(out / "checkpoints", ignore_errors=True)  # killed before it could
            return load_run(out)
        enter(out, identity, resume)
        with explained("training", lambda: training_buffers(cfg, source.hooks)):
            stats = source.stats(progress)
            family = make_family(cfg, stats, device, covariances(cfg, source, stats, progress))
            write_json(out / "gamma.json", family.gamma_record)
            train_job(FamilyJob(cfg, family, source), out, progress)
            return _finish(out, identity, family, stats)


def load_run(path: Path) -> RunResult:
    """Read a finished run; raises UserError when it is not one, or a file was cut or altered."""
    manifest = read_manifest(path, "run")
    with understood(path / MANIFEST):
        places = {
            hook: {name: contained(path, f"members/{hook}/{name}") for name in names}
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
    files = ["config.json", "gamma.json", "metrics.jsonl"]
    saes: dict[str, dict[str, SparseAutoencoder]] = {}
    for hook, member in family.all():
        sae = finished(member)
        saes.setdefault(hook, {})[member.name] = sae
        place = Path("members") / hook / member.name
        sae.save(out / place)
        files += [str(place / name) for name in ("config.json", "sae.safetensors", MANIFEST)]
        if member.cfg.gamma.rule == "latent_variance":
            final = describe_gamma(member.cfg.gamma, sae.gamma)
            family.gamma_record[hook][member.name] |= final
    write_json(out / "gamma.json", family.gamma_record)
    info = {
        "members": {hook: list(named) for hook, named in saes.items()},
        "d_in": {hook: stats[hook].kept.d_in for hook in saes},
        "scale": {hook: members[0].scale for hook, members in family.members.items()},
        "rows": {hook: stats[hook].kept.n for hook in saes},
    }
    write_manifest(out, "run", identity, files, inputs={"data": identity["data"]}, info=info)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    return RunResult(out, saes)
