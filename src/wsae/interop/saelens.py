"""SAELens 6: cfg.json + sae_weights.safetensors, as `SAE.load_from_disk` reads and `save_model` writes them.

    z = act((x - apply_b_dec_to_input * b_dec) @ W_enc + b_enc)        x_hat = z @ W_dec + b_dec

Top-k with `rescale_acts_by_decoder_norm` chooses by pre * ||W_dec[j]|| and divides the norm out again: the norms are
folded. Without it latents and choice do not depend on the norms, so they stay as they are.
"""

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from wsae.acts.names import hook_name
from wsae.core.errors import UserError
from wsae.core.files import write_json
from wsae.core.tensors import load_tensors, save_tensors
from wsae.interop.config import Provenance
from wsae.interop.format import Format, maybe, plain, read_config, whole
from wsae.interop.weights import (
    Foreign,
    Named,
    assemble,
    centred,
    check_shapes,
    log_threshold,
    named,
    take,
    unit_rows,
)
from wsae.sae.config import ReLU, SAEConfig, TopK
from wsae.sae.model import SparseAutoencoder

VERSION = "6.54.12"
"""The SAELens whose files these are."""
CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_ARCHITECTURES = {
    "topk": "topk",
    "batch_topk": "jumprelu",
    "jumprelu": "jumprelu",
    "relu": "standard",
}
_TENSORS = ("W_enc", "W_dec", "b_enc", "b_dec")


def _read(path: Path) -> Foreign:
    return Foreign(read_config(path / CONFIG), load_tensors(path / WEIGHTS))


def _architecture(config: dict[str, Any], where: str) -> str:
    """Return topk, jumprelu or standard; raises UserError for what our forward pass cannot be."""
    found = config.get("metadata")
    version = str((found if isinstance(found, dict) else {}).get("sae_lens_version") or "0")
    if int((re.match(r"\d+", version) or ["0"])[0]) < 6:
        raise UserError(
            f"{where}: written by SAELens {version if version != '0' else '< 6'}; open it with SAELens 6 "
            "(SAE.load_from_disk) and save it again (save_model)"
        )
    kind = config.get("architecture")
    if kind == "batchtopk":
        raise UserError(
            f"{where}: a training checkpoint of a batch Top-k SAE; give the folder of its inference SAE "
            "(save_inference_model)"
        )
    if kind not in ("topk", "jumprelu", "standard"):
        raise UserError(
            f"{where}: architecture {kind!r} has no equal here; topk, jumprelu and standard have"
        )
    normalise = config.get("normalize_activations", "none")
    if normalise not in ("none", None, False):
        raise UserError(
            f"{where}: normalize_activations = {normalise!r} cannot be folded from this folder alone; "
            "fold it in SAELens and save again"
        )
    if config.get("finetuning_scaling_factor"):
        raise UserError(f"{where}: finetuning_scaling_factor has no equal here")
    return kind


def _rename(foreign: Foreign, where: str) -> Named:
    config = foreign.config
    names = _TENSORS
    if _architecture(config, where) == "jumprelu":
        names = (*_TENSORS, "threshold")
    weights = Named(*take(foreign.tensors, names, where))
    return check_shapes(weights, where, config.get("d_in"), config.get("d_sae"))


def _understand(foreign: Foreign, where: str) -> SparseAutoencoder:
    config = foreign.config
    weights = _rename(foreign, where)
    if not config.get("apply_b_dec_to_input", True):
        weights = centred(weights)
    extra: dict[str, Tensor] = {}
    match _architecture(config, where):
        case "topk":
            if config.get("rescale_acts_by_decoder_norm", False):
                weights = unit_rows(weights)
            activation: dict[str, Any] = {"kind": "topk", "k": whole(config, "k", where)}
        case "jumprelu":
            assert weights.threshold is not None
            extra["log_threshold"] = log_threshold(weights.threshold)
            activation = {"kind": "jumprelu"}
        case _:
            activation = {"kind": "relu"}
    cfg = SAEConfig.parse({**weights.widths, "activation": activation}, where=where)
    return assemble(cfg, weights, extra)


def _about(foreign: Foreign) -> Provenance:
    found = foreign.config.get("metadata")
    meta = found if isinstance(found, dict) else {}
    return Provenance(
        model=maybe(meta, "model_name", str),
        hook=maybe(meta, "hook_name", str),
        context=maybe(meta, "context_size", int),
        prepend_bos=maybe(meta, "prepend_bos", bool),
        dataset=maybe(meta, "dataset_path", str),
        tokens=maybe(meta, "training_tokens", int),
        origin={"format": "saelens", **plain(foreign.config), **plain(meta)},
    )


def _pack(sae: SparseAutoencoder, about: Provenance) -> Foreign:
    activation = sae.cfg.activation
    kind = _ARCHITECTURES.get(activation.kind)
    if kind is None:
        raise UserError(
            f"activation {activation.kind} has no equal in SAELens; sparsify has (--format sparsify)"
        )
    weights = named(sae)
    config: dict[str, Any] = {"d_in": sae.cfg.d_in, "d_sae": sae.cfg.d_sae}
    config |= {"dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True}
    config |= {"normalize_activations": "none", "reshape_activations": "none"}
    if isinstance(activation, TopK):
        config |= {"k": activation.k, "rescale_acts_by_decoder_norm": False}
    config |= {"metadata": _metadata(activation.kind, about), "architecture": kind}
    tensors = {name: getattr(weights, name) for name in _TENSORS}
    if not isinstance(activation, TopK | ReLU):
        assert weights.threshold is not None
        tensors["threshold"] = weights.threshold.expand(sae.cfg.d_sae)
    return Foreign(config, tensors)


def _metadata(kind: str, about: Provenance) -> dict[str, Any]:
    hook = hook_name(about.hook) if about.hook else None
    known = {
        "model_name": about.model,
        "hook_name": hook and hook.name,
        "hook_layer": hook and hook.layer,
        "context_size": about.context,
        "prepend_bos": about.prepend_bos,
        "dataset_path": about.dataset,
        "training_tokens": about.tokens,
        "wsae_hook": about.hook,
        "wsae_version": about.wsae_version,
    }
    return {
        "sae_lens_version": VERSION,
        "sae_lens_training_version": None,
        "training_architecture": kind,
        **{key: value for key, value in known.items() if value is not None},
    }


def _write(foreign: Foreign, path: Path) -> None:
    save_tensors(path / WEIGHTS, foreign.tensors)
    write_json(path / CONFIG, foreign.config)


SAELENS = Format("saelens", (CONFIG, WEIGHTS), _read, _rename, _understand, _about, _pack, _write)
