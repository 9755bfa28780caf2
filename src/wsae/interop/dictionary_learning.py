"""dictionary_learning: ae.pt + config.json (`{"trainer": {...}, "buffer": {...}}`), one class per kind of SAE.

| class               | encoder                                          | ours       |
|---------------------|--------------------------------------------------|------------|
| AutoEncoderTopK     | k largest of ReLU(enc(x - b_dec))                 | topk       |
| BatchTopKSAE        | ReLU(enc(x - b_dec)) above one threshold          | batch_topk |
| AutoEncoder         | ReLU(enc(x - bias)), norms folded when it is read | relu       |
| AutoEncoderNew      | ReLU(enc(x)), decoder with a bias                 | relu       |
| JumpReluAutoEncoder | x @ W_enc + b_enc above a threshold per latent    | jumprelu   |
| GatedAutoEncoder    | magnitudes where a second path is above 0         | jumprelu   |
| MatryoshkaBatchTopKSAE | as BatchTopKSAE; its groups act on training     | batch_topk |

AutoEncoderTopK's `threshold` is off there unless asked for (`use_threshold=True`), so it is kept as provenance only.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wsae.acts.hooknames import hook_name
from wsae.core.errors import UserError
from wsae.core.torchfile import load_state
from wsae.interop.format import (
    Foreign,
    Format,
    Keys,
    Meaning,
    NamedTensors,
    centred,
    check_keys,
    check_shapes,
    gated,
    maybe,
    named,
    provenance,
    read_config,
    take,
    uncentred,
    unit_rows,
    whole,
)
from wsae.sae.config import Provenance
from wsae.sae.model import SAE

CONFIG, WEIGHTS = "config.json", "ae.pt"
_TOPK = ("encoder.weight", "decoder.weight", "encoder.bias", "b_dec")
_PLAIN = ("encoder.weight", "decoder.weight", "encoder.bias", "bias")
_NEW = ("encoder.weight", "decoder.weight", "encoder.bias", "decoder.bias")
_JUMP = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
_GATED = ("encoder.weight", "decoder.weight", "mag_bias", "decoder_bias", "gate_bias", "r_mag")
_MATRYOSHKA = ("W_enc", "W_dec", "b_enc", "b_dec")
_TENSORS = {
    "AutoEncoderTopK": _TOPK,
    "BatchTopKSAE": _TOPK,
    "AutoEncoder": _PLAIN,
    "AutoEncoderNew": _NEW,
    "JumpReluAutoEncoder": _JUMP,
    "GatedAutoEncoder": _GATED,
    "MatryoshkaBatchTopKSAE": _MATRYOSHKA,
}
_CLASSES = {
    "topk": ("AutoEncoderTopK", "TopKTrainer"),
    "batch_topk": ("BatchTopKSAE", "BatchTopKTrainer"),
    "relu": ("AutoEncoder", "StandardTrainer"),
    "jumprelu": ("JumpReluAutoEncoder", "JumpReluTrainer"),
}


_SUBMODULE = re.compile(r"(?P<what>resid_post|mlp_out|attention_out)_layer_(?P<layer>\d+)")
_PLACES = {
    "resid_post": "hook_resid_post",
    "mlp_out": "hook_mlp_out",
    "attention_out": "hook_attn_out",
}
"""How its own script names the places of a model -> TransformerLens' words."""
_TRAINING = """
    trainer_class wandb_name layer device seed lr steps warmup_steps decay_start resample_steps l1_penalty l0_penalty
    auxk_alpha top_k_aux threshold_beta threshold_start_step sparsity_warmup_steps lambda_warm_steps sparsity_penalty
    sparsity_coeff sparsity_coefficient sparsity_function sparsity_queue_length sparsity_loss_queue_length
    adaptive_sparsity_penalty n_sparsity_updates p p_start p_end next_p anneal_start target_l0 bandwidth
    weights_temperature gp_reg_coeff steps_before_annealing group_fractions group_weights group_sizes norm_factor
"""
"""`norm_factor` is folded into the biases before ae.pt is written; groups belong to a class of their own."""
_KEYS = Keys(
    used=frozenset({"dict_class", "activation_dim", "dict_size", "k", "lm_name", "submodule_name"}),
    harmless=frozenset(_TRAINING.split()),
    switches={},
)
"""Of `trainer`."""


def _read(path: Path) -> Foreign:
    return Foreign(read_config(path / CONFIG), load_state(path / WEIGHTS))


def _trainer(foreign: Foreign, where: str) -> dict[str, Any]:
    """Return the `trainer` of a config, of a known class and with known keys."""
    found = foreign.config.get("trainer")
    if not isinstance(found, dict) or not isinstance(found.get("dict_class"), str):
        raise UserError(f"{where}: config.json lacks trainer.dict_class, which says what ae.pt is")
    if found["dict_class"] not in _TENSORS:
        known = ", ".join(_TENSORS)
        raise UserError(f"{where}: {found['dict_class']} has no equal here; {known} have")
    check_keys(found, _KEYS, where)
    return found


