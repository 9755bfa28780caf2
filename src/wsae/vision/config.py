"""What a pretraining run is, as values. Torch-free: the command line's help imports it."""

from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from wsae.acts.config import ImagesConfig, Stem
from wsae.core.config import Config

Method = Literal["ncl", "simclr"]
Positive = Literal["relu", "rep_relu", "none"]
Share = Field(default=0.0, ge=0, le=1)


class AugmentConfig(Config):
    """What turns an image into a view; two views of an image are a positive pair."""

    crop: tuple[float, float] = (0.08, 1.0)
    """Share of the image's area that a crop keeps; its sides' ratio is between 3/4 and 4/3."""
    flip: float = Share
    """Probability of a left-right flip."""
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """Strength of brightness, contrast, saturation and hue; the last two do nothing to grey images."""
    jitter_p: float = Share
    """Probability of the jitter."""
    grey: float = Share
    """Probability that colour is taken away."""
    blur: float = Share
    """Probability of a Gaussian blur (sigma 0.1 to 2)."""


class LarsConfig(Config):
    """LARS as solo-learn has it: a layer's rate is min(eta |w| / (|g| + wd |w|), lr), that of biases and norms lr."""

    lr: PositiveFloat = 0.4
    """Peak learning rate for 256 images a batch; scaled by batch / 256."""
    eta: PositiveFloat = 0.02
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=1e-4, ge=0)
    warmup_from: PositiveFloat = 3e-5
    """Learning rate of the first step."""
    classifier_lr: PositiveFloat = 0.1
    """Peak rate of the online linear probe; scaled likewise."""


class PretrainConfig(Config):
    """A pretraining run: images, encoder, loss, augmentation and optimiser."""

    images: ImagesConfig = ImagesConfig()
    method: Method = "ncl"
    """ncl makes the projections non-negative; simclr leaves them as they are."""
    positive: Literal["relu", "rep_relu"] = "rep_relu"
    """How ncl makes them so: relu, or relu's values with the gradient of GELU (rep_relu)."""
    size: PositiveInt = 32
    """Side of the views in pixels."""
    stem: Stem = "small"
    """First layers of the ResNet-18: imagenet (7x7, stride 2, pooling), small (3x3), smallest (3x3, stride 2)."""
    widths: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt] = (64, 128, 256, 512)
    """Channels of its four stages; the last is the width of an embedding."""
    projector_hidden: PositiveInt = 2048
    projector_out: PositiveInt = 256
    temperature: PositiveFloat = 0.2
    batch_size: int = Field(default=256, ge=2)
    """Images of a step, all processes together."""
    epochs: PositiveInt = 200
    warmup_epochs: NonNegativeInt = 10
    """Epochs over which the learning rate rises; then it falls along a cosine to 0."""
    lars: LarsConfig = LarsConfig()
    augment: AugmentConfig = AugmentConfig()
    normalise: Literal["data", "imagenet"] = "data"
    """Mean and standard deviation of the inputs: those of the training images, or ImageNet's."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of convolutions and products; weights, statistics and the loss are float32."""
    heldout_fraction: float = Field(default=0.2, ge=0, lt=1)
    """Share of the images kept for evaluation, chosen by a hash of seed and image number."""
    limit: PositiveInt | None = None
    """Images used at most; default: all."""
    log_every: PositiveInt = 20
    """Steps per row of metrics.jsonl (means over those steps)."""
    seed: int = 0

    @property
    def positivity(self) -> Positive:
        """What the projector ends with."""
        return self.positive if self.method == "ncl" else "none"

    @property
    def lr(self) -> float:
        """Peak learning rate."""
        return self.lars.lr * self.batch_size / 256

    @property
    def classifier_lr(self) -> float:
        """Peak learning rate of the online probe."""
        return self.lars.classifier_lr * self.batch_size / 256


_COLOUR = AugmentConfig(flip=0.5, jitter=(0.8, 0.8, 0.8, 0.2), jitter_p=0.8, grey=0.2, blur=0.5)

PRESETS: dict[str, dict[str, Any]] = {
    "imagenet100": {
        "positive": "relu",
        "size": 224,
        "stem": "imagenet",
        "projector_hidden": 16384,
        "projector_out": 2048,
        "batch_size": 128,
        "epochs": 100,
        "lars": LarsConfig(lr=0.3),
        "augment": _COLOUR,
        "normalise": "imagenet",
    },
    "cifar": {"augment": _COLOUR},
    "small": {
        "size": 28,
        "stem": "smallest",
        "epochs": 10,
        "warmup_epochs": 1,
        "augment": AugmentConfig(
            crop=(0.2, 1.0), flip=0.5, jitter=(0.4, 0.4, 0.0, 0.0), jitter_p=0.8
        ),
    },
    "tiny": {
        "size": 8,
        "widths": (16, 16, 32, 32),
        "projector_hidden": 64,
        "projector_out": 32,
        "batch_size": 128,
        "epochs": 6,
        "warmup_epochs": 1,
        "dtype": "float32",
        "augment": AugmentConfig(crop=(0.5, 1.0), jitter=(0.4, 0.4, 0.0, 0.0), jitter_p=0.8),
    },
}
"""imagenet100 and cifar are those of the NCL paper's code; small is for 28x28 on two cores, tiny for the digits."""


def preset(name: str, **changes: Any) -> PretrainConfig:
    """Return a preset's config with the given fields changed; raises UserError for a value that is not valid."""
    return PretrainConfig.parse({**PRESETS[name], **changes}, where=f"pretrain preset {name}")
