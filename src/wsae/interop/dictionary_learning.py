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

Crosscoders are those of its fork (jkminder/dictionary_learning), as the hub's mixin writes them: config.json (what the
class was made with) + model.safetensors, encoder.weight [sources, d, m], decoder.weight [sources, m, d]:

    f = ReLU(sum_s c (x_s - mean_s) W_s + b)        x_hat_s = (f D_s + b_s) / (c + 1e-8) + mean_s

(mean 0 and c = 1 where activation_mean is NaN). A CrossCoder is all of f, a BatchTopKCrossCoder f where f_j n_j is
above one threshold, n_j by `code_normalization`: sum_s |D_sj|, |D_j|, a mixture, or 1. Ours is z_j = f_j n_j, its
`get_activations`.
"""

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wsae.acts.hooknames import hook_name
from wsae.core.errors import UserError
from wsae.core.tensors import load_tensors
from wsae.core.torchfile import load_state
from wsae.interop.format import (
    Foreign,
    Format,
    Keys,
    Meaning,
    NamedTensors,
    NoEqual,
    Switch,
    centred,
    check_keys,
    check_shapes,
    gated,
    maybe,
    named,
    positive,
    provenance,
    read_config,
    take,
    uncentred,
    unit_rows,
    whole,
)
from wsae.sae.config import Provenance, SourcePart
from wsae.sae.model import SAE

CONFIG, WEIGHTS = "config.json", "ae.pt"
_TOPK = ("encoder.weight", "decoder.weight", "encoder.bias", "b_dec")
_PLAIN = ("encoder.weight", "decoder.weight", "encoder.bias", "bias")
_LAYERS = ("encoder.weight", "decoder.weight", "encoder.bias", "decoder.bias")
_JUMP = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
_GATED = ("encoder.weight", "decoder.weight", "mag_bias", "decoder_bias", "gate_bias", "r_mag")
_MATRYOSHKA = ("W_enc", "W_dec", "b_enc", "b_dec")
_TENSORS = {
    "AutoEncoderTopK": _TOPK,
    "BatchTopKSAE": _TOPK,
    "AutoEncoder": _PLAIN,
    "AutoEncoderNew": _LAYERS,
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
    trainer = _trainer(foreign, where)
    match trainer["dict_class"]:
        case "AutoEncoderTopK":
            return Meaning(weights, {"kind": "topk", "k": _k_of(foreign, trainer, WEIGHTS, where)})
        case "GatedAutoEncoder":
            return Meaning(weights, {"kind": "jumprelu"})
        case "BatchTopKSAE" | "MatryoshkaBatchTopKSAE":
            # its threshold -1 means "never set": every positive latent speaks
            k = _k_of(foreign, trainer, WEIGHTS, where)
            return Meaning(weights, {"kind": "batch_topk", "k": k})
        case "AutoEncoder":
            norms = weights.W_dec.norm(dim=1)
            unit = torch.allclose(norms, torch.ones_like(norms))  # as its from_pretrained decides
            return Meaning(weights if unit else unit_rows(weights), {"kind": "relu"})
        case "AutoEncoderNew":
            return Meaning(centred(weights), {"kind": "relu"})
        case _:
            return Meaning(centred(weights), {"kind": "jumprelu"})


def _k_of(foreign: Foreign, config: dict[str, Any], weights: str, where: str) -> int:
    inside = foreign.tensors.get("k")
    if inside is None:
        return whole(config, "k", where)
    if inside.numel() != 1 or inside.is_floating_point() or int(inside) < 1:
        raise UserError(f"{where}: k in {weights} is not a positive whole number")
    if config.get("k") not in (None, int(inside)):
        raise UserError(f"{where}: k is {int(inside)} in {weights} and {config['k']!r} in {CONFIG}")
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
        raise NoEqual("a transcoder has no equal in dictionary_learning")
    if activation.kind not in _CLASSES:
        raise NoEqual(f"activation {activation.kind} has no equal in dictionary_learning")
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


_BESIDE = "model.safetensors"
_MEAN, _STD, _SCALE = "activation_mean", "activation_std", "activation_global_scale"
_BUFFERS = ("target_rms", _MEAN, _STD, _SCALE, "code_normalization_id", "k", "threshold")
_NORMS = ("CROSSCODER", "SAE", "MIXED", "NONE", "DECOUPLED")
"""In the order of their ids, from 1."""
_CROSS_USED = """
    activation_dim dict_size num_layers num_decoder_layers k code_normalization code_normalization_alpha_sae
    code_normalization_alpha_cc
