"""The registry: what each kind of SAE computes. All else asks it: encoding, training steps, files, exports.

With pre = (x - b_dec) @ W_enc + b_enc, a kind says which latents of a batch may be active (`choose`) and what they are
worth (`values`, latent by latent, with parameters of its own). All have x_hat = z @ W_dec + b_dec. A kind that says no
more than that trains on every kernel there is, its gradients by autograd at the chosen latents alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function

from wsae.core.errors import UserError
from wsae.sae.config import (
    KINDS,
    WIDER,
    ActivationConfig,
    BatchTopK,
    Gated,
    GroupTopK,
    JumpReLU,
    Matryoshka,
    MultiTopK,
    ReLU,
    TopK,
)

Values = Float[Tensor, "..."]
"""One number for each (row, latent): dense [..., d_sae], or of chosen pairs alone [pairs]."""
Parameters = Mapping[str, Float[Tensor, "..."]]
"""A kind's own parameters by name, b_enc and `threshold`, shaped to go with Values."""

# Which latents may be active: all others are 0 and have no gradient.


class PerRow(NamedTuple):
    """The k largest pre-activations of each row."""

    k: int


class PerGroup(NamedTuple):
    """The largest of each of k contiguous groups of a row."""

    k: int


class PerBatch(NamedTuple):
    """The rows * k largest positive ones of a batch."""

    k: int


class Above(NamedTuple):
    """All above a floor: one for all latents, or one for each."""

    floor: float | Float[Tensor, "..."]


class Every(NamedTuple):
    """All of them; for kinds whose values no rule here foresees. No compiled kernel has it."""


Choice = PerRow | PerGroup | PerBatch | Above | Every


class Parameter(NamedTuple):
    """A parameter of a kind, one number per latent."""

    start: Callable[[Any], float]
    """Its value at the start, given the kind's config."""
    power: int
    """The power of s with which it goes when activations and latents are multiplied by s."""
    positive: bool = False
    """Whether it is kept at 0 or above."""


class Nested(NamedTuple):
    """Levels of a code: besides that of all latents, reconstructions of the levels up to each one have a loss."""

    widths: tuple[int, ...] | None
    """Latents up to each level; None: the k largest of a row are the first level, what else is chosen the second."""
    weights: tuple[float, ...]
    """Of each level's loss."""
    main: int
    """The level whose code and reconstruction are the SAE's."""
    k: int = 0
    """Pairs of a row in the first level, without widths."""
    level_auxk: bool = False
    """Whether dead latents model what the levels up to their own leave."""


def relu(pre: Values, own: Parameters, cfg: Any) -> Values:  # noqa: ARG001
    """Return max(pre, 0)."""
    return pre.relu()


@dataclass(frozen=True)
class Architecture:
    """A kind of SAE; `cfg` is its config and `own` its Parameters."""

    config: type[ActivationConfig]
    """What it has to be told; its field `kind` is the kind's name."""
    choose: Callable[[Any, Parameters], Choice]
    """(cfg, own): which latents may be active in training."""
    encode: Callable[[Any, Parameters], Choice] | None = None
    """The same where an SAE is used; None: as in training."""
    values: Callable[[Values, Parameters, Any], Values] = relu
    """(pre, own, cfg): z, differentiable in pre and own; s z where pre and own are those of s x."""
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    """Its own parameters, besides W_enc, W_dec, b_enc and b_dec."""
    reads_bias: bool = False
    """Whether `values` looks at own["b_enc"]."""
    count: Callable[[Values, Parameters, Any], Values] | None = None
    """(pre, own, cfg): 1 where a latent is active, else 0, differentiable: the L0 penalty is its sum."""
    gate: Callable[[Values], Values] | None = None
    """(pre): a second code. It has the L1 penalty in place of z, and the loss of what the fixed decoder makes of it."""
    nested: Callable[[Any, int], Nested] | None = None
    """(cfg, d_sae): the levels of its code."""
    plain: Callable[[Any, Mapping[str, Tensor]], "Plain"] | None = None
    """(cfg, tensors): the simpler kind with the same latents, which other tools know; None: itself."""

    @property
    def kind(self) -> str:
        """Its name."""
        return self.config.model_fields["kind"].default

    def used(self, cfg: Any, own: Parameters) -> Choice:
        """Return which latents may be active where the SAE is used."""
        return (self.encode or self.choose)(cfg, own)

    @property
    def sparse(self) -> bool:
        """Whether its config says how many latents are active."""
        return "k" in self.config.model_fields


