"""Which latents, at which tokens, move what a model says: gradients first, then ablation of those that matter most.

Written with its error e, a row at the hook is h = b_dec + sum_j z_j W_dec[j] + e. For a metric m of the logits

    gradient x activation      effect(t, j) = z_tj W_dec[j] . dm/dh_t
    integrated gradients       the same with the mean of dm/dh_t on the way from b_dec to h (Sundararajan et al. 2017)

and the error of every token has an effect alike, e_t . dm/dh_t. Integrated gradients are complete: up to the quadrature
all effects add up to m(h) - m(b_dec), the rows of all tokens changed at once; gradients so far as the model is linear.
Of a transcoder h is what its module gives, z what it finds in the module's input, and b_dec + x W_skip^T stays of h.
Tokens that training left out (`wsae.use.attach`) keep their row and have no effect.
"""

import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn

from wsae.acts.capture import Call, Swap, logits_by_row, refuse_too_long, splice
from wsae.acts.flow import REASONS
from wsae.acts.hookpoints import HookPoint
from wsae.acts.loading import input_device, refuse_without_logits
from wsae.acts.tokens import ids_behind
from wsae.core.calls import tensor
from wsae.core.errors import UserError
from wsae.core.progress import Progress, quiet
from wsae.sae.model import SAE, an_sae
from wsae.use.attach import Codes, Exclude, attach

Method = Literal["gradient", "integrated"]
PARTS, HALVED = 8, 6
"""Parts of the way from b_dec to h at first, and how many of them are halved at once. They are short near b_dec (the
share of the way is a square, u^2), where tokens are nearly alike and models change fastest."""
CLOSE = 0.03
"""Parts are halved until effects are complete to this share of the metric's change."""
MOST_PARTS = 40
AT_ONCE = 512
"""Tokens in one pass, about."""
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


@torch.inference_mode(False)
def attribute(
    model: nn.Module,
    saes: Mapping[str, SAE],
    ids: Int64[Tensor, " seq"],
    metric: Metric,
    *,
    method: Method = "gradient",
    verify: int = 10,
    exclude: Exclude = "as in training",
    hook_out: Mapping[str, str] = MappingProxyType({}),
    progress: Progress = quiet,
) -> Attribution:
    """Return the effects of latents on a metric of a text, the `verify` largest of them checked by ablation.

    `hook_out`: what transcoders give, as `attach` has it. Raises UserError as `attach` and the metrics do, for a model
    without logits, another method, and tokens that are not those of one text, or more than the model takes.
    """
    if method not in get_args(Method):
        raise UserError(f"method {method!r}: is neither of {', '.join(get_args(Method))}")
    if verify < 0:
        raise UserError(f"verify {verify}: give how many effects to check, 0 or more")
    ids = tensor(ids, "ids").clone()  # those of inference mode may enter no gradient
    if ids.ndim != 1 or not len(ids) or ids.is_floating_point():
        raise UserError(
            f"ids: {ids.dtype} of shape {tuple(ids.shape)}; give the tokens of one text, whole numbers [seq]"
        )
    ids = ids.long()
    refuse_too_long(model, len(ids))
    refuse_without_logits(model)
    passes = _GradientPasses(model, saes, ids, metric)
    found: dict[str, AtHook] = {}
    with progress("attribute", 1 + 2 * len(saes), "hooks") as tick:
        base = passes.base(exclude, hook_out)
        tick(1)
        for hook in saes:
            found[hook] = _at_hook(passes, base, hook, method)
            tick(1)
        effects = [one for at in found.values() for one in at.effects]
        effects.sort(key=lambda one: -abs(one.effect))
        true: dict[Effect, float] = {}
        for hook in saes:
            here = [one for one in effects[:verify] if one.hook == hook]
            true |= zip(here, passes.lost(base, hook, here), strict=True)
            tick(1)
    verified = [Verified(one, true[one]) for one in effects[:verify]]
    return Attribution(method, base.value, ids.tolist(), found, verified)


def one_token(tokenizer: Any, text: str, name: str) -> int:
    """Return the token that a text is; raises UserError, naming the flag or field, where it is several, or none."""
    ids = ids_behind(tokenizer, text)
    if len(ids) != 1:
        parts = " ".join(tokenizer.convert_ids_to_tokens(ids))
        what = f"{len(ids)} tokens ({parts})" if ids else "no token"
        raise UserError(f"{name} {text!r}: is {what}; give one, with the space before it")
    return int(ids[0])


