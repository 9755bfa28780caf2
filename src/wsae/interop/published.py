"""SAEs as laboratories publish them: bare arrays, with what they are of in the folder's name or a small config.

| what            | files                                              | encoder                                  |
|-----------------|----------------------------------------------------|------------------------------------------|
| Gemma Scope     | params.npz                                         | JumpReLU(x @ W_enc + b_enc)              |
| Gemma Scope 2   | params.safetensors, perhaps config.json            | the same                                 |
| Llama Scope     | hyperparams.json, checkpoints/final.safetensors    | JumpReLU(s x @ W_enc + b_enc)            |
| Llama Scope R1  | config.json, sae_weights.safetensors               | the same, thresholds per latent          |
| Qwen Scope      | layerN.sae.pt in a folder named ...-L0_K           | Top-k(x @ W_enc + b_enc)                 |
| OpenAI's, ReLU  | a .pt file with pre_bias and latent_bias           | ReLU((x - pre_bias) @ W + latent_bias)   |
| Goodfire        | a .pt or .pth file with encoder_linear.weight ...  | ReLU(x @ W + b_enc)                      |
| qresearch       | a .pt file with encoder.weight ..., by its release | ReLU(x @ W + b_enc)                      |
| Kissane et al.  | a .pt file, NAME_cfg.json beside it                | ReLU((x - b_dec) @ W_enc + b_enc)        |

Gemma Scope's transcoders have the same files, with `affine_skip_connection` [d_in, d_out] where there is a skip. None
but OpenAI's and Kissane's subtracts b_dec from its input. Llama Scope's s is sqrt(d) / the mean norm of its
activations: weights are for s x, its threshold for x. With `sparsity_include_decoder_norm` it compares pre-activations
times the norms of their decoder rows. Gemma Scope's SAEs of the embedding are for it before Gemma multiplies it by
sqrt(d), and become ones for what the first block takes.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from wsae.core.errors import UserError
from wsae.core.hub import LLAMA_CONFIG, LLAMA_WEIGHTS
from wsae.core.tensors import load_tensors, npz_arrays
from wsae.core.torchfile import load_state
from wsae.interop.format import (
    THROUGH_SAELENS,
    Foreign,
    Keys,
    Meaning,
    NamedTensors,
    Reader,
    Switch,
    centred,
    check_keys,
    check_shapes,
    positive,
    provenance,
    read_config,
    rescaled,
    take,
    truth,
    whole,
)
from wsae.sae.config import Provenance

NPZ, SAFE, CONFIG = "params.npz", "params.safetensors", "config.json"
_FACTOR, _SKIP = "scaling_factor", "affine_skip_connection"
_NAMES = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
_TRANSCODER = "a transcoder of Llama Scope has no equal here"
_GEMMA_KEYS = Keys(
    used=frozenset(
        {"model_name", "hf_hook_point_in", "hf_hook_point_out", "affine_connection", "note"}
    ),
    harmless=frozenset(
        {"width", "l0", "type", "layer", "release", "dtype", "num_latents", "d_in", "d_sae"}
    ),
    switches={
        "architecture": Switch(("jump_relu", None), "Gemma Scope's jump_relu has an equal here"),
    },
)
_LLAMA_SWITCHES = {
    "act_fn": Switch(
        ("jumprelu",), f"of Llama Scope's SAEs those with jumprelu are read; {THROUGH_SAELENS}"
    ),
    "norm_activation": Switch(
        ("dataset-wise",), f"dataset-wise has an equal here; {THROUGH_SAELENS}"
    ),
    "use_glu_encoder": Switch((False, None), "a gated encoder has no equal here"),
    "apply_decoder_bias_to_pre_encoder": Switch((False, None), f"unknown here; {THROUGH_SAELENS}"),
    "use_decoder_bias": Switch((True, None), f"unknown here; {THROUGH_SAELENS}"),
}


class Origin(NamedTuple):
    """What the name of a folder of Gemma Scope says: the model and TransformerLens' name of the hook."""

    model: str | None
    hook: str | None
    hook_out: str | None = None
    """Of a transcoder."""
    note: str | None = None


