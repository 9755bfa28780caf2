"""What a step trains: the encoder and, beside it, a linear probe that the encoder does not feel."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from wsae.acts.images.encoder import Encoder, EncoderConfig
from wsae.core.seeds import seed_for
from wsae.vision.config import PretrainConfig
from wsae.vision.data import Data
from wsae.vision.lars import LARS


class Model(nn.Module):
    """Encoder and online probe, which is there when the images have classes."""

    def __init__(self, encoder: Encoder, classes: int) -> None:
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
        model = Model(
            Encoder(encoder_config(cfg, data)), data.classes if data.labels is not None else 0
        )
    return model.to(device=device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def make_optimizer(cfg: PretrainConfig, model: Model) -> LARS:
    """Return LARS over the encoder, and over the probe without weight decay."""
    groups: list[dict[str, Any]] = [{"params": list(model.encoder.parameters())}]
    if model.classifier is not None:
        groups.append({"params": list(model.classifier.parameters()), "decay": 0.0})
    return LARS(groups, cfg.lars.eta, cfg.lars.momentum, cfg.lars.weight_decay)


def encoder_config(cfg: PretrainConfig, data: Data) -> EncoderConfig:
    """Return the encoder that a run trains."""
    return EncoderConfig(
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