"""
_CROSS_HARMLESS = """
    same_init_for_all_layers norm_init_scale init_with_transpose target_rms activation_mean activation_std
"""
_CROSS_KEYS = Keys(
    used=frozenset(_CROSS_USED.split()),
    harmless=frozenset(_CROSS_HARMLESS.split()),
    switches={
        "encoder_layers": Switch((None,), "an encoder of some sources alone has no equal here"),
        "latent_processor": Switch((None,), "what it does to the latents is not in the files"),
    },
)


class _Crosscoders(Format):
    def detect(self, path: Path) -> bool:
        """Return whether a folder holds a crosscoder: language models have files of these names too."""
        if not super().detect(path) or not (path / CONFIG).is_file():
            return False
        return "dict_size" in read_config(path / CONFIG)


def _rename_crosscoder(foreign: Foreign, where: str) -> NamedTensors:
    check_keys(foreign.config, _CROSS_KEYS, where)
    if (name := _norm_name(foreign, where)) not in _NORMS[:4]:
        raise UserError(
            f"{where}: code_normalization {name!r} has no equal here; {', '.join(_NORMS[:4])} have"
        )
    weights = {name: t for name, t in foreign.tensors.items() if name not in _BUFFERS}
    W, D, b_enc, b_dec = take(weights, _LAYERS, where)
    if W.ndim != 3 or (*W.shape[:1], *W.shape[:0:-1]) != D.shape or b_dec.shape != W.shape[:2]:
        found = ", ".join(f"{name} {tuple(weights[name].shape)}" for name in _LAYERS)
        raise UserError(
            f"{where}: {found}; needed: [sources, d, m], [sources, m, d], [m], [sources, d]"
        )
    for key, is_ in zip(("num_layers", "activation_dim"), W.shape, strict=False):
        if foreign.config.get(key, is_) != is_:
            said = foreign.config[key]
            raise UserError(f"{where}: the config says {key} = {said!r}, the weights have {is_}")
    threshold = foreign.tensors.get("threshold")
    threshold = threshold if threshold is None else threshold.float()
    named = NamedTensors(
        W.flatten(0, 1), D.transpose(0, 1).flatten(1), b_enc, b_dec.flatten(), threshold
    )
    return check_shapes(named, where, None, foreign.config.get("dict_size"))


def _understand_crosscoder(foreign: Foreign, weights: NamedTensors, where: str) -> Meaning:
    sources, d, _ = foreign.tensors["encoder.weight"].shape
    W, D, b, b_dec = (
        t.double() for t in (weights.W_enc, weights.W_dec, weights.b_enc, weights.b_dec)
    )
    n = _code_norm(foreign, D.unflatten(1, (sources, d)), where)
    mean, std = (foreign.tensors.get(name) for name in (_MEAN, _STD))
    if mean is not None and std is not None and not bool(mean.isnan().any() | std.isnan().any()):
        c = foreign.tensors.get(_SCALE, torch.empty(0, dtype=torch.float32)).double()
        if mean.shape != (sources, d) or c.numel() != 1 or not 0 < float(c) < math.inf:
            raise UserError(
                f"{where}: {_MEAN} is {tuple(mean.shape)} and {_SCALE} {c.tolist()}; needed: {(sources, d)} and one "
                "number above 0"
            )
        mean, c = mean.double().flatten(), c.reshape(())
        b = b - c * mean @ W
        W, D, b_dec = c * W, D / (c + 1e-8), b_dec / (c + 1e-8) + mean
    b = (b + b_dec @ W) * n  # ours subtracts b_dec
    W, D = W * n, D / n.clamp(min=1e-30)[:, None]
    found = NamedTensors(W.float(), D.float(), b.float(), b_dec.float(), weights.threshold)
    activation: dict[str, Any] = {"kind": "relu"}
    if weights.threshold is not None:  # -1: never set, every positive latent speaks
        activation = {"kind": "batch_topk", "k": _k_of(foreign, foreign.config, _BESIDE, where)}
    parts = tuple(SourcePart(name=f"source {number}", width=d) for number in range(sources))
    return Meaning(found, activation, sources=parts)


def _norm_name(foreign: Foreign, where: str) -> object:
    if name := foreign.config.get("code_normalization"):
        return name
    number = foreign.tensors.get("code_normalization_id", torch.tensor(1))
    if number.numel() != 1 or number.item() not in range(1, 1 + len(_NORMS)):
        raise UserError(
            f"{where}: code_normalization_id in {_BESIDE} is not one number from 1 to {len(_NORMS)}"
        )
    return _NORMS[int(number) - 1]


def _code_norm(foreign: Foreign, D: Tensor, where: str) -> Tensor:
    """Return n_j of decoder rows [m, sources, d]."""
    each, of_row = D.norm(dim=2).sum(1), D.flatten(1).norm(dim=1)
    match _norm_name(foreign, where):
        case "CROSSCODER":
            return each
        case "SAE":
            return of_row
        case "MIXED":
            usual = {"code_normalization_alpha_sae": 1.0, "code_normalization_alpha_cc": 0.1}
            a, b = (positive(foreign.config.get(k, v), k, where) for k, v in usual.items())
            return a * of_row + b * each
        case _:
            return torch.ones_like(each)


def _pack_crosscoder(sae: SAE, about: Provenance) -> Foreign:  # noqa: ARG001  (its config has no room for it)
    parts, activation = sae.cfg.sources, sae.cfg.activation
    if parts is None:
        raise NoEqual("an SAE of one hook has no equal among crosscoders")
    if len({part.width for part in parts}) > 1 or activation.kind not in ("relu", "batch_topk"):
        widths = ", ".join(str(part.width) for part in parts)
        raise NoEqual(
            f"a crosscoder of {activation.kind} over widths {widths} has no equal there: relu and batch_topk over one "
            "width have"
        )
    weights, size = uncentred(named(sae, by_source=True)), (len(parts), parts[0].width)
    state = {
        "encoder.weight": weights.W_enc.unflatten(0, size),
        "decoder.weight": weights.W_dec.unflatten(1, size).transpose(0, 1),
        "encoder.bias": weights.b_enc,
        "decoder.bias": weights.b_dec.view(size),
        "target_rms": torch.tensor(1.0, dtype=torch.float32),
        _MEAN: torch.full(size, torch.nan, dtype=torch.float32),
        _STD: torch.full(size, torch.nan, dtype=torch.float32),
        _SCALE: torch.tensor(1.0, dtype=torch.float32),
        "code_normalization_id": torch.tensor(1 + _NORMS.index("NONE")),
    }
    config: dict[str, Any] = {
        "activation_dim": size[1],
        "dict_size": sae.cfg.d_sae,
        "num_layers": size[0],
        "code_normalization": "NONE",
        "target_rms": 1.0,
    }
    if weights.threshold is not None:
        config["k"] = getattr(activation, "k", None)
        state |= {"k": torch.tensor(config["k"], dtype=torch.int32), "threshold": weights.threshold}
    return Foreign(config, state)


CROSSCODER = _Crosscoders(
    "crosscoder",
    (CONFIG, _BESIDE),
    lambda path: Foreign(read_config(path / CONFIG), load_tensors(path / _BESIDE)),
    _rename_crosscoder,
    _understand_crosscoder,
    lambda foreign: provenance("crosscoder", foreign.config, {}),
    _pack_crosscoder,
    "from dictionary_learning.dictionary import CrossCoder, BatchTopKCrossCoder  # jkminder's; the latter where there "
    "is a k: BatchTopKCrossCoder.from_pretrained({path!r}, from_hub=True)",
)
DICTIONARY_LEARNING = Format(
    "dictionary_learning",
    (CONFIG, WEIGHTS),
    lambda path: Foreign(read_config(path / CONFIG), load_state(path / WEIGHTS)),
    *(_rename, _understand, _about, _pack),
    "from dictionary_learning.utils import load_dictionary; load_dictionary({path!r}, 'cpu')",
)