_GEMMA_2 = re.compile(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att|transcoders)")
_NORMED = (
    "reads what the norm before the MLP gives before its weight (1 + w) multiplies it, which no module gives: divide "
    "that module's output by 1 + w"
)
_GEMMA_3 = re.compile(r"gemma-scope-2-(\d+[bm])-(pt|it)")
_SITES = {
    "res": "hook_resid_post",
    "mlp": "hook_mlp_out",
    "att": "attn.hook_z",
    "resid_post": "hook_resid_post",
    "mlp_out": "hook_mlp_out",
    "attn_out": "attn.hook_z",
}


def origin(folder: Path) -> Origin:
    """Return the model and the hook that a folder's path names in the manner of Gemma Scope's releases."""
    path = folder.absolute().as_posix()
    layer = re.search(r"layer_(\d+)", path)
    site = re.search(r"(resid_post|mlp_out|attn_out)", path)
    name, model = site and site[1], None
    if (found := _GEMMA_2.search(path)) is not None:
        model = f"google/gemma-2-{found[1]}" + ("-it" if found[2] == "it" else "")
        name = found[3]
    elif (found := _GEMMA_3.search(path)) is not None:
        model = f"google/gemma-3-{found[1]}-{found[2]}"
    if name == "res" and "embedding/" in path:
        return Origin(model, "hook_embed")
    if "transcoder" in path and layer is not None:
        if _GEMMA_3.search(path) is not None:  # as the config of those that have one says
            at = f"model.layers.{layer[1]}."
            ends = ("pre_feedforward_layernorm.output", "post_feedforward_layernorm.output")
            return Origin(model, at + ends[0], at + ends[1])
        at = f"blocks.{layer[1]}."
        return Origin(model, at + "ln2.hook_normalized", at + "hook_mlp_out", _NORMED)
    return Origin(model, f"blocks.{layer[1]}.{_SITES[name]}" if layer and name else None)


def _read_gemma(path: Path) -> Foreign:
    if re.search(r"/clt", path.absolute().as_posix()):
        raise UserError(
            f"{path}: a cross-layer transcoder has no equal here, and the folder's name says that this is one"
        )
    config = read_config(path / CONFIG) if (path / CONFIG).is_file() else {}
    found = origin(path)
    said = {"model_name": found.model, "hf_hook_point_in": found.hook}
    config = said | {"hf_hook_point_out": found.hook_out, "note": found.note} | config
    if "transcoder" in path.absolute().as_posix() and not config.get("hf_hook_point_out"):
        raise UserError(
            f"{path}: the folder's name says that it is a transcoder, and not of which layer; name the folder as in "
            "the release, layer_N/..."
        )
    npz = (path / NPZ).is_file()
    raw = _load_npz(path / NPZ) if npz else load_tensors(path / SAFE)
    tensors = {re.sub(r"^w_", "W_", name): tensor for name, tensor in raw.items()}
    scale = (
        tensors["W_dec"].shape[-1] ** -0.5
        if found.hook == "hook_embed" and "W_dec" in tensors
        else None
    )
    return Foreign(config, tensors, scale)


def _load_npz(path: Path) -> dict[str, Tensor]:
    """Read the arrays of Gemma Scope; raises UserError for others, Python objects, damage, and packed bombs."""
    wanted = (*_NAMES, *(name.replace("W_", "w_") for name in _NAMES[:2]), _FACTOR)
    arrays, names = npz_arrays(path, wanted, str(path))
    extra = sorted(set(names) - set(wanted))
    if extra:
        raise UserError(
            f"{path}: array {extra[0]} belongs to no SAE this reads (needed: {', '.join(_NAMES)})"
        )
    return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}