@torch.inference_mode()
def likeliest(model: nn.Module, ids: Int64[Tensor, " seq"], count: int = 1) -> list[int]:
    """Return the tokens that a model finds likeliest behind a text; raises UserError for one that predicts none."""
    refuse_without_logits(model)
    logits = model(input_ids=ids[None].to(input_device(model)), use_cache=False).logits[0, -1]
    return logits.topk(count).indices.tolist()


class _Base(NamedTuple):
    """The model's own pass: the metric, and for each SAE latents, what it reads, rows and the metric's gradient."""

    value: float
    codes: dict[str, Codes]
    read: dict[str, Float[Tensor, "seq d_in"]]
    rows: dict[str, Float[Tensor, "seq d_out"]]
    gradients: dict[str, Float[Tensor, "seq d_out"]]


class _Slopes(NamedTuple):
    """A metric at several places, and its gradients there."""

    values: Float[Tensor, " batch"]
    gradients: Float[Tensor, "batch seq d_in"]


class _GradientPasses:
    """Passes of a model over one text, with other rows at a hook."""

    def __init__(
        self, model: nn.Module, saes: Mapping[str, SAE], ids: Int64[Tensor, " seq"], metric: Metric
    ) -> None:
        self.model, self.metric = model, metric
        self.saes = {hook: an_sae(sae, f"hook {hook!r}") for hook, sae in saes.items()}
        self.points: Mapping[str, HookPoint] = {}
        self._together: dict[str, int] = {}
        self.ids = ids.to(input_device(model))
        can_cut = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._last = {"logits_to_keep": metric.reach(len(ids))} if can_cut else {}
        """What spares the model the logits that the metric does not read."""

    @torch.enable_grad()
    def base(self, exclude: Exclude, hook_out: Mapping[str, str]) -> _Base:
        """Return what the model's own pass gives."""
        rows: dict[str, Tensor] = {}

        def keep(name: str, x: Tensor, _call: Call) -> Tensor:
            rows[name] = x if x.requires_grad else x.detach().requires_grad_()
            return rows[name].clone()

        with attach(self.model, self.saes, exclude=exclude, hook_out=hook_out) as attached:
            self.points = attached.points
            (value,) = self._values({name: partial(keep, name) for name in self.saes})
            codes = attached.acts
        found = torch.autograd.grad(value, [*rows.values()])
        gradients = {name: g[0] for name, g in zip(rows, found, strict=True)}
        own = {name: _wide(x) for name, x in rows.items()}
        reads = {name: codes[name].call.read for name in rows}
        read = {name: own[name] if x is None else _wide(x) for name, x in reads.items()}
        return _Base(float(value.detach()), codes, read, own, gradients)

    @torch.enable_grad()
    def slopes(self, hook: str, rows: Float[Tensor, "batch seq d_in"]) -> _Slopes:
        """Return the metric and its gradient where a hook's rows are these."""
        values, gradients = [], []
        for some in self._some(hook, rows):
            leaf = some.detach().clone().requires_grad_()
            found = self._values({hook: lambda _x, _call: leaf.clone()})  # noqa: B023
            gradients.append(torch.autograd.grad(found.sum(), leaf)[0])
            values.append(found.detach())
        return _Slopes(torch.cat(values), torch.cat(gradients))

    @torch.no_grad()
    def values(self, hook: str, rows: Float[Tensor, "batch seq d_in"]) -> Float[Tensor, " batch"]:
        """Return the metric where a hook's rows are these."""
        parts = self._some(hook, rows)
        return torch.cat([self._values({hook: lambda _x, _call: some}) for some in parts])  # noqa: B023

    def _some(self, hook: str, rows: Tensor) -> Sequence[Tensor]:
        """Return the rows in parts that go through the model at once, the layers before the hook run for one."""
        if hook not in self._together:
            by_row = logits_by_row(self.model, self.points[hook], self.ids)
            self._together[hook] = max(1, AT_ONCE // len(self.ids)) if by_row else 1
        return rows.split(self._together[hook])

    def lost(self, base: _Base, hook: str, effects: Sequence[Effect]) -> list[float]:
        """Return what the metric loses without each latent at its token, all else of the row as it was."""
        own, sae = base.rows[hook], self.saes[hook]
        factor = sae.normalised(base.read[hook].to(sae.W_dec)).factor
        rows = own.repeat(1 + len(effects), 1, 1)
        for changed, one in zip(rows[1:], effects, strict=True):
            row = factor[one.position] * sae.W_dec[one.latent].detach()
            changed[one.position] -= one.activation * row.to(rows)
        values = self.values(hook, rows).tolist() if effects else [base.value]
        return [values[0] - without for without in values[1:]]

    def _values(self, swaps: Mapping[str, Swap]) -> Float[Tensor, " batch"]:
        with contextlib.ExitStack() as stack:
            for name, swap in swaps.items():
                stack.enter_context(splice(self.model, self.points[name], swap))
            logits = self.model(input_ids=self.ids[None], use_cache=False, **self._last).logits
        return self.metric(logits, self.ids)


def _wide(x: Float[Tensor, "1 seq width"]) -> Float[Tensor, "seq width"]:
    return x.detach()[0].to(torch.promote_types(x.dtype, torch.float32))


@torch.no_grad()
def _at_hook(passes: _GradientPasses, base: _Base, hook: str, method: Method) -> AtHook:
    """Return the effects at one hook."""
    sae, codes, x = passes.saes[hook], base.codes[hook], base.rows[hook]
    code, kept = codes.code, codes.kept[0].to(x.device)
    silent = code._replace(
        values=code.values[:0], indices=code.indices[:0], offsets=code.offsets * 0
    )
    own, read = x.to(sae.W_dec), base.read[hook].to(sae.W_dec)
    gone = torch.where(kept[:, None], sae.decode_code(silent, read).to(x), x)
    slopes = partial(passes.slopes, hook)
    if method == "integrated":
        end = _Slopes(torch.tensor([base.value]), base.gradients[hook][None])
        change, slope = _integrated(slopes, gone, x - gone, end)
    else:
        change = base.value - float(passes.values(hook, gone[None]))
        slope = base.gradients[hook]
    slope = slope.to(sae.W_dec)
    rows, latents, z = code.rows(), code.indices, code.values.detach()
    effect = z * sae.normalised(read).factor[rows] * (slope @ sae.W_dec.T)[rows, latents]
    order = effect.abs().argsort(descending=True, stable=True)
    order = order[z[order] != 0]
    listed = order[:MOST]
    columns = (rows[listed], latents[listed], z[listed], effect[listed])
    error = (own - sae.decode_code(code, read)) * kept[:, None].to(sae.W_dec.device)
    reasons = codes.reasons[0].tolist()
    return AtHook(
        [Effect(hook, *one) for one in zip(*(c.tolist() for c in columns), strict=True)],
        len(order),
        float(effect[order[MOST:]].double().sum()),
        (error * slope).double().sum(1).tolist(),
        {place: REASONS[why] for place, why in enumerate(reasons) if why},
        change,
    )


class _Integrated(NamedTuple):
    """What a metric changes by on the way, and its mean gradient there."""

    change: float
    slope: Float[Tensor, "seq d_in"]


def _integrated(
    slopes: Callable[[Float[Tensor, "batch seq d_in"]], _Slopes],
    start: Float[Tensor, "seq d_in"],
    way: Float[Tensor, "seq d_in"],
    end: _Slopes,
) -> _Integrated:
    """Return the change and the mean gradient on the way from `start` to `end`, by the trapezoidal rule in u.

    With share = u^2, m(u_2) - m(u_1) is the integral of 2u w . g from u_1 to u_2 along the way w: the rule's error is
    known in every part, and the parts where it is largest are halved.
    """

    def at(u: Float64[Tensor, " batch"]) -> _Slopes:
        return slopes(start + (u * u).to(way)[:, None, None] * way)

    u = torch.arange(PARTS + 1, dtype=torch.float64, device=way.device) / PARTS
    values, gradients = map(torch.cat, zip(at(u[:-1]), (x.to(way) for x in end), strict=True))
    while True:
        order = u.argsort()
        u, values, gradients = u[order], values[order], gradients[order]
        along = 2 * u * (gradients * way).double().sum((1, 2))
        parts, moved = u.diff(), values.double().diff()
        off = parts * (along[1:] + along[:-1]) / 2 - moved
        change = float(moved.sum())
        if len(parts) >= MOST_PARTS or abs(float(off.sum())) <= CLOSE * abs(change):
            break
        fresh = (u[:-1] + parts / 2)[off.abs().topk(HALVED).indices]
        u = torch.cat([u, fresh])
        values, gradients = map(torch.cat, zip((values, gradients), at(fresh), strict=True))
    edge = parts.new_zeros(1)
    weight = u * (torch.cat([edge, parts]) + torch.cat([parts, edge]))
    return _Integrated(change, torch.einsum("u,usd->sd", weight.to(way), gradients))
