"""What an SAE is, as values: widths, tied or not, and the activation function. No torch here."""

import itertools
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    PositiveFloat,
    PositiveInt,
    SerializeAsAny,
    Tag,
    field_validator,
    model_validator,
)

from wsae.core.artifact import PROVENANCE
from wsae.core.config import Config
from wsae.core.errors import UserError

# How the loss weights gamma come about, as values. No torch here.

Rule = Literal[
    "none",
    "variance",
    "latent_variance",
    "consistency",
    "vector",
    "gap",
    "whiten",
    "residual",
    "residual_covariance",
]
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
    gap: the diagonal, whiten: the matrix that makes the gap of Theorem 5 smallest, from the covariance. residual: one
    over the standard deviation of what a plain SAE leaves in each dimension, residual_covariance: that of its
    covariance; the plain SAE is trained first, on a quarter of the rows."""
    alpha: float = Field(default=1.0, allow_inf_nan=False)
    """Exponent; negative values favour low-variance dimensions. For gap and whiten 1 is the rule as derived."""
    normalise: Normalise = "rms"
    """Scale of the weights. rms: mean gamma^2 = 1 (trace of Gamma^T Gamma = d_in); max: largest gamma (singular value)
    = 1; none: the paper's raw s^alpha."""
    robust: Robust = "none"
    """What tames outlier dimensions. winsor: clip s at the quantile from both ends; rank: replace s by its rank / d_in;
    drop: leave the outlier dimensions (s over 50 times its median) out of the loss; with alpha 0 that is the plain loss
    without them."""
    quantile: float = Field(default=0.99, gt=0.5, le=1.0)
    """Where winsor clips above; below it clips at 1 minus it."""
    vector: tuple[float, ...] | None = None
    """The proxy itself, for the rule `vector`."""
    ridge: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """For the rules whiten, residual and residual_covariance: added to every eigenvalue (residual: to every variance),
    as a share of their mean; default: 0.01."""
    rounds: int | None = Field(default=None, ge=1, le=2)
    """For the residual rules: 2 lets what an SAE with the weights of round 1 leaves give the weights; default: 1."""

    @model_validator(mode="after")
    def _vector_goes_with_rule(self) -> "GammaConfig":
        if (self.rule == "vector") != (self.vector is not None):
            raise ValueError(
                "the rule 'vector' and a vector of weights go together; give both or neither"
            )
        return self

    @model_validator(mode="after")
    def _whiten_has_a_ridge_and_no_robust(self) -> "GammaConfig":
        if self.rule != "whiten" and not self.needs_pilot and self.ridge is not None:
            raise ValueError(f"a ridge belongs to the rule 'whiten', not to '{self.rule}'")
        if self.rounds == 2 and not self.needs_pilot:
            raise ValueError(f"rounds belong to the residual rules, not to '{self.rule}'")
        if self.rule == "residual_covariance" and self.robust != "none":
            raise ValueError(
                "the rule 'residual_covariance' has no proxy to make robust; use a larger ridge"
            )
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
    def needs_pilot(self) -> bool:
        """Return whether gamma comes from what another SAE, trained before, leaves."""
        return self.rule in ("residual", "residual_covariance")

    @property
    def label(self) -> str:
        """A short name: plain, variance-a1, variance-a0.5-winsor ..."""
        if self.rule == "none":
            return "plain"
        parts = [self.rule.replace("_", "-"), f"a{self.alpha:g}"]
        parts += [self.robust] if self.robust != "none" else []
        parts += [f"ridge{self.ridge:g}"] if self.ridge is not None else []
        parts += ["rounds2"] if self.rounds == 2 else []
        parts += [f"norm-{self.normalise}"] if self.normalise != "rms" else []
        return "-".join(parts)


class PreconditionConfig(Config):
    """The linear map P in which an SAE is trained: it sees P x, and is folded so that saved it takes x and gives x_hat.

    P = (C + shrinkage m I) ^ (-power / 2) with C the covariance of the activations and m its mean eigenvalue (whiten),
    with C's diagonal alone in its place (standardise), or with the covariance of what a plain pilot SAE leaves of them
    (residual). gamma weights the errors of P x.
    """

    kind: Literal["standardise", "whiten", "residual"]
    """standardise: each dimension by its own variance; whiten: by the covariance; residual: by that of what a plain
    SAE, trained before, leaves."""
    power: float = Field(default=1.0, ge=0, le=1, allow_inf_nan=False)
    """How far: 1 makes all variances 1, 0.5 takes the square root of that way (C^-1/4), 0 leaves x as it is."""
    shrinkage: Annotated[float, Field(ge=0, allow_inf_nan=False)] | Literal["ledoit-wolf"] = RIDGE
    """What is added to every eigenvalue of C before, as a share of their mean (a ridge); ledoit-wolf: C moves towards
    m I by the share of least expected error (Ledoit & Wolf 2004)."""

    @property
    def needs_pilot(self) -> bool:
        """Return whether P comes from what another SAE, trained before, leaves."""
        return self.kind == "residual"

    @property
    def label(self) -> str:
        """A short name: whiten-input-p0.5 ..."""
        parts = [f"{self.kind}-input-p{self.power:g}"]
        parts += [] if self.shrinkage == RIDGE else [f"shrink{self.shrinkage}"]
        return "-".join(parts)


