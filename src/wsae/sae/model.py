"""The sparse autoencoder (paper Eq. 2 and 3, with the biases of Gao et al. 2025 when untied).

    pre   = (x - b_dec) @ W_enc + b_enc          z = activation(pre)          x_hat = z @ W_dec + b_dec

Tied: W_dec = W_enc^T and no biases. With `input_norm` x is normalised row by row before, and x_hat brought back after.
What z is the kind says (`wsae.sae.architectures`). A transcoder predicts the output y of a module from its input x:

    pre   = x @ W_enc + b_enc          z = activation(pre)          y_hat = z @ W_dec + b_dec + x @ W_skip^T

(Dunefsky et al. 2024; W_skip as in Paulo et al. 2025, absent without `skip`). The training pass lives in
`wsae.sae.forward`.
"""

import contextlib
import importlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from wsae.core.artifact import CONFIG, MANIFEST, PROVENANCE, read_manifest, write_manifest
from wsae.core.calls import check_tensor, own_settings, tensor
from wsae.core.errors import UserError
from wsae.core.files import read_json, write_json
from wsae.core.hub import local_folder
from wsae.core.seeds import seed_for
from wsae.core.tensors import load_tensors, save_tensors
from wsae.kernels.eager import (
    SparseCode,
    code_from_dense,
    code_from_topk,
    select_group_topk,
    select_topk,
)
from wsae.kernels.native.build import has_int8, why_not
from wsae.kernels.native.select import (
    LARGEST_SHARE,
    RoundedEncoder,
    dimension_scales,
    select_above,
)
from wsae.kernels.native.select import select_topk as compiled_topk
from wsae.kernels.native.slices import Centred, to_slices
from wsae.sae.architectures import (
    Above,
    Architecture,
    Choice,
    Every,
    PerGroup,
    PerRow,
    architecture_of,
)
from wsae.sae.config import JumpReLU, Provenance, ReLU, SAEConfig, SourcePart

WEIGHTS = "sae.safetensors"
LAYER_EPS = 1e-5


def fixed(choice: PerRow | PerGroup, pre: Float[Tensor, "*rows d_sae"]) -> Int64[Tensor, "*rows k"]:
    """Return the latents of each row that a choice with the same number in every row makes active."""
    chosen = select_topk if isinstance(choice, PerRow) else select_group_topk
    return chosen(pre, choice.k)


class Normalised(NamedTuple):
    """Rows as they are encoded, and what brings them back."""

    rows: Float[Tensor, "batch d_in"]
    factor: Float[Tensor, " batch"]
    shift: Float[Tensor, " batch"]
    """x = factor rows + shift, of layer_norm but for `LAYER_EPS`."""


