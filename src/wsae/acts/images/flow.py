"""Images through a vision model to rows, one forward pass at a time."""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from wsae.acts.capture import Capture
from wsae.acts.flow import NonFiniteError, Step, one_pass
from wsae.acts.hookpoints import HookPoint, probe
from wsae.acts.images.config import ImageHarvestConfig
from wsae.acts.images.model import VisionModel
from wsae.acts.images.reading import Failures, batches
from wsae.acts.images.sets import ImageSet
from wsae.acts.images.split import heldout_images
from wsae.acts.packing import Position
from wsae.core.errors import UserError
from wsae.core.memory import Buffer, explained
from wsae.core.seeds import Permutation, seed_for


class ImageFlow:
    """A model, its hook points, and the images of each half in the order of their numbers.

    `labels` [images] int64 or none, `positions` rows an image, `order` {split: image numbers}.
    """

    def __init__(self, cfg: ImageHarvestConfig, vision: VisionModel, images: ImageSet) -> None:
        self.cfg, self.vision, self.images = cfg, vision, images
        self.side = cfg.images.size or vision.size
        self.labels = None if images.labels is None else torch.from_numpy(images.labels)
        self.n_classes = len(images.names) if images.labels is not None else 0
        self.order = _order(len(images), cfg)
        manner = vision.manner(self.side, self.side)
        with one_pass():
            hooks = probe(vision.model, cfg.hooks, manner).hooks
        self._capture = Capture(vision.model, hooks)
        self.hooks, self.positions = self._capture.hooks, _same_positions(hooks)

    def steps(self, heldout: bool, start: Position) -> Iterator[Step]:
        """Yield steps from the `start.document`-th image of a half on; raises NonFiniteError at a NaN or infinity.

        Unreadable images are left out, or raise ImageError, as the config says.
        """
        order, cfg = self.order["heldout" if heldout else "train"], self.cfg
        done, failures = start.document, Failures(cfg.images.on_error)
        read = batches(self.images, order[done:], cfg.batch_size, cfg.images.workers, failures)
        for index, squares in read:
            done = min(done + cfg.batch_size, len(order))
            if len(index):
                yield self._step(index, squares, Position(done, 0, done))

    def _step(
        self,
        index: Int[np.ndarray, " batch"],
        squares: UInt8[Tensor, "batch 3 height width"],
        after: Position,
    ) -> Step:
        with explained("running the model", self._buffers, "--batch-size"), one_pass():
            acts = self._capture.read({"pixel_values": self.vision.prepare(squares)})
            flat = {hook: x.flatten(0, 1).float().cpu() for hook, x in acts.items()}
        image = torch.from_numpy(index.astype(np.int64))
        self._check_finite(flat, image)
        n, none = len(index), torch.empty(0, dtype=torch.int32)
        return Step(
            x=flat,
            skipped={},
            seq=image.repeat_interleave(self.positions),
            pos=torch.arange(self.positions).repeat(n),
            ids=none.expand(n, 0),
            lengths=torch.zeros(n, dtype=torch.int32),
            counts={"kept": n * self.positions},
            after=after,
            labels=None
            if self.labels is None
            else self.labels[image].repeat_interleave(self.positions),
        )

    def _check_finite(
        self, acts: dict[str, Float[Tensor, "rows _"]], image: Int[Tensor, " batch"]
    ) -> None:
        for hook, x in acts.items():
            if not bool(torch.isfinite(x.sum())) and not bool(torch.isfinite(x).all()):
                row, dim = (int(i) for i in (~torch.isfinite(x)).nonzero()[0])
                number, pos = divmod(row, self.positions)
                raise NonFiniteError(hook, ("image", int(image[number]), pos, dim), row)

    def _buffers(self) -> list[Buffer]:
        rows = self.cfg.batch_size * self.positions
        return [
            Buffer("activations of one pass", (rows, d_in), 4, "--batch-size")
            for d_in in set(self.hooks.values())
        ]


def _order(n: int, cfg: ImageHarvestConfig) -> dict[str, np.ndarray]:
    """Return each half's image numbers, ascending; under a limit a random choice of all images."""
    used = np.arange(n)
    if cfg.limit is not None and cfg.limit < n:
        used = np.sort(Permutation(n, seed_for(cfg.seed, "limit"))(np.arange(cfg.limit)))
    held = heldout_images(n, cfg.heldout_fraction, cfg.seed)[used]
    return {"train": used[~held], "heldout": used[held]}


def _same_positions(hooks: list[HookPoint]) -> int:
    rows = {hook.positions: hook.name for hook in hooks}
    if len(rows) > 1:
        (a, first), (b, second) = list(rows.items())[:2]
        raise UserError(
            f"hooks {first!r} and {second!r} have {a} and {b} rows an image; harvest them to two stores"
        )
    return hooks[0].positions
