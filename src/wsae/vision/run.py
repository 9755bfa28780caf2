"""A pretraining run as a directory: config first, checkpoints on the way, encoder and manifest last."""

import contextlib
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from wsae.acts.images.model import ImageEncoder, load_encoder
from wsae.acts.images.sets import ImageSet
from wsae.core.artifact import CHECKPOINTS, CONFIG, METRICS_FILE, read_manifest, write_manifest
from wsae.core.memory import Buffer, explained
from wsae.core.progress import Progress, quiet
from wsae.train.loop import enter, held, train_job
from wsae.train.metrics import read_json_lines
from wsae.train.parallel.world import Mesh
from wsae.vision.config import PretrainConfig
from wsae.vision.data import Data, make_data
from wsae.vision.pretrainer import Pretrainer, Ranks

# What frozen embeddings know of the classes: nearest neighbours, and a linear probe beside one on
# raw pixels.

K, KNN_TRAIN = 20, 20_000
PROBE_TRAIN, PROBE_TEST = 50_000, 20_000
"""Images at most behind each probe."""
_CELLS = 5_000_000


class ProbeResult(NamedTuple):
    """Accuracy on images that were held out, and how many rows there were."""

    accuracy: float
    train: int
    test: int
    converged: bool


def knn_accuracy(
    train: Float[Tensor, "train width"],
    train_labels: Int64[Tensor, " train"],
    test: Float[Tensor, "test width"],
    test_labels: Int64[Tensor, " test"],
    k: int = K,
    temperature: float = 0.07,
) -> float:
    """Return the accuracy of the k nearest by cosine, each voting with exp(cosine / temperature).

    As solo-learn has it.
    """
    train, test = nn.functional.normalize(train, dim=1), nn.functional.normalize(test, dim=1)
    k, classes = min(k, len(train)), int(train_labels.max()) + 1
    right, rows = 0, max(1, _CELLS // len(train))
    for part, truth in zip(test.split(rows), test_labels.split(rows), strict=True):
        near = (part @ train.T).topk(k, dim=1)
        votes = torch.zeros(len(part), classes, device=part.device, dtype=torch.float32)
        votes.scatter_add_(1, train_labels[near.indices], (near.values / temperature).exp())
        right += int((votes.argmax(1) == truth).sum())
    return right / len(test)


def linear_probe(
    train: Float[Tensor, "train width"],
    train_labels: Int64[Tensor, " train"],
    test: Float[Tensor, "test width"],
    test_labels: Int64[Tensor, " test"],
    seed: int = 0,
) -> ProbeResult:
    """Fit a multinomial logistic regression on standardised rows and return its accuracy on the test rows."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler()
    x, y = scaler.fit_transform(train.cpu().numpy()), train_labels.cpu().numpy()
    model = LogisticRegression(max_iter=200, tol=1e-3, random_state=seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(x, y)
    right = model.predict(scaler.transform(test.cpu().numpy())) == test_labels.cpu().numpy()
    unfinished = any(issubclass(w.category, ConvergenceWarning) for w in caught)
    return ProbeResult(float(np.mean(right)), len(train), len(test), not unfinished)


def pixels(images: Tensor, side: int = 32) -> Float[Tensor, "batch pixels"]:
    """Return images as rows of pixels in [0, 1], those larger than `side` averaged down to it."""
    x = images.float() / 255
    if max(x.shape[-2:]) > side:
        x = nn.functional.adaptive_avg_pool2d(x, side)
    return x.flatten(1)


# What a finished run says of its encoder: probes of the frozen embeddings, beside raw pixels.


def probes(job: Pretrainer, progress: Progress) -> dict[str, Any] | None:
    """Return held-out accuracies of embeddings and of raw pixels; none without two classes or held-out images."""
    data = job.data
    if data.labels is None or not len(data.heldout):
        return None
    train, test = _some(data.train, PROBE_TRAIN), _some(data.heldout, PROBE_TEST)
    with progress("embed", len(train) + len(test), "images") as tick:
        (train, x), (test, x_test) = job.embed(train, tick), job.embed(test, tick)
    y, y_test = (data.labels[torch.from_numpy(index)] for index in (train, test))
    near = _some(np.arange(len(train)), KNN_TRAIN)
    with progress("probe", 3, "probes") as tick:
        knn = knn_accuracy(x[near], y[near].to(x.device), x_test, y_test.to(x.device))
        tick(1)
        linear = linear_probe(x.cpu(), y, x_test.cpu(), y_test, job.cfg.seed)
        tick(1)
        raw = linear_probe(_pixels(data, train), y, _pixels(data, test), y_test, job.cfg.seed)
        tick(1)
    return {
        "linear": linear._asdict(),
        "raw_pixels": raw._asdict(),
        "knn": {"accuracy": knn, "k": K, "train": len(near), "test": len(test)},
    }


def _some(index: Int64[np.ndarray, " n"], most: int) -> Int64[np.ndarray, " some"]:
    """Return at most so many, spread evenly, since images may be sorted by class."""
    if len(index) <= most:
        return index
    return index[np.linspace(0, len(index) - 1, most).round().astype(np.int64)]


def _pixels(data: Data, index: Int64[np.ndarray, " n"]) -> Float[Tensor, "n pixels"]:
    return torch.cat([pixels(images) for _, images in data.squares(index)])


KIND = "pretrain"


@dataclass(frozen=True)
class PretrainResult:
    """A finished run: its directory, its encoder, and what its manifest says of them."""

    path: Path
    encoder: ImageEncoder
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
    return _pretrained(cfg, images, out, Ranks(), device, progress, resume)


def pretrain_parallel(
    cfg: PretrainConfig,
    images: ImageSet,
    out: Path,
    world: Mesh,
    progress: Progress = quiet,
    resume: bool = False,
) -> PretrainResult:
    """Pretrain with all processes of `world`, each on an equal part of every batch; every one calls this.

    Negatives are gathered from all; batch normalisation is over all on GPUs, over each process's part on CPUs. The run
    continues with `resume` on any number of processes. Raises what `pretrain` raises, `Stopped` on all processes when
    one is interrupted.
    """
    return _pretrained(cfg, images, out, Ranks(world), world.device, progress, resume)


def _pretrained(
    cfg: PretrainConfig,
    images: ImageSet,
    out: Path,
    ranks: Ranks,
    device: str,
    progress: Progress,
    resume: bool,
) -> PretrainResult:
    ranks.part(cfg.batch_size)  # raises where there are no equal parts
    with held(out) if ranks.first else contextlib.nullcontext():
        identity = ranks.from_first(lambda: _entered(cfg, images, out, resume))
        if identity is not None:
            job = Pretrainer(cfg, make_data(cfg, images), device, ranks)
            with explained("pretraining", lambda: _buffers(cfg)):
                train_job(job, out, progress, ranks)
                if ranks.first:
                    _finish(out, identity, job, progress)
            ranks.from_first(lambda: None)  # nobody leaves before the manifest is there
    return load_pretrained(out)


def _entered(
    cfg: PretrainConfig, images: ImageSet, out: Path, resume: bool
) -> dict[str, Any] | None:
    """Return what the run is, noted in `out`, or none when it is there and finished."""
    wanted = cfg.to_dict()
    source = wanted.pop("images")  # images may move: they are compared by digest
    identity = {KIND: wanted, "data": images.digest(), "source": source}
    return identity if enter(out, KIND, identity, resume) else None


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
    files = [CONFIG, METRICS_FILE]
    files += [f"encoder/{name}" for name in encoder.save(out / "encoder")]
    if job.cfg.stem == "imagenet":
        encoder.backbone.save_pretrained(out / "backbone")
        files += [f"backbone/{p.name}" for p in sorted((out / "backbone").iterdir())]
    rows = read_json_lines(out / METRICS_FILE)
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
    shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
