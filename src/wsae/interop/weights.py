"""Other tools' weights as an SAE of ours: every shape and value checked before anything is allocated."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from wsae.core.errors import UserError
from wsae.sae.config import SAEConfig
from wsae.sae.model import SparseAutoencoder

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What weights may be stored as; integers and 8-bit floats are quantised, with scales that lie elsewhere."""
NEVER = -200.0
"""log_threshold of a latent with threshold 0: exp(-200) is 0 in float32, to the bit."""


class Foreign(NamedTuple):
    """The content of another tool's files."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    scale: float | None = None
    """What inputs are multiplied by before they are encoded, where a file beside the weights says it."""


class Named(NamedTuple):
    """Weights under our names and orientation; what an SAE lacks is None."""

    W_enc: Float[Tensor, "d_in d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]
    b_enc: Float[Tensor, " d_sae"]
    b_dec: Float[Tensor, " d_in"]
    threshold: Float[Tensor, "..."] | None = None

    @property
    def widths(self) -> dict[str, int]:
        """d_in and d_sae as the decoder has them."""
        return {"d_in": int(self.W_dec.shape[1]), "d_sae": int(self.W_dec.shape[0])}


def take(tensors: Mapping[str, Tensor], names: Iterable[str], where: str) -> list[Tensor]:
    """Return the tensors called `names` in float32; raises UserError when one is missing or one is left over."""
    names = list(names)
    missing = [name for name in names if name not in tensors]
    extra = sorted(set(tensors) - set(names))
    if missing:
        raise UserError(f"{where}: tensor {missing[0]} is missing (it has {_list(tensors)})")
    if extra:
        raise UserError(
            f"{where}: tensor {extra[0]} belongs to no SAE this reads (needed: {_list(names)})"
        )
    for name in names:
        if tensors[name].dtype not in FLOATS:
            kind = str(tensors[name].dtype).removeprefix("torch.")
            raise UserError(
                f"{where}: tensor {name} is {kind} (quantised?); float16, bfloat16, float32 and float64 are read"
            )
    return [tensors[name].detach().float() for name in names]


def check_shapes(weights: Named, where: str, d_in: object = None, d_sae: object = None) -> Named:
    """Return the weights; raises UserError where shapes do not fit one another or the widths of the config."""
    if weights.W_dec.ndim != 2:
        raise UserError(f"{where}: the decoder is {tuple(weights.W_dec.shape)}, not a matrix")
    m, d = weights.W_dec.shape
    if m != d and (weights.b_enc.shape, weights.b_dec.shape) == ((d,), (m,)):
        raise UserError(
            f"{where}: W_enc and W_dec look transposed: the decoder is {(m, d)}, the biases say {d} latents of "
            f"width {m}"
        )
    wanted = {"W_enc": (d, m), "b_enc": (m,), "b_dec": (d,)}
    for name, shape in wanted.items():
        found = tuple(getattr(weights, name).shape)
        if found != shape:
            raise UserError(
                f"{where}: {name} is {found} (as [d_in, d_sae]), the decoder's {m} latents of width {d} need {shape}"
            )
    if weights.threshold is not None and tuple(weights.threshold.shape) not in ((), (m,)):
        raise UserError(
            f"{where}: threshold is {tuple(weights.threshold.shape)}, {m} latents need ({m},)"
        )
    for key, said, is_ in (("d_in", d_in, d), ("d_sae", d_sae, m)):
        if said is not None and said != is_:
            raise UserError(f"{where}: the config says {key} = {said!r}, the weights have {is_}")
    if not m or not d:
        raise UserError(f"{where}: an SAE of {m} latents and width {d} has nothing in it")
    check_finite(weights._asdict(), where)
    return weights


def check_finite(tensors: Mapping[str, Tensor | None], where: str) -> None:
    """Raise UserError naming the first tensor with NaN or infinite values."""
    for name, tensor in tensors.items():
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{where}: tensor {name} holds NaN or infinite values")


def centred(weights: Named) -> Named:
    """Return weights that subtract b_dec before encoding, from ones that do not: b_enc + b_dec @ W_enc, in fp64."""
    shift = weights.b_dec.double() @ weights.W_enc.double()
    return weights._replace(b_enc=(weights.b_enc.double() + shift).float())


def uncentred(weights: Named) -> Named:
    """Return weights that do not subtract b_dec, from ones that do."""
    shift = weights.b_dec.double() @ weights.W_enc.double()
    return weights._replace(b_enc=(weights.b_enc.double() - shift).float())


def rescaled(weights: Named, scale: float) -> Named:
    """Return weights for x from ones for scale * x: the same latents, x_hat divided by the scale."""
    return weights._replace(
        W_enc=(weights.W_enc.double() * scale).float(),
        W_dec=(weights.W_dec.double() / scale).float(),
        b_dec=(weights.b_dec.double() / scale).float(),
    )


def unit_rows(weights: Named) -> Named:
    """Fold the decoder's norms into the encoder: latents are multiplied by them, reconstructions stay.

    Exact (to fp32 rounding) for every activation that is homogeneous with its threshold. A latent whose row is 0 never
    speaks.
    """
    norms = weights.W_dec.double().norm(dim=1)
    scale = weights.threshold if weights.threshold is None else (weights.threshold * norms).float()
    return Named(
        W_enc=(weights.W_enc.double() * norms).float(),
        W_dec=(weights.W_dec.double() / norms.clamp(min=1e-30)[:, None]).float(),
        b_enc=(weights.b_enc.double() * norms).float(),
        b_dec=weights.b_dec,
        threshold=scale,
    )


def assemble(
    cfg: SAEConfig, weights: Named, extra: Mapping[str, Tensor] | None = None
) -> SparseAutoencoder:
    """Return an SAE of ours with these weights, gamma 1 and threshold 0 unless `extra` says otherwise."""
    sae = SparseAutoencoder(cfg)
    tensors = {name: getattr(weights, name) for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    start = {name: tensor for name, tensor in sae.tensors().items() if name not in tensors}
    sae.set_tensors({**start, **tensors, **(extra or {})})
    return sae


def named(sae: SparseAutoencoder) -> Named:
    """Return an SAE's weights in float32 on the CPU, a tied one's as if it were not: zero biases, W_enc = W_dec^T."""
    W_dec, W_enc = sae.W_dec.detach().float().cpu(), sae.W_enc.detach().float().cpu()
    return Named(
        W_enc=W_enc.clone() if sae.cfg.tied else W_enc,  # two tensors of a file share no memory
        W_dec=W_dec,
        b_enc=_or_zeros(sae.b_enc, sae.cfg.d_sae),
        b_dec=_or_zeros(sae.b_dec, sae.cfg.d_in),
        threshold=thresholds(sae),
    )


def thresholds(sae: SparseAutoencoder) -> Tensor | None:
    """Return the threshold [d_sae] (JumpReLU) or [] (batch Top-k) that encoding compares with, in float32."""
    if sae.log_threshold is not None:
        return sae.log_threshold.detach().exp().float().cpu()
    kind = sae.cfg.activation.kind
    return sae.threshold.detach().float().cpu() if kind == "batch_topk" else None


def log_threshold(threshold: Float[Tensor, " d_sae"]) -> Float[Tensor, " d_sae"]:
    """Return the logarithm a JumpReLU of ours stores; thresholds of 0 and below, which a ReLU cannot tell, become 0."""
    positive = threshold > 0
    logs = threshold.double().clamp(min=1e-300).log().float()
    return torch.where(positive, logs, torch.full_like(logs, NEVER))


def _or_zeros(bias: Tensor | None, width: int) -> Tensor:
    return torch.zeros(width, dtype=torch.float32) if bias is None else bias.detach().float().cpu()


def _list(names: Iterable[str]) -> str:
    found = sorted(names)
    return ", ".join(found[:8]) + (", ..." if len(found) > 8 else "")
