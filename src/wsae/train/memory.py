"""What training allocates, by name: for the message when it does not fit."""

from collections.abc import Mapping

from wsae.core.memory import Buffer
from wsae.train.config import TrainConfig

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