def _rename_gemma(foreign: Foreign, where: str) -> NamedTensors:
    check_keys(foreign.config, _GEMMA_KEYS, where)
    tensors = dict(foreign.tensors)
    names = (*_NAMES, _SKIP) if _SKIP in tensors else _NAMES
    factor = tensors.get(_FACTOR)
    if factor is not None and bool((factor == 1).all()):
        del tensors[_FACTOR]
    weights = NamedTensors(*take(tensors, names, where))
    if weights.W_skip is not None:
        weights = weights._replace(W_skip=_matrix(weights.W_skip, _SKIP, where).contiguous())
        if not _gives(foreign):
            raise UserError(f"{where}: tensor {_SKIP} is a transcoder's, and no hf_hook_point_out")
    return check_shapes(weights, where, transcoder=_gives(foreign))


def _gives(foreign: Foreign) -> bool:
    """Return whether it is a transcoder's."""
    return bool(foreign.config.get("hf_hook_point_out"))


def _understand_gemma(foreign: Foreign, weights: NamedTensors, where: str) -> Meaning:  # noqa: ARG001
    if _gives(foreign):
        return Meaning(weights, {"kind": "jumprelu"}, transcoder=True)
    return Meaning(rescaled(centred(weights), foreign.scale or 1.0), {"kind": "jumprelu"})


def _about_gemma(foreign: Foreign) -> Provenance:
    config = foreign.config
    notes = check_keys(config, _GEMMA_KEYS, CONFIG)
    if config.get("hf_hook_point_in") is None:
        notes = (*notes, "neither files nor folder name the hook; the page of the release does")
    notes = (*notes, config["note"]) if config.get("note") else notes
    keys = {"model": "model_name", "hook": "hf_hook_point_in", "hook_out": "hf_hook_point_out"}
    about = provenance("gemma_scope", config, keys, notes)
    model = (
        (about.model or "")
        .replace("gemma-v3-", "gemma-3-")
        .replace("gemma-3-270m-pt", "gemma-3-270m")
    )
    return about.model_copy(update={"model": model or None})


GEMMA_SCOPE = Reader(
    "gemma_scope", (CONFIG, NPZ, SAFE), _read_gemma, _rename_gemma, _understand_gemma, _about_gemma
)


def _read_llama(path: Path) -> Foreign:
    config = read_config(path / LLAMA_CONFIG)
    for key, switch in _LLAMA_SWITCHES.items():
        if config.get(key) not in (*switch.off, None):
            raise UserError(f"{path}: {key} = {config[key]!r}: {switch.otherwise}")
    norms = config.get("dataset_average_activation_norm")
    norm = norms.get("in") if isinstance(norms, dict) else None
    mean = positive(norm, "dataset_average_activation_norm.in", str(path / LLAMA_CONFIG))
    if isinstance(norms, dict) and norms.get("out", norm) != norm:
        raise UserError(f"{path}: input and output have different norms: {_TRANSCODER}")
    scale = whole(config, "d_model", str(path / LLAMA_CONFIG)) ** 0.5 / mean
    return Foreign(config, load_tensors(path / LLAMA_WEIGHTS), scale)


def _rename_llama(foreign: Foreign, where: str) -> NamedTensors:
    config = foreign.config
    if config.get("hook_point_out", config.get("hook_point_in")) != config.get("hook_point_in"):
        raise UserError(f"{where}: hook_point_in is not hook_point_out: {_TRANSCODER}")
    names = ("encoder.weight", "decoder.weight", "encoder.bias", "decoder.bias")
    rows, columns, b_enc, b_dec = take(foreign.tensors, names, where)
    level = positive(config.get("jump_relu_threshold"), "jump_relu_threshold", where)
    threshold = torch.full_like(b_enc, level * (foreign.scale or 1.0))
    weights = NamedTensors(
        _matrix(rows, names[0], where), _matrix(columns, names[1], where), b_enc, b_dec, threshold
    )
    return check_shapes(weights, where, config.get("d_model"), config.get("d_sae"))


