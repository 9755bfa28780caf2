"""How latents are scored against class labels. No torch here."""

from typing import Literal

from pydantic import Field, PositiveInt

from wsae.core.config import Config
from wsae.evals.config import EvalConfig, Fraction

ClassControl = Literal["dimensions", "pca", "random_sae", "shuffled"]
CONTROLS: tuple[ClassControl, ...] = ("dimensions", "pca", "random_sae", "shuffled")
"""dimensions: those of the activations, as they are. pca: principal directions, Top-k with the plain member's k.
random_sae: untrained directions, as sparse. shuffled: the plain member with the images' classes permuted."""


class ClassesConfig(Config):
    """Scores of latents against class labels on held-out images."""

    batch_size: PositiveInt = 2048
    """Held-out rows encoded at once."""
    n_top: PositiveInt = 20
    """Strongest samples per latent whose classes are compared; a latent with fewer is not scored on them."""
    min_support: PositiveInt = 20
    """Samples a latent must be active on for the chance-corrected scores."""
    groups: int = Field(default=20, ge=0)
    """Groups of images left out one by one for the intervals over images (memory: groups x latents x classes x 4
    bytes); 0 leaves these intervals away."""
    permutations: PositiveInt = 1000
    """Random orders of the labels behind the chance levels."""
    minibatch: int = Field(default=256, ge=0)
    """Rows of the one mini-batch on which NCL's training log measures; 0 leaves that value away."""
    controls: tuple[ClassControl, ...] = CONTROLS
    assignment_max: PositiveInt = 2048
    """Live latents up to which members are matched one-to-one optimally; beyond, by mutual nearest."""
    draws: PositiveInt = 1000
    """Bootstrap resamples behind each interval over latents."""
    confidence: Fraction = 0.95
    """Coverage of the intervals."""
    seed: int = 0

    def bootstrap(self) -> EvalConfig:
        """Return the settings of the intervals over latents."""
        return EvalConfig(draws=self.draws, confidence=self.confidence, seed=self.seed)
