"""Preconditioners: an SAE trained on P x, and folded so that it takes x and gives x_hat.

With y = P x the SAE computes pre = (y - b) W_enc + b_enc and y_hat = z W_dec + b. As P is symmetric, the same latents
come from x by W_enc' = P W_enc and b' = P^-1 b, and x_hat = P^-1 y_hat by W_dec' = W_dec P^-1. Folding is exact, so
the folded decoder's rows are not of norm 1: to make them so would scale the latents, and other ones would be largest.
The loss ||Gamma (y - y_hat)||^2 is ||Gamma P (x - x_hat)||^2: Gamma P is the folded SAE's gamma. Of a transcoder P maps
what it reads alone: W_enc' = P W_enc and W_skip' = W_skip P, and nothing else changes. Of a crosscoder S, one number
for each source, comes before P, and is all where no P is asked for.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from wsae.core.errors import UserError
from wsae.sae.config import PreconditionConfig, SourcePart
from wsae.sae.forward import Weights, weigh
from wsae.sae.model import SAE
from wsae.stats.moments import Covariance


@dataclass(frozen=True)
class Preconditioner:
    """The map P, symmetric and positive definite, its inverse, and the moments of P x; trace(P P) = d_in."""

    map: Weights
    """P, or its diagonal where it has no more."""
    inverse: Weights
    record: dict[str, Any]
    """What a run keeps of it: how it was made, from how many rows, and its condition number."""
    half: bool = False
    """Whether activations and what becomes of them are rounded to bfloat16 on the way: by 2^-9 at most."""
    before: "Preconditioner | None" = None
    """A map that comes before this one: x is mapped by both."""
    sources: tuple[SourcePart, ...] | None = None
    """Where it makes a crosscoder's sources alike: each with its scale."""

    @classmethod
    def alike(
        cls, sources: tuple[SourcePart, ...], variance: Float64[Tensor, " d_in"]
    ) -> "Preconditioner":
        """Return the diagonal S that makes the sum of variances of all sources the same, trace(S S) = d_in.

        Sources that have a scale already, not all 1, keep it. Raises UserError for a source without variance, and for
        another width than theirs together.
        """
        widths = [source.width for source in sources]
        if sum(widths) != len(variance):
            raise UserError(
                f"crosscoder: sources of {sum(widths)} dimensions together, and the data have {len(variance)}"
            )
        if all(source.scale == 1 for source in sources):
            sums = [float(v.sum()) for v in variance.split(widths)]
            for source, total in zip(sources, sums, strict=True):
                if total == 0:
                    raise UserError(f"{source.name}: all its activations are the same vector")
            share = sum(s.width / v for s, v in zip(sources, sums, strict=True)) / len(variance)
            sources = tuple(
                source.model_copy(update={"scale": (total * share) ** -0.5})
                for source, total in zip(sources, sums, strict=True)
            )
        S = torch.cat([variance.new_full((s.width,), s.scale) for s in sources])
        return cls(S, 1 / S, {source.name: source.scale for source in sources}, sources=sources)

    @classmethod
    def of(
        cls,
        cfg: PreconditionConfig,
        covariance: Covariance,
        before: "Preconditioner | None" = None,
    ) -> "Preconditioner":
        """Return P = (shrunk C)^(-power / 2), scaled to trace(P P) = d_in, from the covariance of activations.

        With a map `before` C is that of what it makes of them; of kind residual `covariance` is that of what a pilot
        left of it.

        Raises UserError for too few rows (unless Ledoit and Wolf's estimate is used, which is made for them), and where
        C is singular and nothing is added to it.
        """
        d_in, n = covariance.d_in, covariance.n
        what = f"precondition {cfg.kind}"
        if n <= d_in and cfg.shrinkage != "ledoit-wolf":
            raise UserError(
                f"{what}: {n} rows cannot give the covariance of {d_in} dimensions; give at least {d_in + 1}, better "
                f"{10 * d_in}, or use shrinkage ledoit-wolf"
            )
        C = covariance.covariance
        if before is not None and not cfg.needs_pilot:
            C = before.covariance(C)
        mean = C.trace() / d_in
        if cfg.shrinkage == "ledoit-wolf":
            share = covariance.ledoit_wolf()
            C = (1 - share) * C + share * mean * torch.eye(d_in, dtype=C.dtype)
        else:
            share = cfg.shrinkage
            C = C + share * mean * torch.eye(d_in, dtype=C.dtype)
        whole = cfg.kind != "standardise"
        values, vectors = torch.linalg.eigh(C) if whole else (C.diagonal(), None)
        flat = int((values <= values.max() * d_in * torch.finfo(values.dtype).eps).sum())
        if flat:
            raise UserError(
                f"{what}: {flat} of {d_in} {'directions' if whole else 'dimensions'} have no variance, so there is no "
                "way back from the map; give a shrinkage above 0"
            )
        power = values.pow(-cfg.power / 2)
        power = power / power.square().mean().sqrt()
        record = {
            **cfg.to_dict(),
            "shrunk": float(share),
            "rows": n,
            "condition": float(power.max() / power.min()),
        }
        if vectors is None:
            return cls(power, 1 / power, record, before=before)
        P, inverse = ((vectors * values) @ vectors.T for values in (power, 1 / power))
        return cls(P, inverse, record, before=before)

    def rounded(self) -> "Preconditioner":
        """Return it with a P that bfloat16 holds, each entry moved by 2^-9 of it at most, to map in bfloat16 with.

        A diagonal stays as it is: nothing is gained there.
        """
        if self.map.ndim == 1:
            return self
        P = self.map.bfloat16().to(self.map)
        return replace(self, map=P, inverse=torch.linalg.inv(P), half=True)

    def to(self, like: Tensor) -> "Preconditioner":
        """Return it in the type and on the device of `like`, to map activations with."""
        P = self.map.to(like.device, torch.bfloat16 if self.half else like.dtype)
        before = None if self.before is None else self.before.to(like)
        return replace(self, map=P, inverse=self.inverse.to(like), before=before)

    def rows(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_in"]:
        """Return P x of rows."""
        x = x if self.before is None else self.before.rows(x)
        return weigh(x.to(self.map.dtype), self.map).to(x.dtype)

    def undo(self, y: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_in"]:
        """Return P^-1 y of rows."""
        x = weigh(y, self.inverse)
        return x if self.before is None else self.before.undo(x)

    def covariance(self, C: Float64[Tensor, "d_in d_in"]) -> Float64[Tensor, "d_in d_in"]:
        """Return the covariance of P x from that of x."""
        C = C if self.before is None else self.before.covariance(C)
        mapped = weigh(weigh(C, self.map).T, self.map)
        return (mapped + mapped.T) / 2

    def fold(self, sae: SAE) -> SAE:
        """Return the SAE of x with the latents of `sae`, which is one of P x; an SAE's gamma is Gamma P."""
        P = self.map.double().cpu()
        inverse = 1 / P if P.ndim == 1 else torch.linalg.inv(P)  # of P as it was rounded to train
        tensors = {name: tensor.double().cpu() for name, tensor in sae.tensors().items()}
        tensors["W_enc"] = weigh(tensors["W_enc"].T, P).T
        if "W_skip" in tensors:
            tensors["W_skip"] = weigh(tensors["W_skip"], P)
        for name in () if sae.cfg.transcoder else ("W_dec", "b_dec"):
            tensors[name] = weigh(tensors[name], inverse)
        if not sae.cfg.transcoder:
            tensors["gamma"] = combined(tensors["gamma"], P)
        scales = {} if self.sources is None else {"sources": self.sources}
        folded = SAE(sae.cfg.model_copy(update=scales))
        folded.set_tensors(tensors)
        return folded if self.before is None else self.before.fold(folded)

    def unfold(self, sae: SAE) -> SAE:
        """Return the SAE of P x with the latents of `sae`, which is one of x: the inverse of `fold`."""
        sae = sae if self.before is None else self.before.unfold(sae)
        P = self.map.double().cpu()
        inverse = 1 / P if P.ndim == 1 else torch.linalg.inv(P)
        return Preconditioner(inverse, P, self.record).fold(sae)


def combined(gamma: Weights, P: Weights) -> Weights:
    """Return Gamma P: a vector where both are."""
    if gamma.ndim == 1:
        return gamma * P if P.ndim == 1 else gamma[:, None] * P
    return weigh(gamma, P)
