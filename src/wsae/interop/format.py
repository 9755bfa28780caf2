"""What a format is: one value with how to know it, read it, understand it and write it; and how configs are read.

Every key of another tool's config is used, known to change nothing, or refused by name (`check_keys`).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from wsae.core.errors import UserError, nearest
from wsae.core.files import read_json, write_json
from wsae.core.tensors import save_tensors
from wsae.core.torchfile import save_state
from wsae.interop.config import FormatName, SourceName
from wsae.interop.releases import hub_model
from wsae.sae.architectures import gated_as_jumprelu
from wsae.sae.config import Provenance, SAEConfig, SourcePart
from wsae.sae.model import SAE

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What weights may be stored as; integers and 8-bit floats are quantised, with scales that lie elsewhere."""


class NoEqual(UserError):
    """An SAE of a form that another tool has not."""


class Foreign(NamedTuple):
    """The content of another tool's files."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    scale: float | None = None
    """What inputs are multiplied by before they are encoded, where a file beside the weights says it."""


class NamedTensors(NamedTuple):
    """Weights under our names and orientation; what an SAE lacks is None."""

    W_enc: Float[Tensor, "d_in d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]
    b_enc: Float[Tensor, " d_sae"]
    b_dec: Float[Tensor, " d_out"]
    threshold: Float[Tensor, "..."] | None = None
    W_skip: Float[Tensor, "d_out d_in"] | None = None

    def widths(self, transcoder: bool) -> dict[str, int | bool | None]:
        """Return the fields of SAEConfig that shapes say."""
        d_sae, d_out = (int(n) for n in self.W_dec.shape)
        known = {"d_in": int(self.W_enc.shape[0]), "d_sae": d_sae}
        skip = None if self.W_skip is None else True
        return {**known, "d_out": d_out if transcoder else None, "skip": skip}


class Meaning(NamedTuple):
    """Weights as our forward pass takes them, and the activation's config."""

    weights: NamedTensors
    activation: dict[str, Any]
    transcoder: bool = False
    """Whether it gives other activations than it reads, from which b_dec is then not subtracted."""
    input_norm: str | None = None
    """How rows are normalised one by one, in SAELens' words."""
    sources: tuple[SourcePart, ...] | None = None
    """Of a crosscoder."""


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


def gated(
    weights: NamedTensors, gate: Float[Tensor, " d_sae"], stretch: Float[Tensor, " d_sae"]
) -> NamedTensors:
    """Return the JumpReLU that a gated SAE is: weights with b_enc as its magnitude bias, its gate bias and r_mag."""
    named = {"W_enc": weights.W_enc, "b_enc": gate, "r_mag": stretch, "b_mag": weights.b_enc}
    return weights._replace(**gated_as_jumprelu(named))


def check_shapes(
    weights: NamedTensors,
    where: str,
    d_in: object = None,
    d_sae: object = None,
    transcoder: bool = False,
) -> NamedTensors:
    """Return the weights; raises UserError where shapes do not fit one another or the widths of the config."""
    if weights.W_dec.ndim != 2:
        raise UserError(f"{where}: the decoder is {tuple(weights.W_dec.shape)}, not a matrix")
    m, d = weights.W_dec.shape
    read = weights.W_enc.shape[0] if transcoder and weights.W_enc.ndim == 2 else d
    if m != d and (weights.b_enc.shape, weights.b_dec.shape) == ((d,), (m,)):
        raise UserError(
            f"{where}: W_enc and W_dec look transposed: the decoder is {(m, d)}, the biases say {d} latents of "
            f"width {m}"
        )
    wanted = {"W_enc": (read, m), "b_enc": (m,), "b_dec": (d,)}
    wanted |= {} if weights.W_skip is None else {"W_skip": (d, read)}
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
    for key, said, is_ in (("d_in", d_in, read), ("d_sae", d_sae, m)):
        if said is not None and said != is_:
            raise UserError(f"{where}: the config says {key} = {said!r}, the weights have {is_}")
    if not m or not d:
        raise UserError(f"{where}: an SAE of {m} latents and width {d} has nothing in it")
    check_finite(weights._asdict(), where)
    return weights


def check_finite(tensors: Mapping[str, object], where: str) -> None:
    """Raise UserError naming the first tensor with NaN or infinite values."""
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{where}: tensor {name} holds NaN or infinite values")


def centred(weights: NamedTensors) -> NamedTensors:
    """Return weights that subtract b_dec before encoding, from ones that do not: b_enc + b_dec @ W_enc, in fp64."""
    shift = weights.b_dec.double() @ weights.W_enc.double()
    return weights._replace(b_enc=(weights.b_enc.double() + shift).float())


def uncentred(weights: NamedTensors) -> NamedTensors:
    """Return weights that do not subtract b_dec, from ones that do."""
    shift = weights.b_dec.double() @ weights.W_enc.double()
    return weights._replace(b_enc=(weights.b_enc.double() - shift).float())