class SAE(nn.Module):
    """One SAE: `encode` gives latents [..., d_sae] of [..., d_in], `decode` gives x_hat [..., d_out], d_out = d_in.

    Parameters: `W_enc_t` [d_sae, d_in] (the encoder, one row a latent; absent when tied), `W_dec` [d_sae, d_out],
    `b_enc` [d_sae], `b_dec` [d_out], `W_skip` [d_out, d_in] (skip transcoders), and those of its kind, [d_sae] each:
    `threshold` (JumpReLU), `r_mag` and `b_mag` (gated). Buffers: `threshold` (one number, of batch Top-k) where it is
    no parameter, and `gamma` [d_out] (a matrix [d_out, d_out] for the rule whiten), the loss weights of training: they
    act on the loss only, nothing is folded at inference. Of a transcoder d_out is a width of its own, and x_hat stands
    for the activations that it predicts.
    """

    gamma: Tensor
    threshold: Tensor

    @own_settings
    def __init__(self, cfg: SAEConfig, seed: int = 0, encoder_scale: float = 1.0) -> None:
        """Start with random unit decoder rows and (untied) the encoder `encoder_scale` times their transpose."""
        super().__init__()
        self.cfg = cfg
        generator = torch.Generator().manual_seed(seed_for(seed, "sae-init"))
        drawn = torch.randn(cfg.d_sae, cfg.width_out, generator=generator, dtype=torch.float32)
        self.W_dec, width = nn.Parameter(F.normalize(drawn, dim=1)), cfg.width_out
        rows = self.W_dec.detach()
        if cfg.transcoder:
            # another space; uniform as torch.nn.Linear, so that no latent begins with an outlier dimension alone
            generator.manual_seed(seed_for(seed, "transcoder-init"))
            rows = torch.rand(cfg.d_sae, cfg.d_in, generator=generator, dtype=torch.float32)
            rows = (2 * rows - 1) * math.sqrt(3 / cfg.d_in)
        self.W_enc_t = None if cfg.tied else nn.Parameter(rows * encoder_scale)
        self.b_enc = None if cfg.tied else nn.Parameter(torch.zeros(cfg.d_sae, dtype=torch.float32))
        self.b_dec = None if cfg.tied else nn.Parameter(torch.zeros(width, dtype=torch.float32))
        for name, parameter in self.arch.parameters.items():
            start = parameter.start(cfg.activation)
            own = torch.full((cfg.d_sae,), start, dtype=torch.float32)
            self.register_parameter(name, nn.Parameter(own))
        skip = torch.zeros(width, cfg.d_in, dtype=torch.float32) if cfg.skip else None
        self.W_skip = None if skip is None else nn.Parameter(skip)
        if "threshold" not in self.arch.parameters:
            self.register_buffer("threshold", torch.zeros((), dtype=torch.float64))
        self.register_buffer("gamma", torch.ones(width, dtype=torch.float32))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SAE":
        """Cast or move every tensor; thresholds keep at least float32, where steps of a learning rate still count."""
        kept = self.threshold.detach()
        super()._apply(fn, recurse)
        if self.threshold.dtype.itemsize < torch.float32.itemsize:
            self.threshold.data = kept.to(self.threshold.device)
        return self

    def extra_repr(self) -> str:
        """Return what `repr` says of it."""
        activation = self.cfg.activation
        k = getattr(activation, "k", None)
        out = f", d_out={self.cfg.width_out}" if self.cfg.transcoder else ""
        said = f"{activation.kind}, d_in={self.cfg.d_in}{out}, d_sae={self.cfg.d_sae}"
        return said if k is None else f"{said}, k={k}"

    @property
    def arch(self) -> Architecture:
        """What its kind computes: looked up, so that an SAE can be pickled."""
        return architecture_of(self.cfg.activation)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights: inputs of any other are computed in this one."""
        return self.W_dec.dtype

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:
        """Encoder weights [d_in, d_sae] (a view)."""
        return self.encoder_rows.T

    @property
    def unweighted(self) -> bool:
        """Whether gamma weighs nothing: it is 1, or for each source of a crosscoder that source's scale."""
        return self.gamma.ndim == 1 and torch.equal(self.gamma, self.scales.to(self.gamma))

    @property
    def scales(self) -> Float[Tensor, " d_out"]:
        """What a crosscoder's sources are multiplied by to vary alike (`SourcePart`), for each dimension; else 1."""
        sources = self.cfg.sources or (SourcePart(name="", width=self.cfg.width_out),)
        return torch.cat([self.W_dec.new_full((s.width,), s.scale) for s in sources])

    @property
    def directions(self) -> Float[Tensor, "d_sae d_out"]:
        """The decoder's rows as they are compared: those of a crosscoder with its sources at their scales."""
        return self.W_dec if self.cfg.sources is None else self.W_dec * self.scales

    @property
    def encoder_rows(self) -> Float[Tensor, "d_sae d_in"]:
        """The encoder with one row per latent: W_dec itself when tied."""
        return self.W_dec if self.W_enc_t is None else self.W_enc_t

    @property
    def own(self) -> dict[str, Tensor]:
        """The parameters that its kind's functions look at."""
        names = [*self.arch.parameters, "threshold", *(["b_enc"] if self.arch.reads_bias else [])]
        return {name: getattr(self, name) for name in names}

    @property
    def choice(self) -> Choice:
        """Which latents of a batch may be active in training; UserError for an SAE that cannot be trained here."""
        if self.cfg.input_norm is not None:
            raise UserError(
                f"an SAE whose rows are normalised ({self.cfg.input_norm}) is not trained here"
            )
        return self.arch.choose(self.cfg.activation, self.own)

    @property
    def biases(self) -> tuple[Tensor, Tensor] | None:
        """(b_enc, b_dec), or None when tied."""
        return None if self.b_enc is None or self.b_dec is None else (self.b_enc, self.b_dec)

    @property
    def b_in(self) -> Tensor | None:
        """What is subtracted from inputs: b_dec, and nothing of a tied SAE or a transcoder."""
        return None if self.cfg.transcoder else self.b_dec

    def centre(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
        """Return x - b_dec, or of a transcoder x."""
        return x if self.b_in is None else x - self.b_in

    def pre(self, centred: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
        """Return the pre-activations of centred inputs."""
        if self.b_enc is None:
            return centred @ self.W_enc
        return torch.addmm(self.b_enc, centred, self.W_enc)

    def normalised(self, x: Float[Tensor, "batch d_in"]) -> "Normalised":
        """Return rows as they are encoded, and what brings them back, by `input_norm` as SAELens has it.

        layer_norm: (x - mean) / (std + 1e-5), std of d_in - 1; constant_norm_rescale: sqrt(d_in) x / |x|. A row of
        zeros stays.
        """
        ones, zeros = x.new_ones(len(x)), x.new_zeros(len(x))
        match self.cfg.input_norm:
            case "layer_norm":
                mean = x.mean(1)
                x = x - mean[:, None]
                std = (x.square().sum(1) / (self.cfg.d_in - 1)).sqrt()
                return Normalised(x / (std + LAYER_EPS)[:, None], std, mean)
            case "constant_norm_rescale":
                size = x.norm(dim=1) / self.cfg.d_in**0.5
                tiny = torch.finfo(x.dtype).tiny
                return Normalised(x / size.clamp_min(tiny)[:, None], size, zeros)
            case _:
                return Normalised(x, ones, zeros)

    def encode(self, x: object) -> Float[Tensor, "*batch d_sae"]:
        """Return the latents z, dense, of activations [..., d_in]: a tensor, an array or lists, of any real type.

        They are computed, and returned, in the SAE's own type and on its device, under autocast too. A crosscoder takes
        {source: activations} as well. Raises UserError for another width, or a tensor on another device.
        """
        rows, lead = self._rows(x, self.cfg.d_in)
        with self._own_type():
            rows = self.normalised(rows).rows
            pre, choice = self.pre(self.centre(rows)), self._used()
            fits = isinstance(choice, PerRow | PerGroup)
            z = self._code(pre).dense(self.cfg.d_sae) if fits else self._dense(pre, choice)
        return z.reshape(*lead, self.cfg.d_sae)

    def encode_sparse(
        self, x: object
    ) -> tuple[Float[Tensor, "*batch k"], Int64[Tensor, "*batch k"]]:
        """Return (values, indices), each [..., k]; kinds without a fixed k are padded with value 0, index 0."""
        rows, lead = self._rows(x, self.cfg.d_in)
        values, indices = self.encode_code(rows).padded()
        width = values.shape[1] if len(rows) else getattr(self._used(), "k", 0)
        return values.reshape(*lead, width), indices.reshape(*lead, width)

    def encode_code(self, x: object) -> SparseCode:
        """Return the latents in row-compressed form, leading axes as one; Top-k kinds give k entries per row."""
        rows, _ = self._rows(x, self.cfg.d_in)
        with self._own_type():
            return self._code(self.pre(self.centre(self.normalised(rows).rows)))

    def decode(self, z: object, x: object = None) -> Float[Tensor, "*batch d_out"]:
        """Return x_hat = z @ W_dec + b_dec of latents [..., d_sae], given as `encode` takes activations.

        A skip transcoder, and an SAE with `input_norm`, want the x that z is of too; raises UserError without it.
        """
        rows, lead = self._rows(z, self.cfg.d_sae)
        wanted = self.W_skip is not None or self.cfg.input_norm is not None
        given = self._rows(x, self.cfg.d_in)[0] if wanted and x is not None else None
        with self._own_type():
            x_hat = self.completed(rows @ self.W_dec, given)
        return x_hat.reshape(*lead, self.cfg.width_out)

    def completed(
        self, x_hat: Float[Tensor, "batch d_out"], x: Float[Tensor, "batch d_in"] | None
    ) -> Float[Tensor, "batch d_out"]:
        """Return what the latents give, with b_dec and x @ W_skip^T, at the scale of x where that was taken away.

        Raises UserError where x is wanted and none.
        """
        x_hat = x_hat if self.b_dec is None else x_hat + self.b_dec
        if self.W_skip is None and self.cfg.input_norm is None:
            return x_hat
        if x is None:
            what = (
                f"an SAE of {self.cfg.input_norm}" if self.W_skip is None else "a skip transcoder"
            )
            raise UserError(f"decode: {what} needs its input too; decode(z, x)")
        if self.W_skip is None:
            found = self.normalised(x)
            return x_hat * found.factor[:, None] + found.shift[:, None]
        return torch.addmm(x_hat, x, self.W_skip.T)

    def decode_code(
        self, code: SparseCode, x: Float[Tensor, "batch d_in"] | None = None
    ) -> Float[Tensor, "batch d_out"]:
        """Return x_hat of a sparse code; x as in `decode`."""
        with self._own_type():
            x_hat = F.embedding_bag(
                code.indices,
                self.W_dec,
                code.offsets[:-1],
                mode="sum",
                per_sample_weights=code.values,
            )
            return self.completed(x_hat, None if x is None else x.to(self.dtype))

    def forward(self, x: object) -> Float[Tensor, "*batch d_out"]:
        """Return the reconstruction x_hat of activations [..., d_in], given as `encode` takes them."""
        rows, lead = self._rows(x, self.cfg.d_in)
        return self.decode_code(self.encode_code(rows), rows).reshape(*lead, self.cfg.width_out)

    def split(self, x: Float[Tensor, "*batch d_in"]) -> dict[str, Float[Tensor, "*batch _"]]:
        """Return what a crosscoder takes or gives by source (views).

        Raises UserError for an SAE of one hook, and another width.
        """
        widths = [source.width for source in self._sources]
        names = [source.name for source in self._sources]
        if x.shape[-1:] != (self.cfg.d_in,):
            raise UserError(
                f"input of shape {tuple(x.shape)} where this crosscoder has [..., {self.cfg.d_in}]"
            )
        return dict(zip(names, x.split(widths, -1), strict=True))

    def source_norms(self) -> Float[Tensor, "sources d_sae"]:
        """Return the norm of each decoder row in each source of a crosscoder: scale_s ||W_dec[j, dims of s]||.

        With the scales all sources vary alike (`SourcePart`). Raises UserError for an SAE of one hook.
        """
        rows = self.split(self.W_dec.detach().double()).values()
        scales = [source.scale for source in self._sources]
        return torch.stack([c * part.norm(dim=1) for c, part in zip(scales, rows, strict=True)])

    def relative_norms(self) -> Float[Tensor, "sources d_sae"]:
        """Return r_sj = n_sj / sum_t n_tj of `source_norms` n: 1 where latent j is of source s alone (Lindsey 2024)."""
        norms = self.source_norms()
        return norms / norms.sum(0).clamp_min(torch.finfo(norms.dtype).tiny)

    @property
    def _sources(self) -> tuple[SourcePart, ...]:
        if self.cfg.sources is None:
            raise UserError("this SAE is of one hook; sources are a crosscoder's")
        return self.cfg.sources

    def join(self, parts: Mapping[str, object]) -> Tensor:
        """Return activations by source side by side, in their order; raises UserError for other sources or shapes."""
        names = [source.name for source in self._sources]
        if sorted(parts) != sorted(names):
            raise UserError(
                f"input: has {', '.join(map(str, parts))}; this crosscoder reads {', '.join(names)}"
            )
        given = [parts[name] for name in names]
        found = [x if isinstance(x, Tensor) else tensor(x, "input") for x in given]
        for source, x in zip(self._sources, found, strict=True):
            if x.shape[:-1] != found[0].shape[:-1] or x.shape[-1:] != (source.width,):
                raise UserError(
                    f"input: {source.name} of shape {tuple(x.shape)} where this crosscoder needs "
                    f"[{', '.join(map(str, (*found[0].shape[:-1], source.width)))}]"
                )
        return torch.cat([x.to(self.W_dec) for x in found], -1)

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor under its public name; W_enc is [d_in, d_sae]."""
        tensors = dict(self.state_dict())
        rows = tensors.pop("W_enc_t", None)
        return tensors if rows is None else {**tensors, "W_enc": rows.T}

    def set_tensors(self, tensors: dict[str, Tensor], where: str = "tensors") -> None:
        """Take tensors named as by `tensors()`; raises UserError on a wrong name, shape or value."""
        state = dict(tensors)
        if "log_threshold" in state:  # of earlier versions
            state["threshold"] = state.pop("log_threshold").exp()
        if "W_enc" in state:
            state["W_enc_t"] = state.pop("W_enc").T
        expected = self.state_dict()
        for name in sorted(expected.keys() | state.keys()):
            if name not in state or name not in expected:
                problem = "is missing" if name not in state else "does not belong here"
                raise UserError(f"{where}: tensor {name} {problem} for this config.json")
            if state[name].shape != expected[name].shape and not self._is_gamma(name, state[name]):
                found, needed = tuple(state[name].shape), tuple(expected[name].shape)
                raise UserError(f"{where}: tensor {name} is {found}, config.json says {needed}")
            if not bool(torch.isfinite(state[name]).all()):
                raise UserError(f"{where}: tensor {name} holds NaN or infinite values")
        self.load_state_dict(state)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Take gamma in either of its forms."""
        gamma = state_dict.get(f"{prefix}gamma", self.gamma)
        if gamma.shape != self.gamma.shape and self._is_gamma("gamma", gamma):
            self.gamma = self.gamma.new_empty(gamma.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def set_gamma(self, gamma: Float[Tensor, "..."]) -> None:
        """Take loss weights [d_out] or [d_out, d_out]; raises UserError for another shape."""
        if gamma.shape != self.gamma.shape and not self._is_gamma("gamma", gamma):
            width = self.cfg.width_out
            raise UserError(
                f"gamma of shape {tuple(gamma.shape)}: this SAE takes [{width}] or [{width}, {width}]"
            )
        self.gamma = gamma.to(self.gamma, copy=True)

    def _is_gamma(self, name: str, tensor: Tensor) -> bool:
        """Return whether a tensor is gamma in one of its two forms."""
        width = self.cfg.width_out
        return name == "gamma" and tuple(tensor.shape) in ((width,), (width, width))

    def save(self, path: Path | str, about: Provenance | None = None) -> None:
        """Write the SAE to a directory: what is known `about` it, sae.safetensors, config.json, manifest.json last.

        Another SAE there gives way; raises UserError where something else would: a run, a store or a model.
        """
        path, beside = Path(path), []
        for name in (CONFIG, MANIFEST):
            if (path / name).is_file() and not (path / WEIGHTS).is_file():
                raise UserError(f"{path}: its {name} is of no SAE; save to a folder of its own")
        if about is not None:
            write_json(path / PROVENANCE, about.to_dict())
            beside.append(PROVENANCE)
        save_tensors(path / WEIGHTS, self.tensors())
        write_json(path / CONFIG, self.cfg.to_dict())
        write_manifest(path, "sae", self.cfg.to_dict(), [WEIGHTS, CONFIG, *beside])

    @classmethod
    @own_settings
    def load(cls, path: Path | str) -> "SAE":
        """Read an SAE from a directory or `hub:owner/name`, in float32 whatever type it was saved in.

        Raises UserError when it is missing, cut or altered.
        """
        path = _native(local_folder(path))
        manifest = read_manifest(path, "sae")
        for name in (WEIGHTS, CONFIG):
            if name not in manifest.files:
                raise UserError(f"{path}: its manifest does not list {name}; save the SAE again")
        cfg, tensors = SAEConfig.load(path / CONFIG), load_tensors(path / WEIGHTS)
        decoder = tensors.get("W_dec")
        if decoder is not None and tuple(decoder.shape) != (
            cfg.d_sae,
            cfg.width_out,
        ):  # before anything is allocated
            needed = (cfg.d_sae, cfg.width_out)
            raise UserError(
                f"{path / WEIGHTS}: tensor W_dec is {tuple(decoder.shape)}, config.json says {needed}"
            )
        sae = cls(cfg)
        sae.set_tensors(tensors, str(path / WEIGHTS))
        return sae

    @classmethod
    def from_pretrained(
        cls, release: str, sae_id: str, device: str | torch.device = "cpu"
    ) -> "SAE":
        """Return a published SAE by the names of SAELens' registry (`wsae releases`), fetched from the hub if need be.

        `release` may also be a repository of the hub, and `sae_id` a folder in it. Raises UserError naming the nearest
        names, or what has no equal here.
        """
        # the readers of other tools' files lie layers above the SAE, and no layer imports upwards
        convert = importlib.import_module("wsae.interop.saes")
        return convert.from_pretrained(release, sae_id).sae.to(device)

    def scaled(self, scale: float, read: float | None = None) -> "SAE":
        """Return the SAE of scale * x that gives scale * z and scale * x_hat; a transcoder's inputs are read * x.

        Every activation function here is homogeneous, so only biases and thresholds change, and of a transcoder what
        takes x; with powers of two the two SAEs agree to the bit.
        Raises UserError with `input_norm`, which takes every scale away.
        """
        if self.cfg.input_norm is not None:
            raise UserError(
                f"an SAE of {self.cfg.input_norm} gives the same latents at every scale"
            )
        tensors = {name: t.clone() for name, t in self.tensors().items()}
        if read is not None and read != scale:
            for name in tensors.keys() & {"W_enc", "W_skip"}:
                tensors[name] *= scale / read
        for name in ("b_enc", "b_dec", "threshold"):
            if name in tensors and name not in self.arch.parameters:
                tensors[name] *= scale
        for name, parameter in self.arch.parameters.items():
            tensors[name] *= scale**parameter.power
        return self._like(self.cfg, tensors)

    def fold_decoder_norm(self) -> "SAE":
        """Return the SAE with decoder rows of length 1 that gives |W_dec[j]| z_j and the same x_hat.

        A tied one becomes untied; batch Top-k, whose one threshold would be many, JumpReLU. A row of zeros stays.
        Raises UserError for kinds that choose the k largest where rows have unequal length: they would choose others.
        """
        norm = self.W_dec.detach().double().norm(dim=1)
        norm = torch.where(norm > 0, norm, 1.0)
        choice, activation = self._used(), self.cfg.activation
        if not isinstance(choice, Above) and not even(norm, self.W_dec):
            raise UserError(
                f"fold_decoder_norm: rows of lengths {norm.min():.3g} to {norm.max():.3g}, and {activation.kind} "
                "would choose other latents; keep it as it is"
            )
        tensors = {name: t.double() for name, t in self.tensors().items()}
        tensors |= {
            "W_enc": tensors.get("W_enc", tensors["W_dec"].T) * norm,
            "b_enc": tensors.get("b_enc", torch.zeros_like(norm)) * norm,
            "W_dec": tensors["W_dec"] / norm[:, None],
            "b_dec": tensors.get("b_dec", torch.zeros_like(tensors["W_dec"][0])),
        }
        for name, parameter in self.arch.parameters.items():
            tensors[name] = tensors[name] * norm**parameter.power
        if isinstance(choice, Above) and not self.arch.parameters:
            floor = float(choice.floor)
            activation = JumpReLU() if floor > 0 else ReLU()
            tensors["threshold"] = floor * norm if floor > 0 else norm.new_zeros(())
        cfg = self.cfg.model_copy(update={"tied": False, "activation": activation})
        return self._like(cfg, tensors)

    def plain(self) -> "SAE":
        """Return the SAE of a simpler kind that gives the same latents, as other tools know it; itself if it is one.

        Matryoshka becomes batch Top-k or Top-k, multi-k Top-k Top-k, gated JumpReLU (its paper's Section 3.3).
        """
        if self.arch.plain is None:
            return self
        made = self.arch.plain(self.cfg.activation, self.tensors())
        cfg = self.cfg.model_copy(update={"activation": made.activation})
        return self._like(cfg, made.tensors)

    def _like(self, cfg: SAEConfig, tensors: dict[str, Tensor]) -> "SAE":
        """Return another SAE of these tensors, of this one's type and where it is."""
        other = SAE(cfg)
        if self.dtype != other.dtype:
            other = other.to(self.dtype)
        other.set_tensors(tensors)
        return other.to(self.device)

    def _used(self) -> Choice:
        return self.arch.used(self.cfg.activation, self.own)

    def _code(self, pre: Tensor) -> SparseCode:
        choice = self._used()
        if not isinstance(choice, PerRow | PerGroup):
            return code_from_dense(self._dense(pre, choice))
        indices = fixed(choice, pre.detach())
        own = at_latents(self.own, indices)
        z = self.arch.values(pre.gather(1, indices), own, self.cfg.activation)
        return code_from_topk(z, indices)

    def _dense(self, pre: Tensor, choice: Choice) -> Tensor:
        z = self.arch.values(pre, self.own, self.cfg.activation)
        if self.arch.encode is not None and isinstance(choice, Above):
            return z * (pre > choice.floor)
        return z

    def _rows(self, x: object, width: int) -> tuple[Float[Tensor, "rows width"], torch.Size]:
        """Return x [..., width] as rows in the SAE's type, and its leading axes."""
        if isinstance(x, Mapping) and self.cfg.sources is not None:
            x = self.join(x)
        given = x if isinstance(x, Tensor) else tensor(x, "input").to(self.W_dec.device)
        if given.ndim == 0 or given.shape[-1] != width:
            raise UserError(
                f"input of shape {tuple(given.shape)} where this SAE needs [..., {width}]"
            )
        if given.device != self.W_dec.device:
            raise UserError(
                f"input on {given.device}, this SAE is on {self.W_dec.device}; move one with .to(device)"
            )
        check_tensor(given, "input")
        lead = given.shape[:-1]
        return given.to(self.W_dec.dtype).reshape(math.prod(lead), width), lead

    def _own_type(self) -> contextlib.AbstractContextManager[object]:
        """Keep autocast from computing in another type than the parameters'."""
        kind = self.W_dec.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            return torch.autocast(kind, enabled=False)
        return contextlib.nullcontext()


def an_sae(value: object, what: str) -> SAE:
    """Return an SAE, compiled ones as they were; raises UserError beginning with `what` for anything else."""
    value = getattr(value, "_orig_mod", value)
    if not isinstance(value, SAE):
        raise UserError(f"{what}: given {type(value).__name__} in place of an SAE; SAE.load(path)")
    return value


def even(norm: Float[Tensor, " rows"], rows: Float[Tensor, "rows _"]) -> bool:
    """Return whether lengths of rows are one, but for the rounding of the coarsest type that holds the rows."""
    halves = (torch.bfloat16, torch.float16)
    types = (t for t in halves if torch.equal(rows.to(t).to(rows.dtype), rows))
    eps = torch.finfo(next(types, rows.dtype)).eps
    return float(norm.max() / norm.min()) <= 1 + max(1e-4, 4 * eps)


def at_latents(own: Mapping[str, Tensor], indices: Int64[Tensor, "*pairs"]) -> dict[str, Tensor]:
    """Return a kind's parameters at these latents; what is one number for all stays."""
    return {name: t[indices] if t.ndim else t for name, t in own.items()}


SparseAutoencoder = SAE
"""The name of earlier releases."""


def _native(path: Path) -> Path:
    """Return a folder with a manifest; raises UserError that says how what else lies there becomes an SAE of ours."""
    folder = path.parent if path.is_file() else path
    if (folder / MANIFEST).is_file():
        data = read_json(folder / MANIFEST)
        kind = data.get("kind") if isinstance(data, dict) else None
        if kind == "run":
            raise UserError(
                f"{path}: is a wsae run; give one of its SAEs, {folder}/members/HOOK/NAME"
            )
        if kind != "export":
            return folder
    elif not folder.is_dir():
        raise UserError(f"{path}: no such directory")
    raise UserError(
        f"{path}: is not a finished wsae sae; one of another tool is read by wsae import {path} --out DIR, "
        f"or wsae.interop.load({str(path)!r}).sae"
    )


# Codes of many rows by the compiled selection: what `encode_code` gives, several times as fast, without gradients.

FEW = 64
"""Batches of fewer rows are not worth the compiled way."""


class Encoder:
    """Encodes for evaluation: call it with rows [batch, d_in] in float32; the SAE must not change meanwhile.

    Latents and values are those of `SAE.encode_code` but for the order of float32 sums (near-ties at the
    k-th place may fall otherwise), and entries come in order of latent. Kinds without a threshold or a k, other devices
    and machines without the compiled kernels take `encode_code` itself.
    """

    def __init__(self, sae: SAE) -> None:
        self._sae = sae
        self._rounded: RoundedEncoder | None = None
        self._rows = sae.W_dec.new_empty(0)
        self._fast = _compiled(sae)

    def __call__(self, x: Float[Tensor, "batch d_in"]) -> SparseCode:
        """Return the latents of some rows."""
        here = x.shape[1] == self._sae.cfg.d_in and x.device.type == "cpu"
        whole = x.dtype == torch.float32 and len(x) >= FEW
        # of NaN the compiled selection would make silence; a sum finds it 40 times as fast as isfinite
        if not (self._fast and here and whole and bool(x.sum().isfinite())):
            return self._sae.encode_code(x)
        with torch.no_grad():
            return self._select(x)

    def _select(self, x: Tensor) -> SparseCode:
        sae, activation = self._sae, self._sae.cfg.activation
        x = sae.normalised(x).rows
        rounded = self._prepared(x)
        rows = sae.centre(x).contiguous()
        centred = Centred.of(rows)
        bias = None if sae.b_enc is None else sae.b_enc.detach()
        choice = sae.arch.used(activation, sae.own)
        if isinstance(choice, PerRow | PerGroup):
            pre = compiled_topk(rounded, self._rows, bias, centred, choice.k)
        else:
            assert isinstance(choice, Above)
            pre = select_above(rounded, self._rows, bias, centred, choice.floor)
        own = at_latents(sae.own, pre.indices)
        return pre._replace(values=sae.arch.values(pre.values, own, activation))

    def _prepared(self, x: Tensor) -> RoundedEncoder:
        """Return the 8-bit encoder, made when first needed; the spread of the rows at hand changes its speed only."""
        if self._rounded is None:
            cfg = self._sae.cfg
            choice = self._sae.arch.used(cfg.activation, self._sae.own)
            groups = choice.k if isinstance(choice, PerGroup) else 1
            scales = dimension_scales(x.std(0).nan_to_num(1.0, 1.0))
            self._rows = to_slices(self._sae.encoder_rows.detach())
            self._rounded = RoundedEncoder(cfg.d_sae, cfg.d_in, cfg.d_sae // groups, scales)
            self._rounded.measure(self._rows)
            self._rounded.pack(self._rows)
        return self._rounded


def _compiled(sae: SAE) -> bool:
    weights, choice = sae.W_dec, sae.arch.used(sae.cfg.activation, sae.own)
    if weights.device.type != "cpu" or weights.dtype != torch.float32 or why_not() is not None:
        return False
    if isinstance(choice, PerRow):
        return has_int8() and choice.k * LARGEST_SHARE <= sae.cfg.d_sae
    # above 0 a code may be dense, and then the whole product is faster
    dense = isinstance(choice, Every) or (
        isinstance(choice, Above) and isinstance(choice.floor, float)
    )
    return has_int8() and not dense
