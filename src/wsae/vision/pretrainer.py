"""One encoder in pretraining: its weights, optimiser and step, as what a run trains."""

from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from wsae.core.errors import UserError
from wsae.core.progress import Tick
from wsae.core.seeds import seed_for
from wsae.train.schedule import warmup_cosine
from wsae.vision.augment import Augment
from wsae.vision.config import PretrainConfig
from wsae.vision.crops import crops_from
from wsae.vision.data import Data
from wsae.vision.loss import info_nce
from wsae.vision.model import Model, make_model, make_optimizer
from wsae.vision.ranks import Ranks

EPOCH_TEST = 2_000
"""Held-out images at most whose accuracy is measured after every epoch."""

Views = tuple[Int64[np.ndarray, " batch"], Float[Tensor, "views 3 size size"]]


class Pretrainer:
    """Pretrains an encoder and, beside it, a linear probe; see `wsae.train.loop.Job`."""

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
        self.optimizer = make_optimizer(cfg, self.model)
        self.augment = Augment(cfg.augment, cfg.size, data.grey, cropped=not data.in_memory)
        self.sums = torch.zeros(
            3, device=device, dtype=torch.float32
        )  # loss, share of right answers, steps

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
        for group, peak in zip(self.optimizer.param_groups, self._peaks(), strict=False):
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

    def _peaks(self) -> tuple[float, float]:
        return self.cfg.lr, self.cfg.classifier_lr

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
            if done % self.per_epoch == 0 and len(self.data.heldout):
                row["heldout_accuracy"] = self._heldout_accuracy()
        shown = ("loss", "accuracy", "heldout_accuracy")
        self.fields |= {key: row[key] for key in shown if key in row}
        yield row

    @torch.no_grad()
    def _heldout_accuracy(self) -> float:
        index, h = self.embed(self.data.heldout[:EPOCH_TEST])
        logits, labels = self.model.logits(h), self.labels(index)
        assert logits is not None
        assert labels is not None
        return float((logits.argmax(1) == labels).float().mean())

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