def _understand_llama(foreign: Foreign, weights: NamedTensors, where: str) -> Meaning:
    if truth(foreign.config, "sparsity_include_decoder_norm", False, where):
        assert weights.threshold is not None
        norms = weights.W_dec.double().norm(dim=1).clamp(min=1e-30)
        weights = weights._replace(threshold=(weights.threshold.double() / norms).float())
    return Meaning(rescaled(centred(weights), foreign.scale or 1.0), {"kind": "jumprelu"})


def _about_llama(foreign: Foreign) -> Provenance:
    keys = {"model": "model_name", "hook": "hook_point_in"}
    columns, notes = foreign.tensors.get("decoder.weight"), []
    if foreign.config.get("sparsity_include_decoder_norm") is True and columns is not None:
        norms = columns.float().norm(dim=0)
        if bool(((norms - 1).abs() > 0.02).any()):
            notes.append(
                f"sparsity_include_decoder_norm with decoder norms of {norms.min():.3g} to {norms.max():.3g}: they "
                "enter the comparison with the threshold, as in the library that trained it (SAELens leaves them out)"
            )
    about = provenance("llama_scope", foreign.config, keys, notes)
    return about.model_copy(update={"model": about.model or "meta-llama/Llama-3.1-8B"})


LLAMA_SCOPE = Reader(
    "llama_scope",
    (LLAMA_CONFIG, LLAMA_WEIGHTS),
    _read_llama,
    _rename_llama,
    _understand_llama,
    _about_llama,
)

R1_CONFIG, R1_WEIGHTS = "config.json", "sae_weights.safetensors"


def _rename_r1(foreign: Foreign, where: str) -> NamedTensors:
    config = foreign.config
    if foreign.scale is None:
        raise UserError(
            f"{where}: what its inputs are multiplied by is not in its files; the registry of releases has it: "
            "wsae import llama_scope_r1_distill:ID"
        )
    for key, off in (("use_glu_encoder", (False, None)), ("act_fn", ("jumprelu", None))):
        if config.get(key) not in off:
            raise UserError(f"{where}: {key} = {config[key]!r} has no equal here")
    *parts, logs = take(foreign.tensors, (*_LINEAR, "log_jumprelu_threshold"), where)
    rows, columns = (
        _matrix(part, name, where) for part, name in zip(parts, _LINEAR[:2], strict=False)
    )
    weights = NamedTensors(rows, columns, parts[2], parts[3], logs.exp())
    return check_shapes(weights, where, config.get("d_model"))


LLAMA_SCOPE_R1 = Reader(
    "llama_scope_r1",
    (R1_CONFIG, R1_WEIGHTS),
    lambda path: Foreign(read_config(path / R1_CONFIG), load_tensors(path / R1_WEIGHTS)),
    _rename_r1,
    _understand_llama,
    lambda foreign: provenance("llama_scope_r1", foreign.config, {"hook": "hook_point_in"}),
)
"""Opened by its release alone: its weights have the name of SAELens', its scale is nowhere in the files."""

_QWEN = frozenset({"W_enc", "W_dec", "b_enc", "b_dec"})
_OPENAI = frozenset({"pre_bias", "latent_bias", "encoder.weight", "decoder.weight"})
_OPENAI_REST = frozenset(
    {"stats_last_nonzero", "latents_activation_frequency", "latents_mean_square"}
)
_GOODFIRE = (
    *("encoder_linear.weight", "decoder_linear.weight"),
    *("encoder_linear.bias", "decoder_linear.bias"),
)
_LINEAR = ("encoder.weight", "decoder.weight", "encoder.bias", "decoder.bias")
"""What many SAEs of linear layers have: which one it is, only a release says."""


def beside(path: Path) -> Path:
    """Return where the config of a file by Kissane et al. lies."""
    return path.with_name(f"{path.stem}_cfg.json")


