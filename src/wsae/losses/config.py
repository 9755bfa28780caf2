"""How the loss weights gamma come about, as values. No torch here."""

from typing import Literal

from pydantic import Field, model_validator

from wsae.core.config import Config

Rule = Literal["none", "variance", "latent_variance", "consistency", "vector", "gap", "whiten"]
Normalise = Literal["rms", "max", "none"]
Robust = Literal["none", "winsor", "rank", "drop"]
OUTLIER_RATIO = 50.0
"""A dimension whose variance exceeds this many times the median one is an outlier dimension."""
RIDGE = 0.01
"""Ridge of the rule whiten where none is given: directions under it hold at most 1 % of the variance together."""


class GammaConfig(Config):
    """gamma_i = normalise(robust(s)_i ^ alpha), one weight per input dimension (paper Eq. 12, Section 5).

    The rule whiten gives a matrix instead: Gamma = normalise((C + ridge m I) ^ (-alpha / 2)), C the covariance.
    """

    rule: Rule = "none"
    """The proxy s: none (all weights 1), variance of the input dimension, latent_variance (the latents' variances
    carried to input dimensions through the squared decoder weights), consistency (from labels), or a given vector.
    gap: the diagonal, whiten: the matrix that makes the gap of Theorem 5 smallest, from the covariance."""
    alpha: float = Field(default=1.0, allow_inf_nan=False)
    """Exponent; negative values favour low-variance dimensions. For gap and whiten 1 is the rule as derived."""
    normalise: Normalise = "rms"
    """rms: mean gamma^2 = 1 (trace of Gamma^T Gamma = d_in); max: largest gamma (singular value) = 1; none: the paper's
    raw s^alpha."""
    robust: Robust = "none"
    """winsor: clip s at the quantile from both ends; rank: replace s by its rank / d_in; drop: leave the outlier
    dimensions (s over 50 times its median) out of the loss; with alpha 0 that is the plain loss without them."""
    quantile: float = Field(default=0.99, gt=0.5, le=1.0)
    """Upper winsor quantile; the lower one is 1 minus it."""
    vector: tuple[float, ...] | None = None
    """The proxy itself, for the rule `vector`."""
    ridge: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """For the rule whiten: added to every eigenvalue, as a share of their mean; none means 0.01."""

    @model_validator(mode="after")
    def _vector_goes_with_rule(self) -> "GammaConfig":
        if (self.rule == "vector") != (self.vector is not None):
            raise ValueError(
                "the rule 'vector' and a vector of weights go together; give both or neither"
            )
        return self

    @model_validator(mode="after")
    def _whiten_has_a_ridge_and_no_robust(self) -> "GammaConfig":
        if self.rule != "whiten" and self.ridge is not None:
            raise ValueError(f"a ridge belongs to the rule 'whiten', not to '{self.rule}'")
        if self.rule == "whiten" and self.robust != "none":
            raise ValueError("the rule 'whiten' has no proxy to make robust; use a larger ridge")
        return self

    @model_validator(mode="after")
    def _drop_needs_a_proxy_large_in_outliers(self) -> "GammaConfig":
        if self.robust == "drop" and self.rule in ("none", "gap"):
            raise ValueError(
                f"robust 'drop' does not go with the rule '{self.rule}'; for the plain loss without outlier "
                "dimensions use the rule 'variance' with alpha 0"
            )
        return self

    @property
    def needs_covariance(self) -> bool:
        """Return whether gamma comes from the covariance of the activations."""
        return self.rule in ("gap", "whiten") and self.alpha != 0

    @property
    def label(self) -> str:
        """A short name: plain, variance-a1, variance-a0.5-winsor ..."""
        if self.rule == "none":
            return "plain"
        parts = [self.rule.replace("_", "-"), f"a{self.alpha:g}"]
        parts += [self.robust] if self.robust != "none" else []
        parts += [f"ridge{self.ridge:g}"] if self.ridge is not None else []
        parts += [f"norm-{self.normalise}"] if self.normalise != "rms" else []
        return "-".join(parts)
