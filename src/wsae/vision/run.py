"""A pretraining run as a directory: config first, checkpoints on the way, encoder and manifest last."""

import contextlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsae.acts.images.encoder import Encoder, load_encoder
from wsae.acts.images.sets import ImageSet
from wsae.core.artifact import MANIFEST, read_manifest, write_manifest
from wsae.core.memory import Buffer, explained
from wsae.core.progress import Progress, quiet
from wsae.train.directory import enter, held, same_run, train_job
from wsae.train.metrics import read_json_lines
from wsae.train.parallel.world import World
from wsae.vision.config import PretrainConfig
from wsae.vision.data import make_data
from wsae.vision.pretrainer import Pretrainer
from wsae.vision.ranks import Ranks
from wsae.vision.results import probes

KIND = "pretrain"


@dataclass(frozen=True)
class PretrainResult:
    """A finished run: its directory, its encoder, and what its manifest says of them."""

    path: Path
    encoder: Encoder
    info: dict[str, Any]


def pretrain(
    cfg: PretrainConfig,
    images: ImageSet,
    out: Path,
    progress: Progress = quiet,
    resume: bool = False,
    device: str = "cpu",
) -> PretrainResult:
    """Pretrain an encoder into the directory `out`; a killed run continues bit for bit with `resume`.

    A finished run of the same config and images is returned as it is. Raises UserError when `out` holds another run or
    an unfinished one and `resume` is not set, and `Stopped` (a KeyboardInterrupt) when interrupted, after writing a
    checkpoint.
    """
    with held(out):
        identity = _entered(cfg, images, out, resume)
        if identity is not None:
            job = Pretrainer(cfg, make_data(cfg, images), device)
            with explained("pretraining", lambda: _buffers(cfg)):
                train_job(job, out, progress)
                _finish(out, identity, job, progress)
    return load_pretrained(out)


def pretrain_parallel(
    cfg: PretrainConfig,
    images: ImageSet,
    out: Path,
    world: World,
    progress: Progress = quiet,
    resume: bool = False,
) -> PretrainResult:
    """Pretrain with all processes of `world`, each on an equal part of every batch; every one calls this.

    Negatives are gathered from all; batch normalisation is over all on GPUs, over each process's part on CPUs. The run
    continues with `resume` on any number of processes. Raises what `pretrain` raises, `Stopped` on all processes when
    one is interrupted.
    """
    ranks = Ranks(world)
    ranks.part(cfg.batch_size)
    with held(out) if world.first else contextlib.nullcontext():
        identity = world.from_first(lambda: _entered(cfg, images, out, resume))
        if identity is not None:
            job = Pretrainer(cfg, make_data(cfg, images), world.device, ranks)
            with explained("pretraining", lambda: _buffers(cfg)):
                train_job(job, out, progress, ranks)
            if world.first:
                _finish(out, identity, job, progress)
            world.from_first(lambda: None)  # nobody leaves before the manifest is there
    return load_pretrained(out)


def _entered(
    cfg: PretrainConfig, images: ImageSet, out: Path, resume: bool
) -> dict[str, Any] | None:
    """Return what the run is, noted in `out`, or none when it is there and finished."""
    wanted = cfg.to_dict()
    source = wanted.pop("images")  # images may move: they are compared by digest
    identity = {KIND: wanted, "data": images.digest(), "source": source}
    if (out / MANIFEST).exists():
        read_manifest(out, KIND)
        same_run(out, identity)
        shutil.rmtree(out / "checkpoints", ignore_errors=True)  # killed before it could
        return None
    enter(out, identity, resume)
    return identity


def _buffers(cfg: PretrainConfig) -> list[Buffer]:
    """Return the largest tensors of a step: the first stage's maps, the similarities."""
    side = cfg.size // {"imagenet": 4, "small": 1, "smallest": 2}[cfg.stem]
    views, width = 2 * cfg.batch_size, 2 if cfg.dtype == "bfloat16" else 4
    maps = (views, cfg.widths[0], side, side)
    return [
        Buffer("feature maps of the first stage", maps, width, "--batch-size"),
        Buffer("similarities of the views", (views, views), 4, "--batch-size"),
    ]


def load_pretrained(path: Path) -> PretrainResult:
    """Read a finished run; raises UserError when it is not one, or a file was cut or altered."""
    manifest = read_manifest(path, KIND)
    return PretrainResult(path, load_encoder(path / "encoder"), manifest.info)


def _finish(out: Path, identity: dict[str, Any], job: Pretrainer, progress: Progress) -> None:
    """Write the encoder, what its embeddings know, and the manifest; then drop the checkpoints."""
    encoder = job.encoder.eval()
    files = ["config.json", "metrics.jsonl"]
    files += [f"encoder/{name}" for name in encoder.save(out / "encoder")]
    if job.cfg.stem == "imagenet":
        encoder.backbone.save_pretrained(out / "backbone")
        files += [f"backbone/{p.name}" for p in sorted((out / "backbone").iterdir())]
    rows = read_json_lines(out / "metrics.jsonl")
    info = {
        "steps": job.steps,
        "images": {"train": len(job.data.train), "heldout": len(job.data.heldout)},
        "width": job.cfg.widths[-1],
        "classes": list(job.data.images.names),
        "loss": rows[-1]["loss"],
        "unreadable": {"count": job.data.failures.count, "first": job.data.failures.messages},
        "probes": probes(job, progress),
    }
    write_manifest(out, KIND, identity, files, inputs={"data": identity["data"]}, info=info)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