class Plain(NamedTuple):
    """Another kind's config and tensors, under the names of `SAE.tensors`."""

    activation: ActivationConfig
    tensors: dict[str, Tensor]


_BY_CONFIG: dict[type[ActivationConfig], Architecture] = {}


def register(architecture: Architecture) -> Architecture:
    """Make a kind of SAE known, and return it; raises UserError where its name is taken.

    From then on `SAEConfig(activation=...)` takes its config, in Python and from files, and everything else works.
    """
    kind, config = architecture.kind, architecture.config
    if not isinstance(kind, str):
        raise UserError(
            f"{config.__name__}: give its kind a default, kind: Literal['name'] = 'name'"
        )
    if KINDS.get(kind, config) is not config or config in _BY_CONFIG:
        raise UserError(f"a kind of SAE called '{kind}' is registered already; choose another name")
    KINDS[kind] = config
    _BY_CONFIG[config] = architecture
    return architecture


def architecture_of(cfg: ActivationConfig) -> Architecture:
    """Return what the kind of this config computes; raises UserError where nobody registered it."""
    if type(cfg) not in _BY_CONFIG:
        raise UserError(
            f"activation {type(cfg).__name__} is not registered; call wsae.sae.register"
        )
    return _BY_CONFIG[type(cfg)]


# JumpReLU and its penalty's step function, with the threshold gradients of Rajamanoharan et al. 2024b.
#
# JumpReLU(z) = z H(z - theta), d/dtheta = -(theta / width) rect((z - theta) / width)
# step(z) = H(z - theta),       d/dtheta = -(1 / width) rect((z - theta) / width)
# with rect(u) = 1 for |u| < 1/2, which integrates to 1, so the width scales no gradient on average. Both depend on the
# threshold as on -z, so with `ste_to_input` z has the same gradients with the other sign, besides JumpReLU's own.


def jumprelu(
    pre: Values, threshold: Float[Tensor, "..."], bandwidth: float, ste_to_input: bool = False
) -> Values:
    """Return pre where it exceeds the threshold, else 0."""
    return _JumpReLU.apply(pre, threshold, bandwidth, ste_to_input)


def step(
    pre: Values, threshold: Float[Tensor, "..."], bandwidth: float, ste_to_input: bool = False
) -> Values:
    """Return 1 where pre exceeds the threshold, else 0 (their sum is L0)."""
    return _Step.apply(pre, threshold, bandwidth, ste_to_input)


def _rectangle(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    return ((pre - threshold).abs() < bandwidth / 2).to(pre.dtype) / bandwidth


class _JumpReLU(Function):
    @staticmethod
    def forward(ctx, pre, threshold, bandwidth, ste_to_input):
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth, ctx.ste_to_input = bandwidth, ste_to_input
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx, *grads):
        pre, threshold = ctx.saved_tensors
        near = grads[0] * _rectangle(pre, threshold, ctx.bandwidth)
        through = grads[0] * (pre > threshold)
        through = through + near * threshold if ctx.ste_to_input else through
        return through, -near.sum_to_size(threshold.shape) * threshold, None, None


class _Step(Function):
    @staticmethod
    def forward(ctx, pre, threshold, bandwidth, ste_to_input):
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth, ctx.ste_to_input = bandwidth, ste_to_input
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx, *grads):
        pre, threshold = ctx.saved_tensors
        near = grads[0] * _rectangle(pre, threshold, ctx.bandwidth)
        through = near if ctx.ste_to_input else torch.zeros_like(pre)
        return through, -near.sum_to_size(threshold.shape), None, None


# The kinds that come with wsae.


def _gated(pre: Tensor, own: Parameters, cfg: Gated) -> Tensor:  # noqa: ARG001
    magnitude = own["r_mag"].exp() * (pre - own["b_enc"]) + own["b_mag"]
    return magnitude.relu() * (pre.detach() > 0)


