"""The trained toy model of superposition: where superposition matrices W_p come from (paper Section 5.1).

Many at once, a share of them per processor core: nothing is summed across members.

x_p = W_p x,  x_hat = ReLU(W_p^T x_p + b),  loss = mean_i importance_i (x_i - x_hat_i)^2  (Elhage et al. 2022).
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from wsae.core.artifact import MANIFEST, read_manifest, write_manifest
from wsae.core.calls import one_thread
from wsae.core.errors import UserError, understood
from wsae.core.progress import Progress, Tick, quiet
from wsae.core.seeds import seed_for
from wsae.core.tensors import load_tensors, save_tensors
from wsae.toy.config import DecayingImportance, ToyModelConfig
from wsae.toy.features import FeatureStream

BETAS, EPS = (0.9, 0.999), 1e-8
_CACHE_BYTES = 4 << 20
"""Size of a chunk's intermediates: they stay in the processor's second and third level cache."""


class Parameters(NamedTuple):
    """W_p and b of every member, or their gradients or moments."""

    W_p: Float[Tensor, "models d_in n_features"]
    b: Float[Tensor, "models n_features"]

    def part(self, members: slice) -> "Parameters":
        """Return some of the members (views)."""
        return Parameters(self.W_p[members], self.b[members])

    def zeros(self) -> "Parameters":
        """Return zeros of the same shapes."""
        return Parameters(torch.zeros_like(self.W_p), torch.zeros_like(self.b))


def toy_loss(
    parameters: Parameters,
    importance: Float[Tensor, "models n_features"],
    x: Float[Tensor, "models rows n_features"],
) -> Float[Tensor, " models"]:
    """Return mean over rows and features of importance_i (x_i - ReLU(W_p^T W_p x + b)_i)^2, per member."""
    h = torch.bmm(x, parameters.W_p.mT)
    x_hat = torch.baddbmm(parameters.b[:, None], h, parameters.W_p).relu_()
    return (x_hat.sub_(x).square_() * importance[:, None]).mean((1, 2))


class Gradients:
    """Gradients of `toy_loss` for chunks of members, in buffers that are reused."""

    def __init__(self, chunk: int, rows: int, like: Parameters) -> None:
        d_in, n = like.W_p.shape[1:]
        make = like.W_p.new_empty
        self._pre, self._error = make(chunk, rows, n), make(chunk, rows, n)
        self._h, self._dh = make(chunk, d_in, rows), make(chunk, d_in, rows)

    def __call__(
        self,
        parameters: Parameters,
        importance: Float[Tensor, "models n_features"],
        x: Float[Tensor, "models rows n_features"],
        out: Parameters,
    ) -> None:
        """Write d toy_loss / d (W_p, b) into `out`.

        With e = (pre - x) where pre > 0 and scale = 2 importance / (rows n): db = scale sum e and
        dW_p = (h^T e) scale + (e scale W_p^T)^T x, h being x_p = W_p x.
        """
        m, (W_p, b) = len(x), parameters
        pre, error, h, dh = self._pre[:m], self._error[:m], self._h[:m], self._dh[:m]
        scale = importance * (2 / (x.shape[1] * x.shape[2]))
        torch.bmm(W_p, x.mT, out=h)  # [d_in, rows]: the faster way round when d_in is small
        torch.baddbmm(b[:, None], h.mT, W_p, out=pre)
        torch.sub(pre, x, out=error)
        torch.ops.aten.threshold_backward.grad_input(error, pre, 0, grad_input=error)
        torch.sum(error, 1, out=out.b).mul_(scale)
        torch.bmm(W_p * scale[:, None], error.mT, out=dh)
        torch.bmm(h, error, out=out.W_p).mul_(scale[:, None])
        out.W_p.baddbmm_(dh, x)


class AdamW:
    """AdamW over all members (Loshchilov and Hutter 2019), as torch.optim.AdamW computes it."""

    def __init__(self, parameters: Parameters, weight_decay: float) -> None:
        self._parameters, self._weight_decay = parameters, weight_decay
        self._mean, self._square = parameters.zeros(), parameters.zeros()
        self._root = parameters.zeros()  # scratch
        self._step = 0

    def step(self, gradients: Parameters, lr: float) -> None:
        """Update the parameters in place."""
        self._step += 1
        first, second = (1 - beta**self._step for beta in BETAS)
        every = (self._parameters, gradients, self._mean, self._square, self._root)
        for p, g, mean, square, root in zip(*every, strict=True):
            mean.lerp_(g, 1 - BETAS[0])
            square.mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
            torch.sqrt(square, out=root).div_(second**0.5).add_(EPS)
            p.mul_(1 - lr * self._weight_decay).addcdiv_(mean, root, value=-lr / first)


_EVAL_BATCHES = 20
_TICK = 100
"""Steps between two reports of progress."""


@dataclass(frozen=True)
class ToyJob:
    """Models of one shape and schedule, where and in what precision to train them, and a way to call it off."""

    cfgs: tuple[ToyModelConfig, ...]
    device: str
    dtype: torch.dtype
    called_off: threading.Event = field(default_factory=threading.Event)

    def batches(self, use: str) -> Callable[[int], Iterator[tuple[slice, Tensor]]]:
        """Return what yields each chunk of members with its rows of a step.

        Rows are for "train", or for "eval", which training never sees. A chunk's three [rows, n_features]
        intermediates fit the cache.
        """
        batch, n = self.cfgs[0].batch, self.cfgs[0].features.n_features
        seeds = [seed_for(cfg.seed, "toy", use) for cfg in self.cfgs]
        stream = FeatureStream([cfg.features for cfg in self.cfgs], seeds, batch, self.device)
        size = max(1, _CACHE_BYTES // (3 * batch * n * self.dtype.itemsize))

        def step(number: int) -> Iterator[tuple[slice, Tensor]]:
            for first in range(0, len(self.cfgs), size):
                last = min(first + size, len(self.cfgs))
                yield slice(first, last), stream.batch(number, first, last).to(self.dtype)

        return step


def side_by_side(job: ToyJob, tick: Tick) -> tuple[Parameters, Float64[Tensor, " models"]]:
    """Train every member; return parameters and losses on the CPU, in order.

    Members do not depend on each other, so each core takes some of them from start to end. An interrupt, or a share
    that fails, stops all of them.
    """
    workers = 1 if job.device != "cpu" else min(torch.get_num_threads(), len(job.cfgs))
    edges = [len(job.cfgs) * i // workers for i in range(workers + 1)]
    shares = [replace(job, cfgs=job.cfgs[first:last]) for first, last in pairwise(edges)]

    def trained(share: ToyJob) -> tuple[Parameters, Tensor]:
        try:
            return _train(share, tick)
        except BaseException:
            job.called_off.set()
            raise

    if workers == 1:
        parts = [_train(job, tick)]
    else:
        with (
            one_thread(),
            ThreadPoolExecutor(workers, "wsae-toy", torch.set_num_threads, (1,)) as pool,
        ):
            try:
                parts = list(pool.map(trained, shares))
            finally:
                job.called_off.set()
    weights, losses = zip(*parts, strict=True)
    return Parameters(*(torch.cat(both) for both in zip(*weights, strict=True))), torch.cat(losses)


def _train(job: ToyJob, tick: Tick) -> tuple[Parameters, Float64[Tensor, " models"]]:
    """Return a share's parameters and each member's loss on fresh rows, the same draws for the members of a seed."""
    shared, members = job.cfgs[0], len(job.cfgs)
    parameters = initial(job.cfgs, job.device, job.dtype)
    importance = torch.stack([importances(cfg) for cfg in job.cfgs]).to(job.device, job.dtype)
    gradients, optimiser = parameters.zeros(), AdamW(parameters, shared.weight_decay)
    compute: Gradients | None = None
    batches = job.batches("train")
    for step in range(shared.steps):
        if job.called_off.is_set():
            break
        for part, x in batches(step):
            compute = compute or Gradients(len(x), shared.batch, parameters)
            compute(parameters.part(part), importance[part], x, gradients.part(part))
        optimiser.step(gradients, shared.lr * lr_factor(step, shared.steps, shared.decay))
        if (step + 1) % _TICK == 0 or step + 1 == shared.steps:
            tick((step % _TICK + 1) * members)
    loss, fresh = torch.zeros(members, dtype=torch.float64), job.batches("eval")
    for step in range(_EVAL_BATCHES):
        for part, x in fresh(step):
            value = toy_loss(parameters.part(part), importance[part], x)
            loss[part] += value.cpu().double() / _EVAL_BATCHES
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


WEIGHTS = "toy.safetensors"


@dataclass(frozen=True)
class ToyModels:
    """Trained toy models: column i of `W_p[m]` [d_in, n_features] is the direction of feature i in model m."""

    W_p: Float[Tensor, "models d_in n_features"]
    b: Float[Tensor, "models n_features"]
    loss: Float64[Tensor, " models"]
    """The training loss, mean over rows and features, on fresh rows."""
    configs: tuple[ToyModelConfig, ...]

    def represented(self, above: float = 0.5) -> list[int]:
        """Return how many features each model represents: those with ||W_p,i|| > `above`."""
        return (self.W_p.norm(dim=1) > above).sum(1).tolist()

    def save(self, path: Path | str) -> None:
        """Write the models to a directory: toy.safetensors, manifest.json last."""
        path = Path(path)
        (path / MANIFEST).unlink(missing_ok=True)  # of other models
        save_tensors(path / WEIGHTS, {"W_p": self.W_p, "b": self.b, "loss": self.loss})
        config = {"models": [cfg.to_dict() for cfg in self.configs]}
        info = {"loss": self.loss.tolist(), "represented": self.represented()}
        write_manifest(path, "toy", config, [WEIGHTS], info=info)

    @classmethod
    def load(cls, path: Path | str) -> "ToyModels":
        """Read models from a directory; raises UserError when it is missing, cut or altered."""
        path = Path(path)
        manifest = read_manifest(path, "toy")
        tensors = load_tensors(path / WEIGHTS) if WEIGHTS in manifest.files else {}
        with understood(path / MANIFEST):
            data = manifest.config.get("models", [])
            configs = tuple(ToyModelConfig.parse(cfg, where=str(path / MANIFEST)) for cfg in data)
        shapes = {name: tuple(t.shape) for name, t in tensors.items()}
        m = len(configs)
        n, d_in = (configs[0].features.n_features, configs[0].d_in) if m else (0, 0)
        if not m or shapes != {"W_p": (m, d_in, n), "b": (m, n), "loss": (m,)}:
            raise UserError(
                f"{path / WEIGHTS}: does not hold the manifest's models; train them again"
            )
        return cls(**tensors, configs=configs)


def train_toy_models(
    cfgs: Sequence[ToyModelConfig],
    progress: Progress = quiet,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> ToyModels:
    """Train the toy models side by side: levels of S, seeds, importances; a member equals its lone run.

    They share shape and schedule (n_features, d_in, steps, batch, lr, decay, weight_decay); data are drawn on the CPU.
    Raises UserError for models that do not go together, and for one whose loss is not finite.
    """
    _check_alike(cfgs)
    job = ToyJob(tuple(cfgs), device, dtype)
    with progress("toy models", len(cfgs) * cfgs[0].steps, "model steps") as tick:
        parameters, loss = side_by_side(job, tick)
    for cfg, value in zip(cfgs, loss.tolist(), strict=True):
        if not value < float("inf"):
            raise UserError(
                f"toy model with sparsity {cfg.features.sparsity:g}, seed {cfg.seed}: its loss became {value}; "
                f"lower lr (now {cfg.lr:g})"
            )
    return ToyModels(parameters.W_p, parameters.b, loss, tuple(cfgs))


def _check_alike(cfgs: Sequence[ToyModelConfig]) -> None:
    if not cfgs:
        raise UserError("no toy models to train; give at least one ToyModelConfig")
    common = {"n_features": {cfg.features.n_features for cfg in cfgs}}
    for name in ("d_in", "steps", "batch", "lr", "decay", "weight_decay"):
        common[name] = {getattr(cfg, name) for cfg in cfgs}
    for name, values in common.items():
        if len(values) > 1:
            raise UserError(
                f"toy models trained together differ in {name} ({sorted(values)}); train them apart"
            )
