"""A pretraining run as a directory: config first, checkpoints on the way, encoder and manifest last."""

import contextlib
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from wsae.acts.images.model import EncoderConfig, ImageEncoder, load_encoder
from wsae.acts.images.sets import ImageSet
from wsae.core.artifact import CHECKPOINTS, CONFIG, METRICS_FILE, read_manifest, write_manifest
from wsae.core.errors import Buffer, UserError, explained
from wsae.core.progress import Progress, Tick, quiet
from wsae.core.seeds import seed_for
from wsae.train.loggers import read_json_lines
from wsae.train.loop import Team, enter, held, train_job
from wsae.train.parallel.world import MAX, Mesh
from wsae.train.step import warmup_cosine
from wsae.vision.config import PretrainConfig
from wsae.vision.data import Augment, Data, crops_from, make_data

# LARS: momentum SGD whose gradients are first scaled per layer.


class LARS(torch.optim.SGD):
    """LARS with a clipped rate, as solo-learn has it; its steps are `torch.optim.SGD`'s.

    Each tensor of two dimensions or more steps along min(eta |w| / (|g| + wd |w| + 1e-8) / lr, 1) (g + wd w); biases
    and norms (one dimension) along g. `pytorch_optimizer.LARS` does not clip, and decays where |g| is 0.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], eta: float, momentum: float, decay: float
    ) -> None:
        super().__init__(groups, lr=1.0, momentum=momentum)
        self.eta, self.decay = eta, decay

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # noqa: ARG002
        """Scale the gradients in place, then take SGD's step."""
        for group in self.param_groups:
            decay = group.get("decay", self.decay)
            layers = [p for p in group["params"] if p.ndim > 1 and p.grad is not None]
            if layers and group["lr"] > 0:
                _scale(layers, self.eta, decay, group["lr"])
        super().step()


def _scale(layers: list[Tensor], eta: float, decay: float, lr: float) -> None:
    gradients = [p.grad for p in layers if p.grad is not None]
    w = torch.stack(torch._foreach_norm(layers))
    g = torch.stack(torch._foreach_norm(gradients))
    share = (eta * w / (g + decay * w + 1e-8) / lr).clamp_max(1.0)
    used = (w > 0) & (g > 0)  # elsewhere the gradient stays as it is, without decay
    weights = torch.where(used, decay * share, 0.0).unbind()
    torch._foreach_mul_(gradients, torch.where(used, share, 1.0).unbind())
    torch._foreach_add_(gradients, torch._foreach_mul(layers, weights))


# InfoNCE over two views of every image, as solo-learn and NCL have it.


def info_nce(
    z: Float[Tensor, "rows out"],
    everyone: Float[Tensor, "all out"],
    first: int,
    temperature: float,
) -> Float[Tensor, ""]:
    """Return the mean over the rows of -log(pos / (pos + neg)), with pos and neg sums of exp(cosine / temperature).

    `z` holds this process's first views, then its second views; `everyone` is all processes' `z` one after another,
    and `z` begins at its row `first`. A row's positive is the other view of its image, its negatives all views of the
    others; the row itself counts as neither. Float32 at least, under autocast too. Raises ValueError when `z` is not
    two views.
    """
    rows = len(z)
    if rows % 2:
        raise ValueError(f"{rows} projections are not two views of the same images")
    with torch.autocast(z.device.type, enabled=False):
        own = _unit(z)
        logits = own @ (own if everyone is z else _unit(everyone)).T / temperature
    row = torch.arange(rows, device=z.device)
    itself = torch.zeros_like(logits, dtype=torch.bool)
    itself[row, first + row] = True
    partner = first + (row + rows // 2) % rows
    return nn.functional.cross_entropy(logits.masked_fill(itself, -torch.inf), partner)


def _unit(z: Float[Tensor, "rows out"]) -> Float[Tensor, "rows out"]:
    """Return rows of length 1, in float32 at least."""
    return nn.functional.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=1)