def _rename(foreign: Foreign, where: str) -> NamedTensors:
    trainer = _trainer(foreign, where)
    kind = trainer["dict_class"]
    tensors = dict(foreign.tensors)
    threshold = None
    if _TENSORS[kind] in (_TOPK, _MATRYOSHKA):
        tensors.pop("k", None)
        tensors.pop("group_sizes", None)
        threshold = tensors.pop("threshold", torch.tensor(-1.0)).detach().float()
        threshold = threshold.reshape(()) if threshold.numel() == 1 else threshold
    parts = take(tensors, _TENSORS[kind], where)
    if parts[0].ndim != 2 or parts[1].ndim != 2:
        raise UserError(f"{where}: encoder or decoder of {kind} is not a matrix")
    if kind == "JumpReluAutoEncoder":
        weights = NamedTensors(*parts)
    elif kind == "MatryoshkaBatchTopKSAE":
        weights = NamedTensors(parts[0], parts[1], parts[2], parts[3], threshold)
    elif kind == "GatedAutoEncoder":
        rows, columns, bias, b_dec, gate, stretch = parts
        if not gate.shape == stretch.shape == bias.shape:
            raise UserError(f"{where}: gate_bias, mag_bias and r_mag are not one number per latent")
        weights = gated(NamedTensors(rows.T, columns.T, bias, b_dec), gate, stretch)
    else:
        weights = NamedTensors(parts[0].T, parts[1].T, parts[2], parts[3], threshold)
    return check_shapes(weights, where, trainer.get("activation_dim"), trainer.get("dict_size"))


def _understand(foreign: Foreign, weights: NamedTensors, where: str) -> Meaning:
    match _trainer(foreign, where)["dict_class"]:
        case "AutoEncoderTopK":
            return Meaning(weights, {"kind": "topk", "k": _k(foreign, where)})
        case "GatedAutoEncoder":
            return Meaning(weights, {"kind": "jumprelu"})
        case (
            "BatchTopKSAE" | "MatryoshkaBatchTopKSAE"
        ):  # its threshold -1 means "never set": every positive latent speaks
            return Meaning(weights, {"kind": "batch_topk", "k": _k(foreign, where)})
        case "AutoEncoder":
            norms = weights.W_dec.norm(dim=1)
            unit = torch.allclose(norms, torch.ones_like(norms))  # as its from_pretrained decides
            return Meaning(weights if unit else unit_rows(weights), {"kind": "relu"})
        case "AutoEncoderNew":
            return Meaning(centred(weights), {"kind": "relu"})
        case _:
            return Meaning(centred(weights), {"kind": "jumprelu"})


def _k(foreign: Foreign, where: str) -> int:
    trainer = _trainer(foreign, where)
    inside = foreign.tensors.get("k")
    if inside is None:
        return whole(trainer, "k", where)
    if inside.numel() != 1 or inside.is_floating_point() or int(inside) < 1:
        raise UserError(f"{where}: k in {WEIGHTS} is not a positive whole number")
    if trainer.get("k") not in (None, int(inside)):
        raise UserError(
            f"{where}: k is {int(inside)} in {WEIGHTS} and {trainer['k']!r} in {CONFIG}"
        )
    return int(inside)


def _about(foreign: Foreign) -> Provenance:
    found, rest = foreign.config.get("trainer"), foreign.config.get("buffer")
    trainer = found if isinstance(found, dict) else {}
    buffer = rest if isinstance(rest, dict) else {}
    level = foreign.tensors.get("threshold")
    scalar = {"threshold": float(level)} if level is not None and level.numel() == 1 else {}
    keys = {"model": "lm_name", "hook": "submodule_name"}
    notes = check_keys(trainer, _KEYS, CONFIG)
    about = provenance("dictionary_learning", trainer | scalar, keys, notes)
    known = {"context": maybe(buffer, "ctx_len", int)}
    if place := _SUBMODULE.fullmatch(about.hook or ""):
        known["hook"] = f"blocks.{place['layer']}.{_PLACES[place['what']]}"
    return about.model_copy(update=known)


def _pack(sae: SAE, about: Provenance) -> Foreign:
    activation = sae.cfg.activation
    if sae.cfg.transcoder:
        raise UserError(
            "a transcoder has no equal in dictionary_learning; sparsify has (--format sparsify)"
        )
    if activation.kind not in _CLASSES:
        raise UserError(
            f"activation {activation.kind} has no equal in dictionary_learning; sparsify has (--format sparsify)"
        )
    kind, trainer_class = _CLASSES[activation.kind]
    weights = named(sae)
    hook = hook_name(about.hook) if about.hook else None
    trainer: dict[str, Any] = {
        "trainer_class": trainer_class,
        "dict_class": kind,
        "activation_dim": sae.cfg.d_in,
        "dict_size": sae.cfg.d_sae,
        "layer": hook.layer if hook else None,
        "lm_name": about.model,
        "submodule_name": about.hook,
        "wandb_name": about.member or "wsae",
    }
    k = getattr(activation, "k", None)
    if k is not None:
        trainer["k"] = k
    config = {"trainer": trainer, "buffer": {"ctx_len": about.context, "d_submodule": sae.cfg.d_in}}
    return Foreign(config, _state(kind, weights, k))


def _state(kind: str, weights: NamedTensors, k: int | None) -> dict[str, Tensor]:
    if kind == "JumpReluAutoEncoder":  # it does not subtract b_dec
        moved = uncentred(weights)
        assert moved.threshold is not None
        return dict(zip(_JUMP, (*moved[:4], moved.threshold), strict=True))
    parts = (weights.W_enc.T, weights.W_dec.T, weights.b_enc, weights.b_dec)
    state = dict(zip(_TENSORS[kind], parts, strict=True))
    if k is not None:
        level = torch.tensor(-1.0) if weights.threshold is None else weights.threshold
        state |= {"k": torch.tensor(k, dtype=torch.int32), "threshold": level}
    return state


DICTIONARY_LEARNING = Format(
    "dictionary_learning", (CONFIG, WEIGHTS), _read, _rename, _understand, _about, _pack
)