MOST_VALUES = 1 << 44
"""Coded of a weight matrix: 64 TiB in float32."""


class ActivationConfig(Config):
    """What one kind of SAE has to say of its latents; `wsae.sae.architectures` says what each kind computes."""

    kind: Any  # each kind's own Literal


class TopK(ActivationConfig):
    """Keep the k largest pre-activations of a sample, then ReLU (Gao et al. 2025)."""

    kind: Literal["topk"] = "topk"
    k: PositiveInt = 32
    """Active latents per sample."""


class GroupTopK(ActivationConfig):
    """Split the latents into k contiguous groups and keep the largest of each, then ReLU (paper Appendix B.1)."""

    kind: Literal["group_topk"] = "group_topk"
    k: PositiveInt = 32
    """Number of groups, so active latents per sample; d_sae must be a multiple of it."""


WIDER = 4
"""How many times k latents the second code of multi_topk has."""


class MultiTopK(ActivationConfig):
    """Top-k that is trained to be a Top-4k too: an eighth of the loss with 4 k latents is added (Gao et al. 2025)."""

    kind: Literal["multi_topk"] = "multi_topk"
    k: PositiveInt = 32
    """Active latents per sample."""


class BatchTopK(ActivationConfig):
    """Keep the batch * k largest positive pre-activations of a batch (Bussmann et al. 2024).

    At inference a latent is active above a fixed threshold, learned as a running mean of the batches' smallest
    kept value, so one sample's code does not depend on its neighbours.
    """

    kind: Literal["batch_topk"] = "batch_topk"
    k: PositiveInt = 32
    """Mean number of active latents per sample."""


