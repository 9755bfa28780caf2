"""How the loss weights gamma come about, as values. No torch here."""

from typing import Literal

from pydantic import Field, model_validator

from wsae.core.config import Config

Rule = Literal["none", "variance", "latent_variance", "consistency", "vector"]
Normalise = Literal["rms", "max", "none"]
Robust = Literal["none", "winsor", "rank"]


class GammaConfig(Config):
    """gamma_i = normalise(robust(s)_i ^ alpha), one weight per input dimension (paper Eq. 12, Section 5)."""

    rule: Rule = "none"
    """The proxy s: none (all weights 1), variance of the input dimension, latent_variance (the latents' variances
    carried to input dimensions through the squared decoder weights), consistency (from labels), or a given vector."""
    alpha: float = Field(default=1.0, allow_inf_nan=False)
    """Exponent; negative values favour low-variance dimensions."""
    normalise: Normalise = "rms"
    """rms: mean gamma^2 = 1; max: largest gamma = 1; none: the paper's raw s^alpha."""
    robust: Robust = "none"
    """winsor: clip s at the quantile from both ends; rank: replace s by its rank / d_in."""
    quantile: float = Field(default=0.99, gt=0.5, le=1.0)
    """Upper winsor quantile; the lower one is 1 minus it."""
    vector: tuple[float, ...] | None = None
    """The proxy itself, for the rule `vector`."""

    @model_validator(mode="after")
    def _vector_goes_with_rule(self) -> "GammaConfig":
        if (self.rule == "vector") != (self.vector is not None):
            raise ValueError(
                "the rule 'vector' and a vector of weights go together; give both or neither"
            )
        return self

    @property
    def label(self) -> str:
        """A short name: plain, variance-a1, variance-a0.5-winsor ..."""
        if self.rule == "none":
            return "plain"
        parts = [self.rule.replace("_", "-"), f"a{self.alpha:g}"]
        parts += [self.robust] if self.robust != "none" else []
        parts += [f"norm-{self.normalise}"] if self.normalise != "rms" else []
        return "-".join(parts)
