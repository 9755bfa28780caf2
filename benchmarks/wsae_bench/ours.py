"""The real trainer as a subject of `wsae bench`: what `wsae train` does with a batch, data loading left out."""

from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from wsae.acts.source import ArraySource
from wsae.kernels.native.build import why_not
from wsae.sae.config import make_activation
from wsae.train.config import MemberConfig, TrainConfig
from wsae.train.family import finished, make_family
from wsae.train.state import make_batches
from wsae.train.step import side_by_side

DEAD_AFTER = 10_000_000
"""Tokens after which a latent is dead: what the peers take, so that revival starts for nobody in a short run."""


def load(job: Any) -> str | None:
    """Compile or load the kernels, which counts as importing; returns why they cannot be had, if so."""
    return None if job.settings["kernels"] == "eager" else why_not()


def make(job: Any, _state: object, x: Float[Tensor, "batch d_in"]) -> "Ours":
    """Return the members of a job at their start; the statistics are those of the first batch, as peers take them."""
    return Ours(job, x)


class Ours:
    """A family of members over the same batches."""

    def __init__(self, job: Any, x: Float[Tensor, "batch d_in"]) -> None:
        self.cfg = train_config(job)
        stats = ArraySource(x, heldout_fraction=0.0).stats()
        family = make_family(self.cfg, stats)
        (self.members,) = family.members.values()
        self.step_all = ExitStack().enter_context(side_by_side(self.cfg, family))
        self.lr = self.cfg.members[0].learning_rate(job.d_in)

    def step(self, i: int, x: Float[Tensor, "batch d_in"]) -> None:
        """Train every member on one batch."""
        self.step_all(self.members, make_batches(x, self.members), i)

    def reconstruct(self, x: Float[Tensor, "rows d_in"]) -> tuple[Float[Tensor, "rows d_in"], int]:
        """Return the first member's reconstruction and the number of latents that fired."""
        sae = finished(self.members[0])
        code = sae.encode_code(x)
        return sae.decode_code(code), int(torch.count_nonzero(code.values))


def train_config(job: Any) -> TrainConfig:
    """Return the run that a job describes: no warm-up and no decay of the learning rate, as for the peers."""
    how = job.settings
    members = [
        MemberConfig(
            d_sae=job.d_sae,
            activation=make_activation(how.get("activation", "topk"), job.k),
            lr=job.lr,
            l1=float(how.get("l1", 0.0)),
            l0=float(how.get("l0", 0.0)),
            seed=job.seed + n,
            label=f"member{n}",
        )
        for n in range(how.get("members", 1))
    ]
    data = {
        "members": members,
        "tokens": job.batch * job.steps,
        "batch_size": job.batch,
        "dtype": job.dtype,
        "warmup": 0.0,
        "decay": 0.0,
        "dead_after": DEAD_AFTER,
        "seed": job.seed,
        "kernels": how["kernels"],
    }
    return TrainConfig.parse(data, where=job.name)
