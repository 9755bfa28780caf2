"""SAELens: cfg.json + sae_weights.safetensors, as `SAE.load_from_disk` of version 6 reads and `save_model` writes them.

    z = act((x - apply_b_dec_to_input * b_dec) @ W_enc + b_enc)        x_hat = z @ W_dec + b_dec

Transcoders never subtract b_dec, whose width is that of the output; a skip transcoder adds x @ W_skip^T. SAELens has
them with ReLU and JumpReLU.

Top-k with `rescale_acts_by_decoder_norm` chooses by pre * ||W_dec[j]|| and divides the norm out again: the norms are
folded. Without it latents and choice do not depend on the norms, so they stay as they are.

Configs from before version 6 keep everything at the top and have other names (`_settings`); of theirs,
`finetuning_scaling_factor` multiplies latents on their way to the decoder, so it is folded into W_dec.
"""

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from wsae.acts.hooknames import hook_name
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
    centred,
    check_keys,
    check_shapes,
    gated,
    maybe,
    named,
    plain,
    positive,
    provenance,
    read_config,
    rescaled,
    take,
    truth,
    unit_rows,
    whole,
)
from wsae.sae.config import Provenance, ReLU, TopK
from wsae.sae.model import SAE

VERSION = "6.54.12"
"""The SAELens whose files these are."""
CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_ARCHITECTURES = {
    "topk": "topk",
    "batch_topk": "jumprelu",
    "jumprelu": "jumprelu",
    "relu": "standard",
}
_TRANSCODERS = {
    "transcoder": "standard",
    "skip_transcoder": "standard",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
"""Architectures of transcoders -> what they compute with."""
_TENSORS = ("W_enc", "W_dec", "b_enc", "b_dec")
_GATED = ("W_enc", "W_dec", "b_mag", "b_dec", "b_gate", "r_mag")
SCALER = "activation_scaler.json"
"""Where SAELens 6 keeps the number that training multiplied activations by, beside a checkpoint."""
_FACTORS = ("finetuning_scaling_factor", "scaling_factor")
_RENAMED = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "hook_point_layer": "hook_layer",
    "activation_fn_str": "activation_fn",
}
"""Keys of before version 6, and their later names."""
_KNOWN = {
    **{"model": "model_name", "hook": "hook_name", "context": "context_size"},
    **{"prepend_bos": "prepend_bos", "dataset": "dataset_path", "tokens": "training_tokens"},
    "hook_out": "hook_name_out",
}
"""What both sides know of an SAE: our name -> theirs."""
_META = (
    *("model_name", "hook_name", "hook_layer", "hook_head_index", "context_size", "prepend_bos"),
    *("dataset_path", "training_tokens", "model_from_pretrained_kwargs", "hook_name_out"),
)
"""What version 6 keeps in `metadata`, in this order."""
_OURS = ("wsae_hook", "wsae_version")
_TRAINING = """
    decoder_init_norm l1_coefficient l1_warm_up_steps lp_norm aux_loss_coefficient use_sparse_activations
    topk_threshold_lr jumprelu_init_threshold jumprelu_bandwidth jumprelu_sparsity_loss_mode jumprelu_tanh_scale
    jumprelu_ste_to_input l0_coefficient l0_warm_up_steps pre_act_loss_coefficient target_l0 matryoshka_widths
    use_matryoshka_aux_loss
    b_dec_init_method expansion_factor normalize_sae_decoder noise_scale from_pretrained_path decoder_orthogonal_init
    decoder_heuristic_init decoder_heuristic_init_norm init_encoder_as_decoder_transpose n_batches_in_buffer
    finetuning_tokens store_batch_size_prompts store_batch_size total_training_tokens train_batch_size
    train_batch_size_tokens tokens_per_buffer act_store_device seed autocast autocast_lm compile_llm
    llm_compilation_mode compile_sae sae_compilation_mode adam_beta1 adam_beta2 mse_loss_normalization
    scale_sparsity_penalty_by_decoder_norm lr lr_scheduler_name lr_warm_up_steps lr_end lr_decay_steps
    n_restart_cycles finetuning_method use_ghost_grads ghost_grads feature_sampling_window feature_sampling_method
    feature_reinit_scale dead_feature_window dead_feature_threshold dead_feature_estimation_method
    resample_batches n_eval_batches eval_batch_size_prompts n_resampling_batches n_running_sparsity_tokens
    log_to_wandb log_activations_store_to_wandb log_optimizer_state_to_wandb wandb_project wandb_id run_name
    wandb_entity wandb_log_frequency wandb_group_suffix eval_every_n_wandb_logs resume n_checkpoints checkpoint_path
    verbose model_kwargs
"""
_KEYS = Keys(
    used=frozenset(
        (
            *("architecture", "d_in", "d_sae", "k", "metadata", "normalize_activations", *_META),
            *("apply_b_dec_to_input", "rescale_acts_by_decoder_norm", "activation_fn_kwargs"),
            *("finetuning_scaling_factor", "sae_lens_version", "d_out"),
        )
    ),
    harmless=frozenset(
        (
            *("dtype", "device", "sae_lens_training_version", "dataset_trust_remote_code"),
            *("neuronpedia_id", "seqpos_slice", "exclude_special_tokens", "model_class_name"),
            *("hook_eval", "hook_point_eval", "streaming", "is_dataset_tokenized", "dataset"),
            *("use_cached_activations", "cached_activations_path", "jump_relu_threshold"),
            *("hf_hook_name", "training_architecture", "training_architecture_details"),
            *("hf_hook_name_out", "hook_head_index_out", "hook_layer_out"),
            *_TRAINING.split(),
        )
    ),
    switches={
        "activation_fn": Switch(
            ("relu", "topk", None),
            "of the activation functions of SAELens relu and topk have an equal here",
        ),
        "reshape_activations": Switch(
            ("none", "hook_z", None), "none and hook_z (heads side by side) have an equal here"
        ),
    },
)
_BY_ROW = ("layer_norm", "constant_norm_rescale")
_NORMALISED = {
    "expected_average_only_in": "activations are multiplied by one number, sqrt(d_in) / their mean norm, which is not "
    f'in this folder; write it beside the weights into {SCALER} as {{"scaling_factor": NUMBER}}, as SAELens 6 '
    "does, and it is folded; or give the folder of the finished SAE, into which SAELens has folded it",
    "covariance_whitening": "activations are whitened by a matrix that is not among the weights; give the folder of "
    "the finished SAE, into which SAELens has folded it",
}


