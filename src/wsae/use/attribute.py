"""Which latents, at which tokens, move what a model says: gradients first, then ablation of those that matter most.

Written with its error e, a row at the hook is h = b_dec + sum_j z_j W_dec[j] + e. For a metric m of the logits

    gradient x activation      effect(t, j) = z_tj W_dec[j] . dm/dh_t
    integrated gradients       the same with the mean of dm/dh_t on the way from b_dec to h (Sundararajan et al. 2017)

and the error of every token has an effect alike, e_t . dm/dh_t. Integrated gradients are complete: up to the quadrature
all effects add up to m(h) - m(b_dec), the rows of all tokens changed at once; gradients so far as the model is linear.
Tokens that training left out (`wsae.use.attach`) keep their row and have no effect.
"""

import contextlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from wsae.acts.capture import Call, Swap, hooks_named, splice
from wsae.acts.flow import REASONS
from wsae.acts.loading import input_device, refuse_without_logits
from wsae.core.errors import UserError
from wsae.core.progress import Progress, quiet
from wsae.sae.model import SAE
from wsae.use.attach import Codes, Exclude, attach

Method = Literal["gradient", "integrated"]
STEPS = (8, 16, 32)
"""Parts of the way from b_dec to h, halved until effects are complete to `CLOSE`. They are short near b_dec (the share
of the way is a square, u^2), where tokens are nearly alike and models change fastest."""
CLOSE = 0.05
MOST = 1000
"""Effects that a hook lists."""


@dataclass(frozen=True)
class Logit:
    """The logit of a token behind the text."""

    token: int

    def reach(self, _seq: int) -> int:
        """Return how many tokens from the end on have logits that count."""
        return 1

    def __call__(
        self, logits: Float[Tensor, "batch last vocabulary"], _ids: Int64[Tensor, " seq"]
    ) -> Float[Tensor, " batch"]:
        """Return it for each sequence; raises UserError for a token that the model does not have."""
        if not 0 <= self.token < logits.shape[-1]:
            raise UserError(f"token {self.token}: the model has 0 to {logits.shape[-1] - 1}")
        return logits[:, -1, self.token]


@dataclass(frozen=True)
class LogitDifference:
    """By how much the logit of a token exceeds another's, behind the text."""

    token: int
    other: int

    def reach(self, _seq: int) -> int:
        """Return how many tokens from the end on have logits that count."""
        return 1

    def __call__(
        self, logits: Float[Tensor, "batch last vocabulary"], ids: Int64[Tensor, " seq"]
    ) -> Float[Tensor, " batch"]:
        """Return it for each sequence; raises UserError as `Logit` does."""
        return Logit(self.token)(logits, ids) - Logit(self.other)(logits, ids)


@dataclass(frozen=True)
class Loss:
    """The mean cross-entropy of the text's tokens from place `start` on, in nats."""

    start: int = 1

    def reach(self, seq: int) -> int:
        """Return how many tokens from the end on have logits that count."""
        return seq - self.start + 1

    def __call__(
        self, logits: Float[Tensor, "batch last vocabulary"], ids: Int64[Tensor, " seq"]
    ) -> Float[Tensor, " batch"]:
        """Return it for each sequence; raises UserError where no token is left to predict."""
        if not 0 < self.start < len(ids):
            raise UserError(f"loss from token {self.start} on: the text has 1 to {len(ids) - 1}")
        log_p = logits[:, -self.reach(len(ids)) : -1].float().log_softmax(-1)
        places = torch.arange(log_p.shape[1], device=ids.device)
        return -log_p[:, places, ids[self.start :]].mean(1)


Metric = Logit | LogitDifference | Loss


@dataclass(frozen=True)
class Effect:
    """One latent at one token; `effect` is what the metric would lose without it, as the gradients say."""

    hook: str
    position: int
    latent: int
    activation: float
    effect: float


@dataclass(frozen=True)
class Verified:
    """An effect, and what the metric did lose when that latent alone was set to 0 at that token."""

    predicted: Effect
    true: float


