"""Random views of images, decided by a seed alone."""

import torch
from jaxtyping import Float
from kornia import augmentation as kornia
from torch import Tensor

from wsae.vision.config import AugmentConfig

RATIO = (3 / 4, 4 / 3)
"""Width over height of a crop, before it is resized to a square."""
SIGMA = (0.1, 2.0)


class Augment:
    """Augments a batch on its own device; every image is treated by itself.

    `cropped`: the images are random crops already. `grey`: they have one channel, so colour is left alone.
    """

    def __init__(self, cfg: AugmentConfig, size: int, grey: bool, cropped: bool = False) -> None:
        square = (size, size)
        self._steps: list[torch.nn.Module] = []
        if not cropped:
            self._steps.append(
                kornia.RandomResizedCrop(square, cfg.crop, RATIO, cropping_mode="resample")
            )
        if cfg.flip:
            self._steps.append(kornia.RandomHorizontalFlip(p=cfg.flip))
        brightness, contrast, saturation, hue = cfg.jitter
        if grey:
            saturation = hue = 0.0
        if cfg.jitter_p and any((brightness, contrast, saturation, hue)):
            jitter = kornia.ColorJitter(brightness, contrast, saturation, hue, p=cfg.jitter_p)
            self._steps.append(jitter)
        if cfg.grey and not grey:
            self._steps.append(kornia.RandomGrayscale(p=cfg.grey))
        if cfg.blur:
            kernel = max(3, size // 10 | 1)
            self._steps.append(kornia.RandomGaussianBlur((kernel, kernel), SIGMA, p=cfg.blur))

    @torch.no_grad()
    def __call__(
        self, images: Float[Tensor, "batch channels height width"], seed: int
    ) -> Float[Tensor, "batch channels size size"]:
        """Return a view of each image, values in [0, 1]; the same for the same seed."""
        with torch.random.fork_rng(devices=[]):  # kornia draws on the CPU's generator
            torch.default_generator.manual_seed(seed)
            for step in self._steps:
                images = step(images)
        return images