def gated_as_jumprelu(
    weights: Mapping[str, Float[Tensor, "..."]],
) -> dict[str, Float[Tensor, "..."]]:
    """Return W_enc, b_enc and threshold of the JumpReLU that a gated SAE is, from W_enc, b_enc, r_mag and b_mag.

    z = [a + b_enc > 0] relu(e a + b_mag) with a = x @ W_enc and e = exp(r_mag); with u = e a + b_mag the gate is open
    where u > b_mag - e b_enc, so z = u [u > max(b_mag - e b_enc, 0)] (Rajamanoharan et al. 2024a, Section 3.3).
    """
    e, b_mag = weights["r_mag"].double().exp(), weights["b_mag"]
    threshold = (b_mag.double() - e * weights["b_enc"].double()).clamp_min(0)
    W_enc = (weights["W_enc"].double() * e).to(b_mag.dtype)
    return {"W_enc": W_enc, "b_enc": b_mag, "threshold": threshold.to(b_mag.dtype)}


def _plain_gated(cfg: Gated, tensors: Mapping[str, Tensor]) -> Plain:  # noqa: ARG001
    rest = {name: t for name, t in tensors.items() if name not in ("r_mag", "b_mag")}
    return Plain(JumpReLU(), {**rest, **gated_as_jumprelu(tensors)})


def _nested(cfg: Matryoshka, d_sae: int) -> Nested:
    widths = cfg.nested(d_sae)
    last = len(widths) - 1
    return Nested(widths, (1.0,) * len(widths), last, level_auxk=cfg.level_auxk)


def _plain_matryoshka(cfg: Matryoshka, tensors: Mapping[str, Tensor]) -> Plain:
    made = TopK if cfg.over == "topk" else BatchTopK
    return Plain(made(k=cfg.k), dict(tensors))


def _by_rows(cfg: TopK | MultiTopK, own: Parameters) -> Choice:  # noqa: ARG001
    return PerRow(cfg.k)


def _over_threshold(cfg: ActivationConfig, own: Parameters) -> Choice:  # noqa: ARG001
    return Above(own["threshold"])


TOPK = register(Architecture(TopK, _by_rows))
GROUP_TOPK = register(Architecture(GroupTopK, lambda cfg, own: PerGroup(cfg.k)))  # noqa: ARG005
MULTI_TOPK = register(
    Architecture(
        MultiTopK,
        lambda cfg, own: PerRow(WIDER * cfg.k),  # noqa: ARG005
        encode=_by_rows,
        nested=lambda cfg, d_sae: Nested(None, (1.0, 1 / 8), 0, cfg.k),  # noqa: ARG005
        plain=lambda cfg, tensors: Plain(TopK(k=cfg.k), dict(tensors)),
    )
)
BATCH_TOPK = register(
    Architecture(BatchTopK, lambda cfg, own: PerBatch(cfg.k), encode=_over_threshold)  # noqa: ARG005
)
MATRYOSHKA = register(
    Architecture(
        Matryoshka,
        lambda cfg, own: PerRow(cfg.k) if cfg.over == "topk" else PerBatch(cfg.k),  # noqa: ARG005
        encode=lambda cfg, own: PerRow(cfg.k) if cfg.over == "topk" else Above(own["threshold"]),
        nested=_nested,
        plain=_plain_matryoshka,
    )
)
RELU = register(Architecture(ReLU, lambda cfg, own: Above(0.0)))  # noqa: ARG005
GATED = register(
    Architecture(
        Gated,
        lambda cfg, own: Above(0.0),  # noqa: ARG005
        values=_gated,
        parameters={"r_mag": Parameter(lambda _: 0.0, 0), "b_mag": Parameter(lambda _: 0.0, 1)},
        reads_bias=True,
        gate=torch.relu,
        plain=_plain_gated,
    )
)
JUMPRELU = register(
    Architecture(
        JumpReLU,
        # the thresholds' gradient reaches half the width below them
        lambda cfg, own: Above(own["threshold"] - cfg.bandwidth / 2),
        encode=_over_threshold,
        values=lambda pre, own, cfg: jumprelu(
            pre, own["threshold"], cfg.bandwidth, bool(cfg.ste_to_input)
        ),
        parameters={"threshold": Parameter(lambda cfg: cfg.threshold, 1, positive=True)},
        count=lambda pre, own, cfg: step(
            pre, own["threshold"], cfg.bandwidth, bool(cfg.ste_to_input)
        ),
    )
)
