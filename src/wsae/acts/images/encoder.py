"""A ResNet with a projector: what contrastive pretraining trains and saves, and what harvesting reads."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Shaped
from pydantic import PositiveInt
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetModel

from wsae.acts.images.config import Stem
from wsae.core.config import Config
from wsae.core.errors import UserError
from wsae.core.files import write_json
from wsae.core.tensors import load_tensors, save_tensors

CONFIG, WEIGHTS = "config.json", "model.safetensors"


class EncoderConfig(Config):
    """An encoder's shape and the images it takes."""

    stem: Stem = "small"
    widths: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt] = (64, 128, 256, 512)
    """Channels of the four stages; the last is the width of an embedding."""
    projector_hidden: PositiveInt = 2048
    projector_out: PositiveInt = 256
    positive: Literal["relu", "rep_relu", "none"] = "none"
    size: PositiveInt = 32
    """Side in pixels of the images it was trained on."""
    grey: bool = False
    """Whether these were grey; grey and colour images are both taken, as three channels."""
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Subtracted from pixels in [0, 1], per channel."""
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Then divided by."""


class Projector(nn.Module):
    """Linear - ReLU - Linear, then the method's non-negativity (NCL) or nothing (SimCLR)."""

    def __init__(self, width: int, hidden: int, out: int, positive: str) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(width, hidden), nn.Linear(hidden, out)
        self.positive = positive

    def forward(self, x: Float[Tensor, "batch width"]) -> Float[Tensor, "batch out"]:
        """Return z [batch, out]; non-negative unless `positive` is "none"."""
        z = self.out(torch.relu(self.hidden(x)))
        if self.positive == "none":
            return z
        if self.positive == "relu":
            return torch.relu(z)
        smooth = nn.functional.gelu(z)  # rep_relu: ReLU's values with GELU's gradient
        return smooth - smooth.detach() + torch.relu(z).detach()


class Encoder(nn.Module):
    """Images to embeddings [batch, width] (hook "pooler") and their projections (hook "projector")."""

    def __init__(self, cfg: EncoderConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.backbone = resnet18(cfg.stem, cfg.widths)
        self.projector = Projector(
            cfg.widths[-1], cfg.projector_hidden, cfg.projector_out, cfg.positive
        )
        self.pooler = nn.Flatten()  # a place to read the embeddings at

    def forward(
        self, pixel_values: Float[Tensor, "batch 3 height width"]
    ) -> tuple[Float[Tensor, "batch embedding"], Float[Tensor, "batch out"]]:
        """Return embeddings and projections of prepared images."""
        h = self.pooler(self.backbone(pixel_values=pixel_values).pooler_output)
        return h, self.projector(h)

    def prepare(
        self, images: Shaped[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch 3 height width"]:
        """Return bytes, or floats in [0, 1], of one or three channels as the model takes them."""
        x = images.float() / 255 if images.dtype == torch.uint8 else images
        mean, std = (
            torch.tensor(v, device=x.device).view(3, 1, 1)[: 3 if self._uneven else x.shape[1]]
            for v in (self.cfg.mean, self.cfg.std)
        )
        return ((x - mean) / std).expand(-1, 3, -1, -1)

    @property
    def _uneven(self) -> bool:
        return len(set(self.cfg.mean)) > 1 or len(set(self.cfg.std)) > 1

    def save(self, path: Path) -> list[str]:
        """Write config and weights into a directory; returns the files' names."""
        write_json(path / CONFIG, self.cfg.to_dict())
        save_tensors(path / WEIGHTS, self.state_dict())
        return [CONFIG, WEIGHTS]


def load_encoder(path: Path) -> Encoder:
    """Read a saved encoder (a run of `wsae pretrain` or its `encoder` folder), in evaluation mode.

    No code is executed from the files. Raises UserError naming the file when one is missing, damaged or does not fit.
    """
    path = path / "encoder" if (path / "encoder" / CONFIG).is_file() else path
    encoder = Encoder(EncoderConfig.load(path / CONFIG))
    tensors = load_tensors(path / WEIGHTS)
    expected = encoder.state_dict()
    wrong = [k for k in expected if k not in tensors or tensors[k].shape != expected[k].shape]
    wrong += [k for k in tensors if k not in expected]
    if wrong:
        raise UserError(f"{path / WEIGHTS}: does not fit {CONFIG} beside it (tensor {wrong[0]})")
    encoder.load_state_dict(tensors)
    return encoder.eval().requires_grad_(False)


def resnet18(stem: Stem, widths: Sequence[int] = (64, 128, 256, 512)) -> ResNetModel:
    """Return a ResNet-18, untrained.

    Stem: "imagenet" is 7x7 with stride 2 and max-pooling; "small", CIFAR's, is 3x3 with stride 1 and no pooling;
    "smallest" is 3x3 with stride 2, a quarter of the work of "small".
    """
    cfg = ResNetConfig(
        embedding_size=widths[0], hidden_sizes=list(widths), depths=[2, 2, 2, 2], layer_type="basic"
    )
    model = ResNetModel(cfg)
    if stem != "imagenet":
        stride = 1 if stem == "small" else 2
        conv = nn.Conv2d(3, widths[0], 3, stride=stride, padding=1, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        model.embedder.embedder.convolution = conv
        model.embedder.register_module("pooler", nn.Identity())
    return model