@dataclass(frozen=True)
class AtHook:
    """What one hook's rows did."""

    effects: list[Effect]
    """Of the active latents, largest first."""
    active: int
    """How many there are; the rest of them, with the smallest effects, is not listed."""
    unlisted: float
    """Sum of the effects that are not listed."""
    errors: list[float]
    """Effect of each token's error."""
    left_out: dict[int, str]
    """Tokens that the SAE was not applied to, and why."""
    change: float
    """m(h) - m(b_dec)."""

    @property
    def total(self) -> float:
        """Sum of all effects; with integrated gradients, `change`."""
        return sum(one.effect for one in self.effects) + self.unlisted + sum(self.errors)

    @property
    def incompleteness(self) -> float | None:
        """|total - change| / |change|."""
        return abs(self.total - self.change) / abs(self.change) if self.change else None


@dataclass(frozen=True)
class Attribution:
    """What moved a metric on a text."""

    method: Method
    value: float
    """The metric."""
    ids: list[int]
    hooks: dict[str, AtHook]
    verified: list[Verified]
    """The largest effects of all hooks, checked by ablation."""

    @property
    def correlation(self) -> float | None:
        """Pearson's between predicted and true effects; none where there are fewer than three or they do not vary."""
        pairs = np.array([[one.predicted.effect, one.true] for one in self.verified])
        if len(pairs) < 3 or not (pairs.std(axis=0) > 0).all():
            return None
        return float(np.corrcoef(pairs.T)[0, 1])

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON may carry it, with what follows from it."""
        hooks = {
            name: {**asdict(at), "total": at.total, "incompleteness": at.incompleteness}
            for name, at in self.hooks.items()
        }
        return {**asdict(self), "hooks": hooks, "correlation": self.correlation}


def attribute(
    model: nn.Module,
    saes: Mapping[str, SAE],
    ids: Int64[Tensor, " seq"],
    metric: Metric,
    *,
    method: Method = "gradient",
    verify: int = 10,
    exclude: Exclude = "as in training",
    progress: Progress = quiet,
) -> Attribution:
    """Return the effects of latents on a metric of a text, the `verify` largest of them checked by ablation.

    Raises UserError as `attach` and the metrics do, and for a model without logits.
    """
    refuse_without_logits(model)
    passes = _GradientPasses(model, saes, ids, metric)
    found: dict[str, AtHook] = {}
    with progress("attribute", 1 + len(saes) + verify, "passes") as tick:
        base = passes.base(exclude)
        tick(1)
        for hook in saes:
            found[hook] = _at_hook(passes, base, hook, method)
            tick(1)
        effects = [one for at in found.values() for one in at.effects]
        effects.sort(key=lambda one: -abs(one.effect))
        verified = []
        for one in effects[:verify]:
            verified.append(Verified(one, base.value - passes.without(base, one)))
            tick(1)
    return Attribution(method, base.value, ids.tolist(), found, verified)


class _Base(NamedTuple):
    """The model's own pass: the metric, and at each hook latents, rows and the metric's gradient."""

    value: float
    codes: dict[str, Codes]
    rows: dict[str, Float[Tensor, "seq d_in"]]
    gradients: dict[str, Float[Tensor, "seq d_in"]]


class _GradientPasses:
    """Passes of a model over one text, with other rows at a hook."""

    def __init__(
        self, model: nn.Module, saes: Mapping[str, SAE], ids: Int64[Tensor, " seq"], metric: Metric
    ) -> None:
        self.model, self.saes, self.metric = model, saes, metric
        self.points = hooks_named(model, saes)
        self.ids = ids.to(input_device(model))
        can_cut = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._last = {"logits_to_keep": metric.reach(len(ids))} if can_cut else {}
        """What spares the model the logits that the metric does not read."""

    @torch.enable_grad()
    def base(self, exclude: Exclude) -> _Base:
        """Return what the model's own pass gives."""
        rows: dict[str, Tensor] = {}

        def keep(name: str, x: Tensor, _call: Call) -> Tensor:
            rows[name] = x if x.requires_grad else x.detach().requires_grad_()
            return rows[name].clone()

        with attach(self.model, self.saes, exclude=exclude) as attached:
            value = self._value({name: partial(keep, name) for name in self.saes})
            codes = attached.acts
        found = torch.autograd.grad(value, [*rows.values()])
        gradients = {name: g[0] for name, g in zip(rows, found, strict=True)}
        own = {
            name: x.detach()[0].to(torch.promote_types(x.dtype, torch.float32))
            for name, x in rows.items()
        }
        return _Base(float(value.detach()), codes, own, gradients)

    @torch.enable_grad()
    def gradient(self, hook: str, rows: Float[Tensor, "seq d_in"]) -> Float[Tensor, "seq d_in"]:
        """Return the metric's gradient where a hook's rows are these."""
        leaf = rows.detach()[None].clone().requires_grad_()
        value = self._value({hook: lambda _x, _call: leaf.clone()})
        return torch.autograd.grad(value, leaf)[0][0]

    @torch.no_grad()
    def value(self, hook: str, rows: Float[Tensor, "seq d_in"]) -> float:
        """Return the metric where a hook's rows are these."""
        return float(self._value({hook: lambda _x, _call: rows[None]}))

    def without(self, base: _Base, one: Effect) -> float:
        """Return the metric without one latent at one token, all else of the row as it was."""
        rows = base.rows[one.hook].clone()
        row = self.saes[one.hook].W_dec[one.latent].detach().to(rows)
        rows[one.position] -= one.activation * row
        return self.value(one.hook, rows)

    def _value(self, swaps: Mapping[str, Swap]) -> Float[Tensor, " 1"]:
        with contextlib.ExitStack() as stack:
            for name, swap in swaps.items():
                stack.enter_context(splice(self.model, self.points[name], swap))
            logits = self.model(input_ids=self.ids[None], use_cache=False, **self._last).logits
        return self.metric(logits, self.ids)


