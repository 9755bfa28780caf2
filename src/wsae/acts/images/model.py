"""A vision model and how its images are prepared: from the hub, a local directory or a run of `wsae pretrain`.

No code that comes with a model is run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Shaped, UInt8
from PIL import Image
from pydantic import PositiveInt
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoImageProcessor,
    AutoModel,
    ResNetConfig,
    ResNetModel,
)

from wsae.acts.config import ImagesConfig, Resample, Stem
from wsae.acts.hookpoints import Inputs, Modality, Probing
from wsae.acts.language import fingerprint, locate, read_config, resolve_device
from wsae.acts.loading import from_pretrained, load_weights, tell_unloaded
from wsae.core.config import Config
from wsae.core.errors import UserError, first_line
from wsae.core.files import write_json
from wsae.core.hub import quiet_hub
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


class ImageEncoder(nn.Module):
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
        uneven = len(set(self.cfg.mean)) > 1 or len(set(self.cfg.std)) > 1
        mean, std = (
            torch.tensor(v, device=x.device).view(3, 1, 1)[: 3 if uneven else x.shape[1]]
            for v in (self.cfg.mean, self.cfg.std)
        )
        return ((x - mean) / std).expand(-1, 3, -1, -1)

    def save(self, path: Path) -> list[str]:
        """Write config and weights into a directory; returns the files' names."""
        write_json(path / CONFIG, self.cfg.to_dict())
        save_tensors(path / WEIGHTS, self.state_dict())
        return [CONFIG, WEIGHTS]


def load_encoder(path: Path) -> ImageEncoder:
    """Read a saved encoder (a run of `wsae pretrain` or its `encoder` folder), in evaluation mode.

    No code is executed from the files. Raises UserError naming the file when one is missing, damaged or does not fit.
    """
    path = path / "encoder" if (path / "encoder" / CONFIG).is_file() else path
    encoder = ImageEncoder(EncoderConfig.load(path / CONFIG))
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


RUN_FOLDER = "encoder"
_PREPARATION = ("preprocessor_config.json", "processor_config.json")
_WORKING = "what works: ResNet, ViT, DINOv2 and their like, and the vision tower of CLIP and SigLIP"
_SIZES = ("height", "shortest_edge")
_WARPED = 384
"""ConvNeXt's preparation (ResNet's too) cuts nothing off images of this side or more."""