def _read(path: Path) -> Foreign:
    config = read_config(path / CONFIG)
    scale = None
    if _normalised(config) == "expected_average_only_in" and (path / SCALER).is_file():
        found = read_config(path / SCALER).get("scaling_factor")
        scale = positive(found, "scaling_factor", path / SCALER)
    return Foreign(config, load_tensors(path / WEIGHTS), scale)


def as_registered(foreign: Foreign, overrides: dict[str, Any], scale: float | None) -> Foreign:
    """Return the content with what a registry of releases says in its place: keys of the config, and the scale."""
    config = foreign.config | overrides
    if foreign.scale is None and _normalised(config) == "expected_average_only_in":
        return foreign._replace(config=config, scale=scale)
    return foreign._replace(config=config)


def _normalised(config: dict[str, Any]) -> object:
    """Return how activations are normalised, in the words of version 6."""
    found = config.get("normalize_activations")
    if isinstance(found, bool) or found is None:
        return "expected_average_only_in" if found else "none"
    return found


def _renamed(config: dict[str, Any]) -> dict[str, Any]:
    return {_RENAMED.get(key, key): value for key, value in config.items()}


def _settings(config: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a config in the words of version 6, every key known; raises UserError as `check_keys` does."""
    meta = config.get("metadata", {})
    if not isinstance(meta, dict):
        raise UserError(f"{where}: metadata is a {type(meta).__name__}, not an object")
    version = meta.get("sae_lens_version") or config.get("sae_lens_version")
    found = _renamed(config)
    if int((re.match(r"\d+", str(version)) or ["0"])[0]) < 6:  # as SAELens 6 reads them
        if "architecture" not in found and "d_in" not in found:
            raise UserError(f"{where}: {CONFIG} says neither architecture nor d_in")
        found = {"architecture": "standard", **found}
        arguments = found.get("activation_fn_kwargs") or {}
        if found.get("activation_fn") == "topk":
            if not isinstance(arguments, dict) or arguments.keys() - {"k"}:
                raise UserError(f'{where}: activation_fn_kwargs = {arguments!r} is not {{"k": K}}')
            found |= {"architecture": "topk", **arguments}
    _architecture(found, where)
    check_keys(_renamed(config), _KEYS, where)
    if found.get("activation_fn") == "topk" and found.get("architecture") != "topk":
        raise UserError(
            f"{where}: activation_fn = 'topk' with architecture {found.get('architecture')!r} has no equal here"
        )
    return found


def _architecture(config: dict[str, Any], where: str) -> str:
    """Return topk, jumprelu, gated or standard; raises UserError for what our forward pass cannot be."""
    kind = config.get("architecture")
    if not isinstance(kind, str) or kind not in _TRANSCODERS:
        for key in ("d_out", "hook_name_out"):
            if config.get(key):
                raise UserError(
                    f"{where}: {key} = {config[key]!r} is a transcoder's, not of {kind}"
                )
    elif config.get("apply_b_dec_to_input"):
        raise UserError(
            f"{where}: apply_b_dec_to_input = True: a transcoder's b_dec is its output's"
        )
    else:
        return _TRANSCODERS[kind]
    if kind == "batchtopk":
        raise UserError(
            f"{where}: a training checkpoint of a batch Top-k SAE; give the folder of its inference SAE "
            "(save_inference_model)"
        )
    if kind not in ("topk", "jumprelu", "gated", "standard"):
        raise UserError(
            f"{where}: architecture {kind!r} has no equal here; topk, jumprelu, gated, standard and their transcoders "
            "have"
        )
    return kind


def _check_normalised(foreign: Foreign, where: str) -> None:
    """Raise UserError for a normalisation of which too little is known."""
    how = _normalised(foreign.config)
    if how in ("none", *_BY_ROW) or foreign.scale is not None:
        return
    why = _NORMALISED.get(how, "is unknown here") if isinstance(how, str) else "is unknown here"
    raise UserError(f"{where}: normalize_activations = {how!r}: {why}")


def _rename(foreign: Foreign, where: str) -> NamedTensors:
    config = _settings(foreign.config, where)
    kind = _architecture(config, where)
    _check_normalised(foreign, where)
    tensors = {key: value for key, value in foreign.tensors.items() if key not in _FACTORS}
    if kind == "gated":
        *parts, gate, stretch = take(tensors, _GATED, where)
        shape = parts[2].shape
        if gate.shape != shape or stretch.shape != shape:
            raise UserError(f"{where}: b_gate, b_mag and r_mag are not one number per latent")
        weights = gated(NamedTensors(*parts), gate, stretch)
    else:
        names = (*_TENSORS, "threshold") if kind == "jumprelu" else _TENSORS
        names = (*names, "W_skip") if "skip" in config["architecture"] else names
        weights = NamedTensors(**dict(zip(names, take(tensors, names, where), strict=True)))
    widths = (config.get("d_in"), config.get("d_sae"))
    weights = check_shapes(weights, where, *widths, _transcoder(config))
    if _transcoder(config) and config.get("d_out") != weights.W_dec.shape[1]:
        raise UserError(
            f"{where}: the config says d_out = {config.get('d_out')!r}, the decoder is "
            f"{tuple(weights.W_dec.shape)}"
        )
    return weights


def _transcoder(config: dict[str, Any]) -> bool:
    return config["architecture"] in _TRANSCODERS


def _factor(foreign: Foreign, weights: NamedTensors, where: str) -> Tensor | None:
    """Return what multiplies latents before they are decoded, none where that is 1 for all."""
    held = next((name for name in _FACTORS if name in foreign.tensors), None)
    said = truth(
        {k: v for k, v in foreign.config.items() if v is not None}, _FACTORS[0], False, where
    )
    if held is None:  # SAELens takes the switch for off then
        return None
    (factor,) = take({held: foreign.tensors[held]}, (held,), where)
    if factor.shape != weights.b_enc.shape or not bool(factor.isfinite().all()):
        raise UserError(f"{where}: tensor {held} is not one finite number per latent")
    if bool((factor == 1).all()):
        return None
    if not said:
        raise UserError(
            f"{where}: tensor {held} is there and {_FACTORS[0]} is not true in {CONFIG}"
        )
    return factor


def _understand(foreign: Foreign, weights: NamedTensors, where: str) -> Meaning:
    config = _settings(foreign.config, where)
    factor = _factor(foreign, weights, where)
    if not truth(config, "apply_b_dec_to_input", True, where) and not _transcoder(config):
        weights = centred(weights)
    match _architecture(config, where):
        case "topk":
            if truth(config, "rescale_acts_by_decoder_norm", False, where):
                weights = unit_rows(weights)
            activation: dict[str, Any] = {"kind": "topk", "k": whole(config, "k", where)}
        case "jumprelu" | "gated":
            activation = {"kind": "jumprelu"}
        case _:
            activation = {"kind": "relu"}
    if factor is not None:
        weights = weights._replace(W_dec=weights.W_dec * factor[:, None])
    if foreign.scale is not None and _transcoder(config):  # neither output nor skip is scaled there
        weights = weights._replace(W_enc=(weights.W_enc.double() * foreign.scale).float())
    elif foreign.scale is not None:
        weights = rescaled(weights, foreign.scale)
    how = _normalised(foreign.config)
    norm = str(how) if how in _BY_ROW else None
    return Meaning(weights, activation, _transcoder(config), norm)


def _about(foreign: Foreign) -> Provenance:
    config = _settings(foreign.config, CONFIG)
    found = foreign.config.get("metadata")
    meta = {key: config[key] for key in _META if key in config} | (
        found if isinstance(found, dict) else {}
    )
    notes = [*check_keys(_renamed(foreign.config), _KEYS, CONFIG)]
    if foreign.scale is not None:
        notes.append(f"scaling_factor {foreign.scale:g} is folded into the weights")
    if maybe(meta, "model_from_pretrained_kwargs", dict):
        notes.append(
            f"trained on a model loaded with {meta['model_from_pretrained_kwargs']}, whose activations may differ from "
            "those of the model as it is"
        )
    if maybe(meta, "hook_head_index", int) is not None:
        notes.append(f"trained on head {meta['hook_head_index']} of its hook alone")
    origin = {"format": "saelens", **plain(foreign.config), **plain(meta)}
    return provenance("saelens", meta, _KNOWN, notes).model_copy(update={"origin": origin})


def _pack(sae: SAE, about: Provenance) -> Foreign:
    activation = sae.cfg.activation
    kind = _architecture_of(sae)
    if kind is None:
        what = f"a transcoder of {activation.kind}" if sae.cfg.transcoder else activation.kind
        raise NoEqual(f"activation {what} has no equal in SAELens")
    weights = named(sae, by_row=True)
    config: dict[str, Any] = {"d_in": sae.cfg.d_in, "d_sae": sae.cfg.d_sae}
    if sae.cfg.transcoder:
        config["d_out"] = sae.cfg.d_out
    applied = not sae.cfg.transcoder
    config |= {"dtype": "float32", "device": "cpu", "apply_b_dec_to_input": applied}
    config |= {"normalize_activations": sae.cfg.input_norm or "none", "reshape_activations": "none"}
    if isinstance(activation, TopK):
        config |= {"k": activation.k, "rescale_acts_by_decoder_norm": False}
    config |= {"metadata": _metadata(activation.kind, about), "architecture": kind}
    tensors = {name: getattr(weights, name) for name in _TENSORS}
    if weights.W_skip is not None:
        tensors["W_skip"] = weights.W_skip
    if not isinstance(activation, TopK | ReLU):
        assert weights.threshold is not None
        tensors["threshold"] = weights.threshold.expand(sae.cfg.d_sae)
    return Foreign(config, tensors)


def _architecture_of(sae: SAE) -> str | None:
    """Return SAELens' name of what an SAE is; None where it has none."""
    kind = _ARCHITECTURES.get(sae.cfg.activation.kind)
    if not sae.cfg.transcoder:
        return kind
    named = {"standard": "", "jumprelu": "jumprelu_"}.get(kind or "")
    return None if named is None else f"{named}{'skip_' if sae.cfg.skip else ''}transcoder"


def _metadata(kind: str, about: Provenance) -> dict[str, Any]:
    hook = hook_name(about.hook) if about.hook else None
    known = {theirs: getattr(about, ours) for ours, theirs in _KNOWN.items()}
    known |= {"hook_name": hook and hook.name, "hook_layer": hook and hook.layer}
    known["hook_name_out"] = hook_name(about.hook_out).name if about.hook_out else None
    known |= dict(zip(_OURS, (about.hook, about.wsae_version), strict=True))
    return {
        "sae_lens_version": VERSION,
        "sae_lens_training_version": None,
        "training_architecture": kind,
        **{key: known[key] for key in (*_META, *_OURS) if known.get(key) is not None},
    }


SAELENS = Format(
    "saelens",
    (CONFIG, WEIGHTS),
    *(_read, _rename, _understand, _about, _pack),
    "from sae_lens import SAE; SAE.load_from_disk({path!r})",
)