@torch.no_grad()
def _at_hook(passes: _GradientPasses, base: _Base, hook: str, method: Method) -> AtHook:
    """Return the effects at one hook."""
    sae, codes, x = passes.saes[hook], base.codes[hook], base.rows[hook]
    code, kept = codes.code, codes.kept[0].to(x.device)
    start = torch.zeros_like(x[0]) if sae.b_dec is None else sae.b_dec.detach().to(x)
    gone = torch.where(kept[:, None], start, x)
    change, slope = base.value - passes.value(hook, gone), base.gradients[hook]
    if method == "integrated":
        slope = _integrated(lambda rows: passes.gradient(hook, rows), slope, x - gone, gone, change)
    slope = slope.to(sae.W_dec)
    rows, latents, z = code.rows(), code.indices, code.values.detach()
    effect = z * (slope @ sae.W_dec.T)[rows, latents]
    order = effect.abs().argsort(descending=True, stable=True)
    order = order[z[order] != 0]
    listed = order[:MOST]
    columns = (rows[listed], latents[listed], z[listed], effect[listed])
    error = (x.to(sae.W_dec) - sae.decode_code(code)) * kept[:, None].to(sae.W_dec.device)
    reasons = codes.reasons[0].tolist()
    return AtHook(
        [Effect(hook, *one) for one in zip(*(c.tolist() for c in columns), strict=True)],
        len(order),
        float(effect[order[MOST:]].double().sum()),
        (error * slope).double().sum(1).tolist(),
        {place: REASONS[why] for place, why in enumerate(reasons) if why},
        change,
    )


def _integrated(
    gradient: Callable[[Float[Tensor, "seq d_in"]], Float[Tensor, "seq d_in"]],
    last: Float[Tensor, "seq d_in"],
    way: Float[Tensor, "seq d_in"],
    start: Float[Tensor, "seq d_in"],
    change: float,
) -> Float[Tensor, "seq d_in"]:
    """Return the mean gradient on the way from `start`, `last` at its end: the trapezoidal rule in u, share = u^2.

    The integral of g(u^2) 2u over u in [0, 1]; the first point has weight 0. Points of a coarser rule are kept.
    """
    total, mean, before = last.clone(), last, 1
    for parts in STEPS:
        fresh = [i for i in range(1, parts) if parts == STEPS[0] or i % (parts // before)]
        for u in (i / parts for i in fresh):
            total += 2 * u * gradient(start + u * u * way)
        mean, before = total / parts, parts
        if abs(float((mean * way).double().sum()) - change) <= CLOSE * abs(change):
            break
    return mean