# What a step trains: the encoder and, beside it, a linear probe that the encoder does not feel.


class Model(nn.Module):
    """Encoder and online probe, which is there when the images have classes."""

    def __init__(self, encoder: ImageEncoder, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(encoder.cfg.widths[-1], classes) if classes else None

    def forward(
        self, views: Float[Tensor, "views 3 size size"]
    ) -> tuple[Float[Tensor, "views out"], Float[Tensor, "views classes"] | None]:
        """Return projections, and the probe's logits (float32)."""
        h, z = self.encoder(views)
        return z, self.logits(h.detach())

    def logits(self, h: Float[Tensor, "rows width"]) -> Float[Tensor, "rows classes"] | None:
        """Return the probe's logits (float32) of embeddings, or none without a probe."""
        if self.classifier is None:
            return None
        with torch.autocast(h.device.type, enabled=False):
            return self.classifier(h.float())


def make_model(cfg: PretrainConfig, data: Data, device: str) -> Model:
    """Return an untrained model; the run's seed decides its weights."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_for(cfg.seed, "encoder"))
        encoder = EncoderConfig(
            stem=cfg.stem,
            widths=cfg.widths,
            projector_hidden=cfg.projector_hidden,
            projector_out=cfg.projector_out,
            positive=cfg.positivity,
            size=cfg.size,
            grey=data.grey,
            mean=data.mean,
            std=data.std,
        )
        model = Model(ImageEncoder(encoder), data.classes if data.labels is not None else 0)
    return model.to(device=device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


# The processes that torchrun started: each takes a part of every batch and sees everyone's
# projections.


class Ranks(Team):
    """One of several processes; with no world, the only one."""

    def __init__(self, world: Mesh | None = None) -> None:
        self.world = world
        self.count = world.layout.ranks if world else 1
        self.rank = world.rank if world else 0

    @property
    def first(self) -> bool:
        """Return whether this process writes."""
        return self.rank == 0

    def part(self, batch_size: int) -> slice:
        """Return this process's part of a batch; raises UserError when the parts are not equal."""
        if batch_size % self.count:
            raise UserError(
                f"--batch-size {batch_size}: {self.count} processes take equal parts; use a multiple of {self.count}"
            )
        size = batch_size // self.count
        return slice(self.rank * size, (self.rank + 1) * size)

    def agree(self, stop: bool, due: bool) -> tuple[bool, bool]:
        """Return whether any process is to stop, and whether the first one's checkpoint is due."""
        if self.world is None:
            return stop, due
        ask = torch.tensor([int(stop), int(due and self.first)], device=self.world.device)
        all_stop, all_due = self.world.reduce_(ask, MAX).tolist()
        return bool(all_stop), bool(all_due)

    def from_first(self, call: Callable[[], Any]) -> Any:
        """Let the first process call and give its JSON-ready result to all."""
        return call() if self.world is None else self.world.from_first(call)

    def mean_(self, values: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Replace values by their mean over the processes."""
        return values if self.world is None else self.world.reduce_(values).div_(self.count)

    def everyone(self, z: Float[Tensor, "rows out"]) -> Float[Tensor, "all out"]:
        """Return all processes' rows one after another, `z` itself where there is one; gradients go back to each."""
        if self.world is None:
            return z
        found = _Gather.apply(z)
        assert isinstance(found, Tensor)
        return found


class _Gather(torch.autograd.Function):
    """all_gather whose backward gives each process the sum of what all found for its rows, as solo-learn has it."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:  # noqa: ARG004
        parts = [torch.empty_like(z) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, z.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ARG004
        gradient = gradients[0].contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


EPOCH_TEST = 2_000
"""Held-out images at most whose accuracy is measured after every epoch."""

Views = tuple[Int64[np.ndarray, " batch"], Float[Tensor, "views 3 size size"]]


class Pretrainer:
    """Pretrains an encoder and, beside it, a linear probe; see `wsae.train.loop.TrainJob`."""

    task, unit = "pretrain", "images"

    def __init__(
        self, cfg: PretrainConfig, data: Data, device: str = "cpu", ranks: Ranks | None = None
    ) -> None:
        self.cfg, self.data, self.device = cfg, data, device
        self.ranks = ranks or Ranks()
        self.part = self.ranks.part(cfg.batch_size)
        self.per_step = cfg.batch_size
        self.per_epoch = len(data.train) // cfg.batch_size
        self.steps = self.per_epoch * cfg.epochs
        self.fields: dict[str, float] = {}
        self.model = make_model(cfg, data, device)
        self._forward: Callable[[Tensor], tuple[Tensor, Tensor | None]] = self.model
        if self.ranks.world is not None:
            if torch.device(device).type == "cuda":
                synced = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
                self.model = cast(Model, synced)
            self._forward = DistributedDataParallel(self.model)
        self.encoder = self.model.encoder
        groups: list[dict[str, Any]] = [{"params": list(self.encoder.parameters())}]
        if self.model.classifier is not None:  # the probe, without weight decay
            groups.append({"params": list(self.model.classifier.parameters()), "decay": 0.0})
        self.optimizer = LARS(groups, cfg.lars.eta, cfg.lars.momentum, cfg.lars.weight_decay)
        self.augment = Augment(cfg.augment, cfg.size, data.grey, cropped=not data.in_memory)
        # loss, share of right answers, steps
        self.sums = torch.zeros(3, device=device, dtype=torch.float32)

    def run(
        self, position: dict[str, Any] | None, tick: Tick, on_step: Callable[[int], None]
    ) -> None:
        """Train from a checkpoint's position, or from the start."""
        first = int(position["step"]) if position else 0
        for step, (index, views) in enumerate(self.batches(first), first):
            self.step(views, self.labels(index), step)
            on_step(step + 1)
            tick(self.per_step)

    def batches(self, first: int) -> Iterator[Views]:
        """Yield the numbers of every step's images and two views of each: all first ones, then all second ones."""
        seeds = ((step, self._seed(step)) for step in range(first, self.steps))
        if self.data.in_memory:
            for step, seed in seeds:
                index = self.data.batch(step, self.cfg.batch_size, self.cfg.seed)[self.part]
                images = self.data.whole(index).to(self.device).float().div_(255)
                yield index, self.ready(self.augment(images.repeat(2, 1, 1, 1), seed))
            return
        for (_, seed), found in zip(
            seeds, crops_from(self.cfg, self.data, self.part, first), strict=True
        ):
            for number, message in found.failed:
                self.data.failures.add(number, message)
            images = found.crops.to(self.device, non_blocking=True).float().div_(255)
            yield found.numbers, self.ready(self.augment(images, seed))

    def _seed(self, step: int) -> int:
        names = ("views", step, self.ranks.rank) if self.ranks.count > 1 else ("views", step)
        return seed_for(self.cfg.seed, *names)

    def ready(self, images: Tensor) -> Float[Tensor, "batch 3 height width"]:
        """Return images as the encoder takes them."""
        return self.encoder.prepare(images).contiguous(memory_format=torch.channels_last)

    def step(
        self,
        views: Float[Tensor, "views 3 size size"],
        labels: Int64[Tensor, " batch"] | None,
        step: int,
    ) -> None:
        """Take one optimiser step; `views` and `labels` are this process's part of the batch."""
        self.model.train()
        loss, right = self.gradients(views, labels)
        peaks = (self.cfg.lr, self.cfg.classifier_lr)
        for group, peak in zip(self.optimizer.param_groups, peaks, strict=False):
            group["lr"] = self._rate(step, peak)
        self.optimizer.step()
        seen = torch.stack([loss, right, torch.ones_like(loss)])
        self.sums += self.ranks.mean_(seen)

    def gradients(
        self, views: Float[Tensor, "views 3 size size"], labels: Int64[Tensor, " batch"] | None
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Leave the batch's gradients in the parameters; returns this process's loss and the probe's accuracy."""
        self.optimizer.zero_grad(set_to_none=True)
        with self._precision():
            z, logits = self._forward(views)
        first = 2 * self.part.start
        loss = total = info_nce(z, self.ranks.everyone(z), first, self.cfg.temperature)
        right = loss.new_zeros(())
        if logits is not None and labels is not None:
            twice = labels.repeat(2)
            total = loss + nn.functional.cross_entropy(logits, twice)
            right = (logits.detach().argmax(1) == twice).float().mean()
        total.backward()
        return loss.detach(), right

    def _precision(self) -> torch.autocast:
        kind = torch.device(self.device).type
        return torch.autocast(kind, torch.bfloat16, enabled=self.cfg.dtype == "bfloat16")

    def _rate(self, step: int, peak: float) -> float:
        warmup = self.cfg.warmup_epochs * self.per_epoch
        return warmup_cosine(step, self.steps, warmup, self.cfg.lars.warmup_from, peak)

    def labels(self, index: Int64[np.ndarray, " batch"]) -> Int64[Tensor, " batch"] | None:
        """Return the images' classes on the device; none without."""
        labels = self.data.labels
        return None if labels is None else labels[torch.from_numpy(index)].to(self.device)

    @torch.no_grad()
    def embed(
        self, index: Int64[np.ndarray, " n"], tick: Tick | None = None
    ) -> tuple[Int64[np.ndarray, " kept"], Float[Tensor, "kept width"]]:
        """Return the numbers and embeddings of the readable ones of these images, whole, in evaluation mode."""
        self.model.eval()
        numbers, found = [], []
        for kept, images in self.data.squares(index):
            with self._precision():
                found.append(self.encoder(self.ready(images.to(self.device)))[0].float())
            numbers.append(kept)
            if tick:
                tick(len(kept))
        return np.concatenate(numbers), torch.cat(found)

    def due(self, done: int) -> bool:
        """Return whether a row of metrics is due: every `log_every` steps and at the end of an epoch."""
        return done % self.cfg.log_every == 0 or done % self.per_epoch == 0

    def rows(self, done: int) -> Iterator[dict[str, Any]]:
        """Yield the means since the last row; at the end of an epoch with the probe's held-out accuracy."""
        loss, right, steps = self.sums.tolist()
        self.sums.zero_()
        row = {
            "step": done,
            "images": done * self.per_step,
            "epoch": done / self.per_epoch,
            "loss": loss / steps,
            "lr": self._rate(done - 1, self.cfg.lr),
        }
        if self.data.labels is not None:
            row["accuracy"] = right / steps
            if done % self.per_epoch == 0 and (found := self._heldout_accuracy()) is not None:
                row["heldout_accuracy"] = found
        shown = ("loss", "accuracy", "heldout_accuracy")
        self.fields |= {key: row[key] for key in shown if key in row}
        yield row

    @torch.no_grad()
    def _heldout_accuracy(self) -> float | None:
        if not len(self.data.heldout):
            return None
        index, h = self.embed(_some(self.data.heldout, EPOCH_TEST))
        logits, labels = self.model.logits(h), self.labels(index)
        assert logits is not None
        assert labels is not None
        return float((logits.argmax(1) == labels).float().mean()) if len(index) else None

    def position(self) -> dict[str, Any]:
        """Return nothing: the step decides images and views."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """Return weights, batch statistics, momenta and the sums of metrics."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            buffer = self.optimizer.state.get(parameter, {}).get("momentum_buffer")
            if buffer is not None:
                tensors[f"momentum.{name}"] = buffer
        return tensors | {"sums": self.sums}

    def restore(self, tensors: dict[str, Tensor], where: str) -> None:
        """Take back what `tensors` returned; raises UserError when they are another encoder's."""
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "momentum": {}, "sums": {}}
        for key, value in tensors.items():
            head, _, rest = key.partition(".")
            parts.setdefault(head, {})[rest] = value
        try:
            self.model.load_state_dict(parts["model"])
            self.sums.copy_(tensors["sums"])
            for name, parameter in self.model.named_parameters():
                if name in parts["momentum"]:
                    buffer = torch.empty_like(parameter).copy_(parts["momentum"][name])
                    self.optimizer.state[parameter]["momentum_buffer"] = buffer.detach()
        except (RuntimeError, KeyError) as error:
            raise UserError(
                f"{where}: holds another encoder than this run's config; use another --out"
            ) from error


# What frozen embeddings know of the classes: nearest neighbours, and a linear probe beside one on
# raw pixels.

K, KNN_TRAIN = 20, 20_000
PROBE_TRAIN, PROBE_TEST = 50_000, 20_000
"""Images at most behind each probe."""


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
    """Return the accuracy of the k nearest by cosine, each voting with exp(cosine / temperature) (solo-learn)."""
    from sklearn.neighbors import KNeighborsClassifier

    votes = {"weights": lambda distance: np.exp((1 - distance) / temperature), "metric": "cosine"}
    model = KNeighborsClassifier(min(k, len(train)), **votes)
    model.fit(train.numpy(), train_labels.numpy())
    return float(model.score(test.numpy(), test_labels.numpy()))


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
    x, y = scaler.fit_transform(train.numpy()), train_labels.numpy()
    model = LogisticRegression(max_iter=200, tol=1e-3, random_state=seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(x, y)
    right = float(model.score(scaler.transform(test.numpy()), test_labels.numpy()))
    unfinished = any(issubclass(w.category, ConvergenceWarning) for w in caught)
    return ProbeResult(right, len(train), len(test), not unfinished)


def pixels(images: Tensor, side: int = 32) -> Float[Tensor, "batch pixels"]:
    """Return images as rows of pixels in [0, 1], those larger than `side` averaged down to it."""
    x = images.float() / 255
    if max(x.shape[-2:]) > side:
        x = nn.functional.adaptive_avg_pool2d(x, side)
    return x.flatten(1)


# What a finished run says of its encoder: probes of the frozen embeddings, beside raw pixels.


def probes(job: Pretrainer, progress: Progress) -> dict[str, Any] | None:
    """Return held-out accuracies of embeddings and of raw pixels; none without two classes or images to test on."""
    data = job.data
    if data.labels is None or not len(data.heldout):
        return None
    train, test = _some(data.train, PROBE_TRAIN), _some(data.heldout, PROBE_TEST)
    with progress("embed", len(train) + len(test), "images") as tick:
        (train, x), (test, x_test) = job.embed(train, tick), job.embed(test, tick)
    x, x_test = x.cpu(), x_test.cpu()
    y, y_test = (data.labels[torch.from_numpy(index)] for index in (train, test))
    if not len(test) or len(y.unique()) < 2:
        return None
    near = _some(np.arange(len(train)), KNN_TRAIN)
    with progress("probe", 3, "probes") as tick:
        knn = knn_accuracy(x[near], y[near], x_test, y_test)
        tick(1)
        linear = linear_probe(x, y, x_test, y_test, job.cfg.seed)
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
    world: Mesh | None = None,
) -> PretrainResult:
    """Pretrain an encoder into the directory `out`; a killed run continues bit for bit with `resume`.

    With a `world` every one of its processes calls this, on its device, and takes an equal part of every batch.
    Negatives are gathered from all; batch normalisation is over all on GPUs, over each process's part on CPUs. The run
    continues on any number of processes.

    A finished run of the same config and images is returned as it is. Raises UserError when `out` holds another run or
    an unfinished one and `resume` is not set, and `Stopped` (a KeyboardInterrupt, on all processes) when interrupted,
    after writing a checkpoint.
    """
    ranks, device = Ranks(world), device if world is None else world.device
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
