"""Settings of labelled evaluations (torch-free)."""

from typing import Annotated

from pydantic import Field

from wsae.core.config import Config
from wsae.evals.config import EvalConfig, Fraction

Count = Annotated[int, Field(ge=1)]


class ProbeConfig(Config):
    """How classes of tokens or documents are told apart by a few latents."""

    k: tuple[Count, ...] = Field(default=(1, 2, 5, 16), min_length=1)
    """Latents that a probe sees; all of them are tried beside it."""
    tokens: Count = 100_000
    """Held-out tokens read at most, the first ones; half of their sequences train the probes, half test them."""
    examples: Count = 1000
    """Tokens of a class used at most on either side; as many others stand against them."""
    documents: Count = 300
    """Documents of a class used at most; a third of them test the probes."""
    least: Count = 40
    """Tokens or documents of a class that train, and that test, at least; one with fewer is left out and named."""
    ablated: tuple[Count, ...] = (2, 5, 10, 20, 50)
    """Latents set to zero to remove a class (targeted perturbation, spurious correlation)."""
    context: Annotated[int, Field(ge=2)] = 128
    """Tokens of a document that the model reads, the first ones; longer documents are counted."""
    batch_size: Count = 2048
    """Rows encoded at once."""
    draws: Count = 2000
    """Bootstrap resamples behind each interval."""
    confidence: Fraction = 0.95
    """Coverage of the intervals."""
    seed: int = 0
    """Root of the draws of tokens and documents, the random control and the bootstrap."""

    def bootstrap(self) -> EvalConfig:
        """Return the settings of the intervals."""
        return EvalConfig(draws=self.draws, confidence=self.confidence, seed=self.seed)
