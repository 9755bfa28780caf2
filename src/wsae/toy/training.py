"""Trains toy models side by side: a share of them per processor core, each share in chunks that fit the cache."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float64
from torch import Tensor

from wsae.core.progress import Tick
from wsae.core.seeds import seed_for
from wsae.toy.config import DecayingImportance, ToyModelConfig
from wsae.toy.descent import AdamW, Gradients, Parameters, chunk_size, toy_loss
from wsae.toy.features import FeatureStream

_EVAL_BATCHES = 20
_TICK = 100
"""Steps between two reports of progress."""


@dataclass(frozen=True)
class Job:
    """Models of one shape and schedule, where and in what precision to train them, and a way to call it off."""

    cfgs: tuple[ToyModelConfig, ...]
    device: str
    dtype: torch.dtype
    called_off: threading.Event = field(default_factory=threading.Event)

    @property
    def schedule(self) -> ToyModelConfig:
        """Any of the models: they agree in shape and schedule."""
        return self.cfgs[0]

    def share(self, first: int, last: int) -> "Job":
        """Return the job of members first .. last - 1."""
        return replace(self, cfgs=self.cfgs[first:last])

    def stream(self, use: str) -> FeatureStream:
        """Return the members' rows: "train" by step, or "eval", which training never sees."""
        seeds = [seed_for(cfg.seed, "toy", use) for cfg in self.cfgs]
        features = [cfg.features for cfg in self.cfgs]
        return FeatureStream(features, seeds, self.schedule.batch, self.device)

    def chunks(self) -> list[tuple[int, int]]:
        """Return the ranges of members computed at once."""
        n, rows, members = self.schedule.features.n_features, self.schedule.batch, len(self.cfgs)
        bits = torch.finfo(self.dtype).bits
        size = min(members, chunk_size(rows, n, bits // 8))
        return [(first, min(first + size, members)) for first in range(0, members, size)]


def side_by_side(job: Job, tick: Tick) -> tuple[Parameters, Float64[Tensor, " models"]]:
    """Train every member; return parameters and losses on the CPU, in order.

    Members do not depend on each other, so each core takes some of them from start to end.
    """
    workers = 1 if job.device != "cpu" else min(torch.get_num_threads(), len(job.cfgs))
    edges = [len(job.cfgs) * i // workers for i in range(workers + 1)]
    jobs = [job.share(*pair) for pair in zip(edges, edges[1:], strict=False)]
    if workers == 1:
        parts = [_train(job, tick)]
    else:
        with _pool(workers, job.called_off) as pool:
            parts = list(pool.map(lambda share: _stopping_all(share, tick), jobs))
    weights, losses = zip(*parts, strict=True)
    both = (torch.cat(tensors) for tensors in zip(*weights, strict=True))
    return Parameters(*both), torch.cat(losses)


@contextmanager
def _pool(workers: int, called_off: threading.Event) -> Iterator[ThreadPoolExecutor]:
    """Threads of which each computes on one core; an interrupt stops all of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(workers, "wsae-toy", torch.set_num_threads, (1,))
    try:
        yield pool
    finally:
        called_off.set()
        pool.shutdown()
        torch.set_num_threads(before)


def _stopping_all(job: Job, tick: Tick) -> tuple[Parameters, Float64[Tensor, " models"]]:
    """Train a share; where it fails, the others need not run to their end first."""
    try:
        return _train(job, tick)
    except BaseException:
        job.called_off.set()
        raise


def _train(job: Job, tick: Tick) -> tuple[Parameters, Float64[Tensor, " models"]]:
    shared, chunks, members = job.schedule, job.chunks(), len(job.cfgs)
    parameters = initial(job.cfgs, job.device, job.dtype)
    importance = torch.stack([importances(cfg) for cfg in job.cfgs]).to(job.device, job.dtype)
    gradients, optimiser = parameters.zeros(), AdamW(parameters, shared.weight_decay)
    compute = Gradients(chunks[0][1], shared.batch, parameters)
    stream = job.stream("train")
    for step in range(shared.steps):
        if job.called_off.is_set():
            break
        for first, last in chunks:
            x = stream.batch(step, first, last).to(job.dtype)
            compute(
                parameters.part(first, last), importance[first:last], x, gradients.part(first, last)
            )
        optimiser.step(gradients, shared.lr * lr_factor(step, shared.steps, shared.decay))
        if (step + 1) % _TICK == 0 or step + 1 == shared.steps:
            tick((step % _TICK + 1) * members)
    loss = _fresh_loss(job, parameters, importance)
    return Parameters(*(t.cpu() for t in parameters)), loss


def initial(cfgs: Sequence[ToyModelConfig], device: str, dtype: torch.dtype) -> Parameters:
    """Return starting points by seed: W_p normal with variance 2 / (d_in (n_features + 1)), b = 0.

    That is the variance of the reference notebook (Xavier's rule on a tensor of three axes). Xavier's rule on the
    matrix alone starts larger, and at low S several outputs then never fire in training.
    """
    weights = []
    for cfg in cfgs:
        n, d_in = cfg.features.n_features, cfg.d_in
        generator = torch.Generator().manual_seed(seed_for(cfg.seed, "toy", "init"))
        normal = torch.randn(d_in, n, generator=generator, dtype=torch.float64)
        weights.append(normal * (2 / (d_in * (n + 1))) ** 0.5)
    W_p = torch.stack(weights).to(device, dtype)
    return Parameters(W_p, W_p.new_zeros(len(cfgs), W_p.shape[2]))


def importances(cfg: ToyModelConfig) -> Float64[Tensor, " n_features"]:
    """Return the weight of each feature in the loss, largest first."""
    n = cfg.features.n_features
    if not isinstance(cfg.importance, DecayingImportance):
        return torch.ones(n, dtype=torch.float64)
    base, last = cfg.importance.base, cfg.importance.last
    base = base if last is None else last ** (1 / max(1, n - 1))
    return base ** torch.arange(n, dtype=torch.float64)


def lr_factor(step: int, steps: int, decay: float) -> float:
    """Return the share of the learning rate: 1, then linear to 0 over the last `decay` share of the steps."""
    return min(1.0, (steps - step) / max(1.0, decay * steps))


def _fresh_loss(job: Job, parameters: Parameters, importance: Tensor) -> Tensor:
    """Return each member's loss on rows it was not trained on, the same draws for the members of a seed."""
    stream, loss = job.stream("eval"), torch.zeros(len(job.cfgs), dtype=torch.float64)
    for step in range(_EVAL_BATCHES):
        for first, last in job.chunks():
            x = stream.batch(step, first, last).to(job.dtype)
            part = toy_loss(parameters.part(first, last), importance[first:last], x)
            loss[first:last] += part.cpu().double() / _EVAL_BATCHES
    return loss