@dataclass(frozen=True)
class VisionModel:
    """A model in evaluation mode with frozen weights, a digest of its files, and the images it was trained on."""

    model: nn.Module
    name: str
    digest: str
    size: int
    """Side of the square it takes."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """Subtracted from pixels in [0, 1], and then divided by."""
    resize: int
    """Side that an image's shorter side has before the square is cut."""
    resample: Resample
    dtype: torch.dtype = torch.float32
    not_loaded: tuple[str, ...] = ()
    """Weights that its files do not hold: they are NaN, and what depends on them is refused."""

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def prepare(
        self, images: UInt8[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch 3 height width"]:
        """Return bytes as the model takes them, on its device."""
        x = images.to(self.device, non_blocking=True).float().div_(255)
        mean, std = (torch.tensor(v, device=x.device).view(-1, 1, 1) for v in (self.mean, self.std))
        return x.sub_(mean).div_(std).to(self.dtype)

    def images(self, cfg: ImagesConfig) -> ImagesConfig:
        """Return the config with this model's size and way of resizing, where it names no size itself."""
        if cfg.size is not None:
            return cfg
        mine = {"size": self.size, "resize": self.resize, "resample": self.resample}
        return cfg.model_copy(update=mine)

    def modality(self, height: int, width: int) -> Modality:
        """Return how hook points of this model are probed and read, for images of this size."""

        def inputs(_model: nn.Module) -> Probing:
            noise = torch.Generator().manual_seed(0)
            some = torch.randint(0, 256, (4, 3, height, width), generator=noise).to(torch.uint8)
            first, changed = some[:3], some[[0, 3, 2]]
            images = [{"pixel_values": self.prepare(x)} for x in (first, changed, first[:2])]
            return Probing(images[0], images[1], (1, None), images[2])

        def explain(_model: nn.Module, error: Exception, _inputs: Inputs) -> UserError:
            return UserError(
                f"model {self.name}: does not take images of {height} x {width} pixels ({first_line(error)}); "
                f"its own size is {self.size}"
            )

        return Modality(
            inputs,
            lambda _first, _other, _given: [ImageLayout()],
            "[batch, width], [batch, tokens, width] or [batch, channels, h, w]",
            explain,
            lambda _model, _long, _limit: [],
        )


class ImageLayout(NamedTuple):
    """Images come first: [batch, width], [batch, positions, width] or [batch, channels, h, w]."""

    def rows(
        self, x: Tensor, size: tuple[int, ...]
    ) -> Float[Tensor, "batch positions width"] | None:
        """Return the rows; none for other shapes, or another number of images."""
        return positions(x) if x.shape[:1] == size[:1] else None


def positions(output: Tensor) -> Tensor | None:
    """Return an output of a vision model as [batch, positions, width]; none for other shapes.

    [batch, width] has one position, [batch, channels, h, w] has h * w of them, row by row, and a mean over
    positions, [batch, channels, 1], has one.
    """
    if output.ndim == 2:
        return output[:, None]
    if output.ndim == 4:
        return output.flatten(2).transpose(1, 2)
    if output.ndim == 3:
        return output.transpose(1, 2) if output.shape[2] == 1 else output
    return None


def load_vision(name: str, dtype: str = "float32", device: str = "cpu") -> VisionModel:
    """Load a vision model; raises UserError in one line when it is missing, damaged or takes no images."""
    where, kind = resolve_device(device), getattr(torch, dtype)
    folder = _encoder_folder(name)
    if folder is not None:
        return _own(name, folder, where, kind)
    path = _located(name)
    with quiet_hub():
        config = read_config(path, name)
    if type(config) not in MODEL_MAPPING or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"model {name}: not a vision model (its type is {config.model_type}); {_WORKING}"
        )
    if isinstance(path, Path) and not any((path / file).is_file() for file in _PREPARATION):
        raise UserError(
            f"model {name}: no {_PREPARATION[0]} in it, so nothing says how its images are prepared; "
            "copy that of the model it came from"
        )
    with quiet_hub():
        loaded: Any = load_weights(AutoModel, path, name, dtype=kind)
        loaded = getattr(loaded, "vision_model", loaded)  # of a model of images and text
        taken = getattr(loaded, "main_input_name", None)
        if taken != "pixel_values":
            raise UserError(f"model {name}: not a vision model (its input is {taken}); {_WORKING}")
        processor: Any = from_pretrained(AutoImageProcessor, path, name)
    side, resize = _sizes(processor, name)
    filters: dict[Any, Resample] = {
        Image.Resampling[name.upper()]: name for name in get_args(Resample)
    }
    return VisionModel(
        loaded.to(where).eval().requires_grad_(False),
        path if isinstance(path, str) else path.resolve().name,
        fingerprint(path),
        side,
        _channels(processor, "image_mean", 0.0),
        _channels(processor, "image_std", 1.0),
        resize,
        filters.get(getattr(processor, "resample", None), "bicubic"),
        kind,
        tell_unloaded(loaded, name),
    )


def model_fingerprint(name: str) -> str:
    """Return the digest that `load_vision` would give, without loading anything."""
    folder = _encoder_folder(name)
    return fingerprint(_located(name) if folder is None else folder)


def _own(name: str, folder: Path, device: torch.device, dtype: torch.dtype) -> VisionModel:
    encoder = load_encoder(folder)
    cfg = encoder.cfg
    return VisionModel(
        encoder.to(device, dtype).eval().requires_grad_(False),
        Path(name).expanduser().resolve().name,
        fingerprint(folder),
        cfg.size,
        cfg.mean,
        cfg.std,
        cfg.size,
        "bicubic",
        dtype,
    )


def _encoder_folder(name: str) -> Path | None:
    """Return the encoder's folder of a run of `wsae pretrain`, or none for other models."""
    folder = Path(name).expanduser() / RUN_FOLDER
    return folder if (folder / CONFIG).is_file() else None


def _located(name: str) -> Path | str:
    path = locate(name)
    if isinstance(path, Path) and path.is_file():
        raise UserError(f"model {name}: a language model's file, not a vision model")
    return path


def _sizes(processor: Any, name: str) -> tuple[int, int]:
    """Return the sides of the square that a processor cuts and of what it cuts it from."""
    size, crop = (getattr(processor, key, None) or {} for key in ("size", "crop_size"))
    size, crop = (
        dict.fromkeys(_SIZES, found)
        if isinstance(found, int)
        else {key: found[key] for key in _SIZES if key in found}
        for found in (size, crop)
    )
    whole = size.get("shortest_edge") or size.get("height")
    if getattr(processor, "do_center_crop", False) and crop.get("height"):
        side = int(crop["height"])
        return side, int(whole) if whole and getattr(processor, "do_resize", True) else side
    if not whole:
        raise UserError(f"model {name}: its preprocessor_config.json names no size of images")
    side, share = int(whole), getattr(processor, "crop_pct", None)
    return side, int(side / share) if share and side < _WARPED else side


def _channels(processor: Any, key: str, otherwise: float) -> tuple[float, ...]:
    """Return a processor's mean or deviation, for pixels in [0, 1] whatever range it uses itself."""
    rescaled = getattr(processor, "do_rescale", True)
    scale = 255 * float(getattr(processor, "rescale_factor", 1 / 255) if rescaled else 1.0)
    if not getattr(processor, "do_normalize", True):
        return (otherwise / scale,) * 3
    values = getattr(processor, key, None)
    values = (otherwise,) * 3 if values is None else values
    values = (values,) * 3 if isinstance(values, int | float) else tuple(values)
    return tuple(float(value) / scale for value in values)