def _read_torch(path: Path) -> Foreign:
    words: dict[str, str] = {}
    tensors = load_state(path, words)
    found = re.search(r"-W\d+K-L0_(\d+)", path.absolute().as_posix())
    layer = re.search(r"layer(\d+)\.sae\.pt$|-SAE-l(\d+)\.pth?$", path.name)
    model = re.search(r"SAE-Res-(.+?)-W\d+K-L0_", path.absolute().as_posix())
    config = {
        "k": int(found[1]) if found else None,
        "hook": f"blocks.{layer[1] or layer[2]}.hook_resid_post" if layer else None,
        "model": f"Qwen/{model[1]}" if model else None,
        "activation": words.get("activation"),
    }
    if beside(path).is_file():
        said = read_config(beside(path))
        config |= {
            "hook": said.get("act_name"),
            "d_in": said.get("act_size"),
            "d_sae": said.get("dict_size"),
        }
    return Foreign(config, tensors)


def _rename_torch(foreign: Foreign, where: str) -> NamedTensors:
    tensors = {k: v for k, v in foreign.tensors.items() if k not in _OPENAI_REST}
    names = frozenset(tensors)
    if names == _OPENAI:
        order = ("encoder.weight", "decoder.weight", "latent_bias", "pre_bias")
    elif names == _QWEN:
        order = ("W_enc", "W_dec", "b_enc", "b_dec")
    elif names == set(_GOODFIRE):
        order = _GOODFIRE
    elif names == set(_LINEAR) and foreign.config.get("loader") == "deepseek_r1":
        order = _LINEAR
    else:
        raise UserError(
            f"{where}: its tensors ({', '.join(sorted(names)[:8])}) are of no SAE this knows (Qwen Scope's, OpenAI's "
            f"and Goodfire's are read), and a bare file says nothing of the rest; if SAELens reads it, "
            f"{THROUGH_SAELENS}"
        )
    rows, columns, b_enc, b_dec = take(tensors, order, where)
    if _kissane(foreign):
        weights = NamedTensors(rows, columns, b_enc, b_dec)
        return check_shapes(weights, where, foreign.config["d_in"], foreign.config["d_sae"])
    weights = NamedTensors(
        _matrix(rows, order[0], where), _matrix(columns, order[1], where), b_enc, b_dec
    )
    return check_shapes(weights, where)


def _kissane(foreign: Foreign) -> bool:
    """Return whether a config lies beside the file, as beside the SAEs of Kissane et al."""
    return "d_sae" in foreign.config


def _matrix(tensor: Tensor, name: str, where: str) -> Tensor:
    if tensor.ndim != 2:
        raise UserError(f"{where}: tensor {name} is {tuple(tensor.shape)}, not a matrix")
    return tensor.T


def _understand_torch(foreign: Foreign, weights: NamedTensors, where: str) -> Meaning:
    activation: dict[str, Any] = {"kind": "relu"}
    how = foreign.config["activation"]
    if how == "TopK":
        raise UserError(
            f"{where}: OpenAI's Top-k SAEs scale every token by its own norm (layer norm), which no fixed weights can "
            "do; use it in OpenAI's sparse_autoencoder or in SAELens"
        )
    if how not in (None, "ReLU"):
        raise UserError(f"{where}: activation {how!r} has no equal here; ReLU has")
    if foreign.tensors.keys() >= _QWEN and not _kissane(foreign):
        activation = {"kind": "topk", "k": foreign.config["k"]}
        if foreign.config["k"] is None:
            raise UserError(
                f"{where}: Qwen Scope's files do not say how many latents are active; put the file into a folder named "
                "as its repository, for example SAE-Res-Qwen3-1.7B-Base-W32K-L0_50 for 50"
            )
    if "pre_bias" not in foreign.tensors and not _kissane(foreign):
        weights = centred(weights)
    return Meaning(weights, activation)


def _about_torch(foreign: Foreign) -> Provenance:
    notes = () if foreign.config["hook"] else ("the file names neither model nor hook",)
    return provenance("torch", foreign.config, {"model": "model", "hook": "hook"}, notes)


TORCH = Reader("torch", ("", ""), _read_torch, _rename_torch, _understand_torch, _about_torch)
"""One file, which is given in place of its folder."""
