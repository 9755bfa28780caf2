"""sparsify (EleutherAI): cfg.json + sae.safetensors, as `SparseCoder.load_from_disk` reads and `save_to_disk` writes.

    pre = ReLU((x - b_dec) @ encoder.weight^T + encoder.bias)     x_hat = z @ W_dec + b_dec

z keeps the k largest (`topk`) or the largest of each of k contiguous groups (`groupmax`, our group_topk). ReLU comes
before the choice there and after it here, which changes no latent: a chosen pre-activation below 0 is 0 either way.
`normalize_decoder` and `multi_topk` act on training only; decoder norms enter neither choice nor latents. With
`transcode` b_dec is not subtracted, with `skip_connection` x @ W_skip^T is added; outputs are as many as inputs. An
SAE with a skip connection is read as a transcoder whose output is its input.
"""

from typing import Any

import torch
from torch import Tensor

from wsae.core.errors import UserError
from wsae.core.tensors import load_tensors
from wsae.interop.format import (
    Foreign,
    Format,
    Keys,
    Meaning,
    NamedTensors,
    NoEqual,
    Switch,
    check_keys,
    check_shapes,
    named,
    provenance,
    read_config,
    take,
    truth,
    uncentred,
    whole,
)
from wsae.sae.config import GroupTopK, Provenance, TopK
from wsae.sae.model import SAE

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
_TENSORS = ("encoder.weight", "W_dec", "encoder.bias", "b_dec")
_KINDS = {"topk": "topk", "groupmax": "group_topk"}
_KEYS = Keys(
    used=frozenset(
        {"d_in", "num_latents", "expansion_factor", "k", "activation"}
        | {"transcode", "skip_connection"}
    ),
    harmless=frozenset({"normalize_decoder", "multi_topk", "init_method"}),
    switches={
        "signed": Switch(
            (False, None),
            "latents are chosen by magnitude and keep their sign (sparsify of June to August 2024), which has no "
            "equal here; use it with the sparsify that wrote it",
        ),
    },
)


def _rename(foreign: Foreign, where: str) -> NamedTensors:
    config = foreign.config
    check_keys(config, _KEYS, where)
    skip = _truth(config, "skip_connection", where)
    names = (*_TENSORS, "W_skip") if skip else _TENSORS
    rows, W_dec, b_enc, b_dec, *rest = take(foreign.tensors, names, where)
    if rows.ndim != 2:
        raise UserError(f"{where}: encoder.weight is {tuple(rows.shape)}, not a matrix")
    d_in = whole(config, "d_in", where)
    if config.get("num_latents") in (None, 0):
        d_sae = d_in * whole({"expansion_factor": 32} | config, "expansion_factor", where)
    else:
        d_sae = whole(config, "num_latents", where)
    weights = NamedTensors(rows.T, W_dec, b_enc, b_dec, W_skip=rest[0] if skip else None)
    return check_shapes(weights, where, d_in, d_sae)


def _truth(config: dict[str, Any], key: str, where: str) -> bool:
    """Return a switch that older files may not have."""
    return truth({k: v for k, v in config.items() if v is not None}, key, False, where)


def _understand(foreign: Foreign, weights: NamedTensors, where: str) -> Meaning:
    kind = foreign.config.get("activation", "topk")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise UserError(f"{where}: activation {kind!r} has no equal here; topk and groupmax have")
    k = whole({"k": 32} | foreign.config, "k", where)
    transcode = _truth(foreign.config, "transcode", where)
    if weights.W_skip is not None and not transcode:
        weights, transcode = uncentred(weights), True
    return Meaning(weights, {"kind": _KINDS[kind], "k": k}, transcode)


def _pack(sae: SAE, about: Provenance) -> Foreign:  # noqa: ARG001  (the config has no room for it)
    activation = sae.cfg.activation
    if not isinstance(activation, TopK | GroupTopK):
        raise NoEqual(
            f"activation {activation.kind} has no equal in sparsify, which has Top-k and groupmax only"
        )
    if sae.cfg.width_out != sae.cfg.d_in:
        raise NoEqual(
            f"a transcoder from width {sae.cfg.d_in} to {sae.cfg.width_out} has no equal in sparsify, whose "
            "transcoders give as many dimensions as they read"
        )
    weights = named(sae)
    unit = (weights.W_dec.norm(dim=1) - 1).abs().max() < 1e-3
    config: dict[str, Any] = {
        "activation": "topk" if isinstance(activation, TopK) else "groupmax",
        "expansion_factor": max(1, sae.cfg.d_sae // sae.cfg.d_in),
        "normalize_decoder": bool(unit),
        "num_latents": sae.cfg.d_sae,
        "k": activation.k,
        "multi_topk": False,
        "skip_connection": bool(sae.cfg.skip),
        "transcode": sae.cfg.transcoder,
        "d_in": sae.cfg.d_in,
    }
    parts = (weights.W_enc.T, weights.W_dec, weights.b_enc, weights.b_dec)
    tensors: dict[str, Tensor] = dict(zip(_TENSORS, map(torch.clone, parts), strict=True))
    if weights.W_skip is not None:
        tensors["W_skip"] = weights.W_skip
    return Foreign(config, tensors)


SPARSIFY = Format(
    "sparsify",
    (CONFIG, WEIGHTS),
    lambda path: Foreign(read_config(path / CONFIG), load_tensors(path / WEIGHTS)),
    _rename,
    _understand,
    lambda found: provenance("sparsify", found.config, {}, check_keys(found.config, _KEYS, CONFIG)),
    _pack,
    "from sparsify import SparseCoder; SparseCoder.load_from_disk({path!r})",
)