class Matryoshka(ActivationConfig):
    """Nested SAEs in one: the first latents of each width reconstruct alone, and the losses are added.

    Which latents are active is chosen among all of them, as the kind named by `over` does (Bussmann et al. 2025,
    "Learning Multi-Level Features with Matryoshka Sparse Autoencoders").
    """

    kind: Literal["matryoshka"] = "matryoshka"
    k: PositiveInt = 32
    """Active latents per sample (over batch_topk: their mean)."""
    widths: tuple[PositiveInt, ...] = ()
    """The nested widths of a Matryoshka SAE, increasing; d_sae itself may be left out. Default: 1/32, 3/32, 7/32, 15/32
    of d_sae, and d_sae."""
    over: Literal["batch_topk", "topk"] = "batch_topk"
    """How a Matryoshka SAE chooses its active latents."""
    level_auxk: bool = False
    """Whether dead latents of a Matryoshka SAE model what the levels up to their own leave, not what all leave."""

    @field_validator("widths")
    @classmethod
    def _widths_increase(cls, widths: tuple[int, ...]) -> tuple[int, ...]:
        if any(b <= a for a, b in itertools.pairwise(widths)):
            raise ValueError(f"{_listed(widths)} do not increase; give each width once, rising")
        return widths

    def nested(self, d_sae: int) -> tuple[int, ...]:
        """Return every width, that of the whole last; raises UserError for one that exceeds it."""
        if self.widths and self.widths[-1] > d_sae:
            raise UserError(f"widths {_listed(self.widths)} exceed d_sae = {d_sae}")
        widths = self.widths or tuple(sorted({max(1, d_sae * n // 32) for n in (1, 3, 7, 15)}))
        return (*(width for width in widths if width < d_sae), d_sae)


def _listed(values: tuple[int, ...]) -> str:
    return " ".join(map(str, values))


class ReLU(ActivationConfig):
    """z = max(pre, 0); sparse only through a penalty or the data."""

    kind: Literal["relu"] = "relu"


class Gated(ActivationConfig):
    """z = ReLU(e^r (pre - b_enc) + b_mag) where the gate pre > 0, else 0 (Rajamanoharan et al. 2024a).

    The L1 penalty is on ReLU(pre), which the decoder, held fixed, must be able to reconstruct from as well.
    """

    kind: Literal["gated"] = "gated"


class JumpReLU(ActivationConfig):
    """z = pre where pre > threshold, else 0, with a learned threshold per latent (Rajamanoharan et al. 2024b)."""

    kind: Literal["jumprelu"] = "jumprelu"
    threshold: PositiveFloat = 0.1
    """Starting threshold of JumpReLU, in units of the (scaled) activations."""
    bandwidth: PositiveFloat = 0.1
    """Width of the rectangle that stands in for the derivative of JumpReLU's step."""
    ste_to_input: bool | None = None
    """Whether that derivative reaches the pre-activations, and so the encoder, too (Anthropic's way); by default the
    thresholds alone (Rajamanoharan et al. 2024b)."""


_BUILT_IN = TopK | GroupTopK | MultiTopK | BatchTopK | Matryoshka | ReLU | Gated | JumpReLU
KINDS: dict[str, type[ActivationConfig]] = {
    made.model_fields["kind"].default: made for made in get_args(_BUILT_IN)
}
"""Every kind by name; `wsae.sae.architectures.register` adds others."""
Kind = Literal[
    "topk", "group_topk", "multi_topk", "batch_topk", "matryoshka", "relu", "gated", "jumprelu"
]
"""The kinds that come with wsae."""
_OWN = frozenset(KINDS)


def _origin(value: Any) -> str:
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return "built_in" if isinstance(kind, str) and kind in _OWN else "registered"


def _registered(value: Any) -> ActivationConfig:
    if isinstance(value, ActivationConfig):
        return value
    kind = value.get("kind") if isinstance(value, dict) else value
    try:
        return kind_named(str(kind)).parse(value, where=str(kind))
    except UserError as error:
        raise ValueError(str(error)) from error


Activation = Annotated[
    Annotated[Annotated[_BUILT_IN, Field(discriminator="kind")], Tag("built_in")]
    | Annotated[SerializeAsAny[ActivationConfig], BeforeValidator(_registered), Tag("registered")],
    Discriminator(_origin),
]


def kind_named(kind: str) -> type[ActivationConfig]:
    """Return the config of a kind, looking among installed packages for one that is not known yet.

    A package names its kinds as entry points of the group `wsae.architectures`: kind = "module:architecture".
    Raises UserError for a name that nobody has.
    """
    if kind not in KINDS:
        from importlib.metadata import entry_points  # slow to import, and seldom needed

        for found in entry_points(group="wsae.architectures", name=kind):
            found.load()
    if kind not in KINDS:
        *names, last = KINDS
        raise UserError(
            f"activation '{kind}' is unknown; choose {', '.join(names)} or {last}; a kind of "
            "your own must be registered first, or installed with an entry point wsae.architectures"
        )
    return KINDS[kind]


def make_activation(kind: str, k: int = 32) -> ActivationConfig:
    """Return the activation called `kind`; k is used by the Top-k family only.

    Raises UserError for another name, or a k that is no whole number of at least 1.
    """
    made = kind_named(kind)
    return made.parse({"k": k} if "k" in made.model_fields else {}, where="activation")


class SourcePart(Config):
    """One of the sources whose activations a crosscoder reads side by side: a hook's, or another model's."""

    name: str
    """The hook, and of which model where several have it."""
    width: PositiveInt
    scale: PositiveFloat = 1.0
    """What its activations are multiplied by for training, so that all sources vary alike; folded into the weights."""


class SAEConfig(Config):
    """Shape and form of one SAE (paper Eq. 2 and 3), or with d_out of a transcoder (Dunefsky et al. 2024).

    With `sources` it is a crosscoder (Lindsey et al. 2024).
    """

    d_in: PositiveInt
    """Width of the activations."""
    d_sae: PositiveInt
    """Number of latents."""
    activation: Activation = TopK()
    tied: bool = False
    """Tied is the theory's form, W_dec = W_enc^T without biases; untied has biases and unit-norm decoder rows."""
    input_norm: Literal["layer_norm", "constant_norm_rescale"] | None = None
    """What is done to each row of activations before it is encoded, and undone after it is decoded, in SAELens' words;
    such SAEs are read, used and exported, not trained."""
    d_out: PositiveInt | None = None
    """Width of the activations that a transcoder predicts from those of width d_in; none: an SAE, which predicts its
    own input."""
    skip: bool | None = None
    """Whether a transcoder adds a linear map of its input (Paulo et al. 2025)."""
    sources: Annotated[tuple[SourcePart, ...], Field(min_length=2)] | None = None
    """Of a crosscoder: what its activations are side by side, in order; none: they are one hook's."""

    @property
    def transcoder(self) -> bool:
        """Return whether it predicts other activations than it reads."""
        return self.d_out is not None

    @property
    def width_out(self) -> int:
        """Return the width of what it gives."""
        return self.d_out or self.d_in

    @model_validator(mode="after")
    def _transcoders_are_untied(self) -> "SAEConfig":
        if self.skip and not self.transcoder:
            raise ValueError("skip: is of transcoders, whose output is another activation (d_out)")
        if self.tied and self.transcoder:
            raise ValueError("tied: is of SAEs; a transcoder's decoder is of another space")
        if self.input_norm is not None and self.transcoder:
            raise ValueError(
                f"input_norm {self.input_norm}: is of SAEs; a transcoder has no equal here"
            )
        return self

    @model_validator(mode="after")
    def _sources_fill_the_width(self) -> "SAEConfig":
        if self.sources is None:
            return self
        total = sum(source.width for source in self.sources)
        if total != self.d_in:
            raise ValueError(f"sources of {total} dimensions together, and d_in is {self.d_in}")
        if len({source.name for source in self.sources}) < len(self.sources):
            raise ValueError("sources: two have the same name")
        for what, given in (("d_out", self.transcoder), ("input_norm", self.input_norm)):
            if given:
                raise ValueError(f"{what}: is not for a crosscoder, which gives what it reads")
        if self.tied:
            raise ValueError("tied: is not for a crosscoder, whose sources have a scale each")
        return self

    @model_validator(mode="after")
    def _k_fits(self) -> "SAEConfig":
        if max(self.d_in, self.width_out) * self.d_sae > MOST_VALUES:
            raise ValueError(
                f"d_sae = {self.d_sae} latents of width {self.d_in}: more than any machine holds"
            )
        k = getattr(self.activation, "k", None)
        if k is not None and k > self.d_sae:
            raise ValueError(
                f"k = {k} active latents of only d_sae = {self.d_sae}; lower k or raise d_sae"
            )
        if isinstance(self.activation, GroupTopK):
            check_groups(self.d_sae, self.activation.k)
        if isinstance(self.activation, Matryoshka):
            self.activation.nested(self.d_sae)
        if isinstance(self.activation, Gated) and self.tied:
            raise ValueError("a gated SAE has biases, so it cannot be tied")
        return self


def check_groups(d_sae: int, k: int) -> None:
    """Raise UserError when d_sae latents cannot form k equal groups."""
    if d_sae % k:
        down, up = d_sae - d_sae % k, d_sae + k - d_sae % k
        raise UserError(
            f"group_topk needs d_sae divisible by k, but {d_sae} % {k} = {d_sae % k}; "
            f"use d_sae {f'{down} or ' if down else ''}{up}, or another k"
        )


class Provenance(Config):
    """Where an SAE comes from, as far as its run, or the tool that wrote it, says; everything may be missing."""

    model: str | None = None
    """The model whose activations it was trained on."""
    hook: str | None = None
    """The hook point, in the words of whoever trained it."""
    hook_out: str | None = None
    """Of a transcoder: the hook point whose activations it predicts."""
    context: int | None = None
    """Tokens per sequence."""
    prepend_bos: bool | None = None
    """Whether sequences began with a begin-of-text token."""
    dataset: str | None = None
    """The text or images behind the activations; of a local path only the last name."""
    tokens: int | None = None
    """Rows it was trained on."""
    member: str | None = None
    """Its name in its run."""
    gamma: dict[str, Any] = {}
    """The rule of its loss weights: rule, alpha, normalise, ..."""
    metrics: dict[str, Any] = {}
    """Scores on held-out data: {name: {value, low, high}}."""
    inputs: dict[str, str] = {}
    """Digests of what it was made from, by name."""
    origin: dict[str, Any] = {}
    """For an SAE of another tool: `format` and what else its files say."""
    notes: tuple[str, ...] = ()
    """What its files leave open, or what to know before its scores are believed."""
    wsae_version: str | None = None
    """The version that trained it, where that was wsae."""

    @classmethod
    def of(cls, folder: Path) -> "Provenance":
        """Return what an SAE's directory says of itself; nothing where it says nothing."""
        return cls.load(folder / PROVENANCE) if (folder / PROVENANCE).is_file() else cls()


SINGLE = "sae"
"""Name of the member of a run that is one SAE alone."""


class SingleConfig(Config):
    """What is recorded of how one SAE alone was trained, often by another tool; None is not recorded."""

    sae: SAEConfig
    tokens: int | None = None
    """Rows it was trained on."""

    def names(self) -> list[str]:
        """Return the member's name."""
        return [SINGLE]

    def doubts(self) -> tuple[str, ...]:
        """Return nothing: of its training too little is known."""
        return ()