def rescaled(weights: NamedTensors, scale: float) -> NamedTensors:
    """Return weights for x from ones for scale * x: the same latents, x_hat divided by the scale."""
    return weights._replace(
        W_enc=(weights.W_enc.double() * scale).float(),
        W_dec=(weights.W_dec.double() / scale).float(),
        b_dec=(weights.b_dec.double() / scale).float(),
    )


def unit_rows(weights: NamedTensors) -> NamedTensors:
    """Fold the decoder's norms into the encoder: latents are multiplied by them, reconstructions stay.

    Exact (to fp32 rounding) for every activation that is homogeneous with its threshold. A latent whose row is 0 never
    speaks.
    """
    norms = weights.W_dec.double().norm(dim=1)
    scale = weights.threshold if weights.threshold is None else (weights.threshold * norms).float()
    return weights._replace(
        W_enc=(weights.W_enc.double() * norms).float(),
        W_dec=(weights.W_dec.double() / norms.clamp(min=1e-30)[:, None]).float(),
        b_enc=(weights.b_enc.double() * norms).float(),
        threshold=scale,
    )


def assemble(cfg: SAEConfig, weights: NamedTensors) -> SAE:
    """Return an SAE of ours with these weights, its thresholds where its kind has any, and gamma 1."""
    sae = SAE(cfg)
    tensors = {name: getattr(weights, name) for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    if weights.W_skip is not None:
        tensors["W_skip"] = weights.W_skip
    if weights.threshold is not None:  # 0 and below a ReLU cannot tell
        tensors["threshold"] = weights.threshold.clamp(min=0)
    sae.set_tensors({**sae.tensors(), **tensors})
    return sae


def as_known(sae: SAE) -> SAE:
    """Return the SAE as other tools know it (`SAE.plain`), in float32: a gate folded in half precision is another."""
    if sae.dtype == torch.float32:
        return sae.plain()
    wide = SAE(sae.cfg)
    wide.set_tensors(sae.tensors())
    return wide.plain()


def named(sae: SAE, by_row: bool = False, by_source: bool = False) -> NamedTensors:
    """Return an SAE's weights in float32 on the CPU, a tied one's as if it were not: zero biases, W_enc = W_dec^T.

    Raises NoEqual for a crosscoder, and for an SAE that normalises its rows, unless its tool has such (`by_source`,
    `by_row`).
    """
    if sae.cfg.sources is not None and not by_source:
        raise NoEqual("a crosscoder has no equal there")
    if sae.cfg.input_norm is not None and not by_row:
        raise NoEqual(f"an SAE that normalises its rows ({sae.cfg.input_norm}) has no equal there")
    W_dec, W_enc = sae.W_dec.detach().float().cpu(), sae.W_enc.detach().float().cpu()
    b_enc, b_dec = (
        torch.zeros(width, dtype=torch.float32) if bias is None else bias.detach().float().cpu()
        for width, bias in zip(W_dec.shape, (sae.b_enc, sae.b_dec), strict=True)
    )
    return NamedTensors(
        W_enc=W_enc.clone() if sae.cfg.tied else W_enc,  # two tensors of a file share no memory
        W_dec=W_dec,
        b_enc=b_enc,
        b_dec=b_dec,
        threshold=thresholds(sae),
        W_skip=None if sae.W_skip is None else sae.W_skip.detach().float().cpu(),
    )


def thresholds(sae: SAE) -> Tensor | None:
    """Return the threshold [d_sae] (JumpReLU) or [] (batch Top-k) that encoding compares with, in float32."""
    kind = sae.cfg.activation.kind
    return sae.threshold.detach().float().cpu() if kind in ("jumprelu", "batch_topk") else None


def _list(names: Iterable[str]) -> str:
    found = sorted(names)
    return ", ".join(found[:8]) + (", ..." if len(found) > 8 else "")


THROUGH_SAELENS = (
    "open it in SAELens 6 (SAE.from_pretrained), save it (save_model) and import that folder"
)
"""How to bring what SAELens reads and wsae does not."""
MAX_JSON = 16 * 2**20
"""Bytes a config file may have."""


@dataclass(frozen=True)
class Reader:
    """One kind of folder (or file) that holds one SAE.

    `rename` changes names and orientation only; `understand` gives the activation and folds what our forward pass has
    no switch for. Every function raises UserError in one line for what has no equal here.
    """

    name: SourceName
    files: tuple[str, ...]
    """The config's name first, then those of the weights, of which one is enough."""
    read: Callable[[Path], Foreign]
    rename: Callable[[Foreign, str], NamedTensors]
    understand: Callable[[Foreign, NamedTensors, str], Meaning]
    about: Callable[[Foreign], Provenance]

    def detect(self, path: Path) -> bool:
        """Return whether a folder holds this format's weights."""
        return any((path / name).is_file() for name in self.files[1:])

    def sae(self, foreign: Foreign, where: str) -> SAE:
        """Return the SAE that files are of."""
        found = self.understand(foreign, self.rename(foreign, where), where)
        data = {
            **found.weights.widths(found.transcoder),
            "activation": found.activation,
            "input_norm": found.input_norm,
            "sources": found.sources,
        }
        return assemble(SAEConfig.parse(data, where=where), found.weights)


@dataclass(frozen=True)
class Format(Reader):
    """One library's folder of one SAE, which can be written too: `pack` refuses what has no equal there."""

    name: FormatName
    pack: Callable[[SAE, Provenance], Foreign]
    opens: str
    """The Python with which its own tool opens `{path!r}`."""

    def write(self, foreign: Foreign, path: Path) -> list[str]:
        """Write the library's files; return their names."""
        config, weights = self.files
        (save_state if weights.endswith(".pt") else save_tensors)(path / weights, foreign.tensors)
        write_json(path / config, foreign.config)
        return [config, weights]


class Switch(NamedTuple):
    """A key of a config that changes what an SAE computes: the values that do not, and what the others mean."""

    off: tuple[object, ...]
    otherwise: str


class Keys(NamedTuple):
    """What is known about the keys of one tool's config; `harmless` ones describe training, data or bookkeeping."""

    used: frozenset[str]
    harmless: frozenset[str]
    switches: dict[str, Switch]


_OFF = (None, False, 0, "", "none", [], {})


def check_keys(config: dict[str, Any], keys: Keys, where: str) -> tuple[str, ...]:
    """Return notes on unknown keys that are off; raises UserError naming a key that may change the SAE's function."""
    unknown = []
    for key, value in config.items():
        switch = keys.switches.get(key)
        if switch is not None and value not in switch.off:
            raise UserError(f"{where}: {key} = {_brief(value)}: {switch.otherwise}")
        if switch is not None or key in keys.used or key in keys.harmless:
            continue
        if value not in _OFF:
            known = [*keys.used, *keys.switches]
            raise UserError(
                f"{where}: {key} = {_brief(value)} is a key that wsae does not know{nearest(key, known)}, and it may "
                "change what the SAE computes; if it does not, take it out of a copy of the config and import that"
            )
        unknown.append(f"{key} = {_brief(value)}")
    return (f"unknown keys that are off: {', '.join(unknown)}",) if unknown else ()


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_config(path: Path) -> dict[str, Any]:
    """Return a JSON object; raises UserError when the file is missing, too large, damaged or something else."""
    if path.is_file() and path.stat().st_size > MAX_JSON:
        raise UserError(f"{path}: {path.stat().st_size:,} bytes are no SAE's config")
    if not path.exists():
        raise UserError(
            f"{path}: no such file, and weights alone do not say what the SAE computes; if SAELens reads this release, "
            f"{THROUGH_SAELENS}"
        )
    data = read_json(path)
    if not isinstance(data, dict):
        raise UserError(f"{path}: a config is a JSON object, this is a {type(data).__name__}")
    return data


def whole(config: dict[str, Any], key: str, where: str) -> int:
    """Return a positive whole number of a config; raises UserError naming key and value."""
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{where}: {key} = {value!r} is not a positive whole number")
    return value


def positive(value: object, name: str, where: object) -> float:
    """Return a finite number above 0; raises UserError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        raise UserError(f"{where}: {name} = {value!r} is not a positive number")
    return float(value)


def truth(config: dict[str, Any], key: str, default: bool, where: str) -> bool:
    """Return a truth value of a config, `default` where it is not there; raises UserError for anything else."""
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise UserError(f"{where}: {key} = {_brief(value)} is not true or false")
    return value


def plain(data: dict[str, Any]) -> dict[str, Any]:
    """Return the entries that are None, words, numbers or truth values (what may be kept of a stranger's config)."""
    return {k: v for k, v in data.items() if v is None or isinstance(v, str | int | float)}


_TYPES = {
    "model": str,
    "hook": str,
    "hook_out": str,
    "context": int,
    "prepend_bos": bool,
    "dataset": str,
    "tokens": int,
}


def provenance(
    format: SourceName, data: dict[str, Any], keys: Mapping[str, str], notes: Iterable[str] = ()
) -> Provenance:
    """Return what a config says under another tool's names: `keys` are ours -> theirs."""
    known = {name: maybe(data, key, _TYPES[name]) for name, key in keys.items()}
    if known.get("model"):
        known["model"] = hub_model(known["model"])
    return Provenance(**known, notes=tuple(notes), origin={"format": format, **plain(data)})


def maybe(data: dict[str, Any], key: str, kind: type[Any]) -> Any:
    """Return an entry of that type, or None."""
    value = data.get(key)
    return value if isinstance(value, kind) and not (kind is int and value is True) else None
