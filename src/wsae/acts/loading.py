"""Weights from a model's files: what they do not hold is named, and never stands in silently as random numbers.

The hub's library fills a weight that is not in the files with random values. Here such a weight becomes NaN, which goes
through every operation: whatever depends on it is found, and refused, by its NaN.
"""

import logging
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wsae.core.errors import UserError, named, reason
from wsae.core.hub import hub_reachable

_log = logging.getLogger(__name__)

_WRAPPERS = {
    "_orig_mod.": " (torch.compile's ._orig_mod)",
    "_fsdp_wrapped_module.": " (FSDP's full state dict)",
    "_checkpoint_wrapped_module.": " (without activation checkpointing)",
    "base_model.model.": " (peft's merge_and_unload())",
    "module.": " (DataParallel's .module)",
}
"""What modules around a model put into the names of its weights, and where the model is in them."""
_COMPUTED = ("inv_freq", "position_ids", "num_batches_tracked")
"""Tensors that are computed or only counted: old and new files differ in whether they hold them."""


def from_pretrained(kind: Any, source: Path | str, model: str, **options: Any) -> Any:
    """Return `kind.from_pretrained` without running code that comes with a model; UserError names `model`."""
    offline = isinstance(source, Path) or not hub_reachable()
    try:
        return kind.from_pretrained(
            str(source), local_files_only=offline, trust_remote_code=False, **options
        )
    except ImportError as error:
        raise UserError(
            f"model {model}: needs a package that is not installed ({reason(error)})"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # OSError, ValueError, KeyError, SafetensorError, hub errors, ...
        local = isinstance(source, Path)
        what = "its files" if local else "it (no such directory, so taken as a hub id)"
        raise UserError(f"model {model}: cannot load {what}: {_cause(error, source)}") from error


def _cause(error: Exception, source: Path | str) -> str:
    """Return why a model cannot be loaded, where the library advises what is not to be had here in our own words."""
    text = reason(error)
    if "trust_remote_code" in text:
        return "it comes with Python code of its own, which is never run here"
    if "Weights only load failed" in text:
        return "its .bin file holds other objects than tensors, which are not unpickled; save it as safetensors"
    if "backend tokenizer" in text:
        return (
            "its tokenizer lacks files, or needs sentencepiece or tiktoken to be read; save it as tokenizer.json: "
            "transformers.AutoTokenizer.from_pretrained(ORIGINAL).save_pretrained(FOLDER)"
        )
    if "no file named" in text and isinstance(source, Path):
        others = sorted(
            file.name for end in ("safetensors", "bin") for file in source.glob(f"*.{end}")
        )
        beside = f"; it holds {named(others)}" if others else ""
        return f"no model.safetensors (or model.safetensors.index.json) or pytorch_model.bin is there{beside}"
    for frame, _ in traceback.walk_tb(error.__traceback__):  # the library only logs which they are
        broken = getattr(frame.f_locals.get("loading_info"), "conversion_errors", None)
        if broken:
            return (
                f"parts of {named(sorted(broken))} are absent or damaged; get the whole checkpoint"
            )
    return text


def load_weights(kind: Any, source: Path | str, model: str, **options: Any) -> Any:
    """Return `kind.from_pretrained`; every weight that its files do not hold, or in another shape, is NaN.

    Weights in the files that have no place in the model are told of. Raises UserError as `from_pretrained` does, where
    the names in the files show that they were saved from something around the model, and where no weight is in them.
    """
    loaded, info = from_pretrained(
        kind, source, model, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    shapes = {key: (list(there), list(here)) for key, there, here in info["mismatched_keys"]}
    missing = _trained({*info["missing_keys"], *shapes})
    unexpected = _trained(set(info["unexpected_keys"]))
    _refuse_renamed(missing, unexpected, model)
    if missing and {name for name, _ in loaded.named_parameters()} <= set(missing):
        is_training = {"state_dict", "model_state_dict", "model"} & set(unexpected)
        other = "config.json is of another model"
        if is_training:
            other = "it is the checkpoint of a training, save the model alone"
        raise UserError(
            f"model {model}: none of its weights is in its files ({named(missing)}), which hold "
            f"{named(unexpected) if unexpected else 'other shapes'}: {other}"
        )
    _poison(loaded, missing, model)
    if shapes:
        wrong = [f"{key} {there}, not {here}" for key, (there, here) in sorted(shapes.items())]
        _log.warning("note: model %s: of another shape in its files: %s", model, named(wrong))
    if unexpected:
        _log.warning(
            "note: model %s: in its files but not used, as its class %s has no place for them: %s",
            *(model, type(loaded).__name__, named(unexpected)),
        )
    return loaded


def tell_unloaded(loaded: nn.Module, model: str) -> tuple[str, ...]:
    """Return the weights of a model that are NaN because its files do not hold them, and tell of them."""
    names = unloaded(loaded)
    if names:
        _log.warning(
            "note: model %s: not in its files, or of another shape there: %s; what depends on these weights is refused",
            *(model, named(names)),
        )
    return tuple(names)


def unloaded(model: nn.Module) -> list[str]:
    """Return the names of the weights that are NaN throughout, as loading leaves those that the files do not hold.

    Weights that accelerate keeps elsewhere until they are needed are not looked at.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [
        name
        for name, x in tensors
        if x.is_floating_point()
        and not x.is_meta
        and x.numel()
        and bool(x.flatten()[0].isnan() and x.isnan().all())
    ]


def refuse_unloaded(model: nn.Module, output: object, what: str) -> None:
    """Raise UserError when an output of the model is NaN because of weights that its files do not hold."""
    first = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(first, Tensor) or not bool(first.isnan().any()):
        return
    names = unloaded(model)
    if names:
        raise UserError(
            f"{what}: depends on weights that are not in the model's files, or of another shape there "
            f"({named(names)}); get the whole checkpoint, or read a module that does not depend on them"
        )


def input_device(model: nn.Module) -> torch.device:
    """Return where a model's token ids must be: where its first weights are, or are brought when they are needed."""
    get = getattr(model, "get_input_embeddings", None)
    table: Any = get() if callable(get) else model
    device = next(table.parameters()).device
    moved = getattr(table, "_hf_hook", None) if device.type == "meta" else None
    return device if moved is None else torch.device(moved.execution_device)


PREDICTS_NOTHING = "this model predicts no tokens; cross-entropy and KL are not measured"


@torch.inference_mode()
def predictions(model: nn.Module) -> Tensor | None:
    """Return a model's logits [1, 2, vocabulary] for two tokens, none where it gives none at each of them."""
    ids = torch.zeros(1, 2, dtype=torch.long, device=input_device(model))
    logits = getattr(model(input_ids=ids, use_cache=False), "logits", None)
    good = isinstance(logits, Tensor) and logits.ndim == 3 and logits.shape[1] == 2
    return logits if good else None


def refuse_without_logits(model: nn.Module) -> None:
    """Raise UserError when a model gives no logits at each token of a text, or not by weights from its files."""
    logits = predictions(model)
    if logits is None:
        kind = type(model).__name__
        raise UserError(f"the model's class {kind} predicts no tokens; use a causal language model")
    refuse_unloaded(
        model, logits, "the model's predictions (evaluate does without them: --splice-tokens 0)"
    )


def refuse_unable_to_continue(model: nn.Module) -> None:
    """Raise UserError when a model cannot continue a text token by token: an encoder, or one without its weights."""
    refuse_without_logits(model)
    if not getattr(model, "can_generate", lambda: True)():
        raise UserError(
            f"the model's class {type(model).__name__} continues no text; use a causal language model"
        )


def _trained(names: set[str]) -> list[str]:
    return sorted(name for name in names if not name.endswith(_COMPUTED))


@torch.no_grad()
def _poison(loaded: Any, missing: Sequence[str], model: str) -> None:
    for name in missing:
        owner = loaded.get_submodule(name.rpartition(".")[0])
        if "Sinusoidal" in type(owner).__name__:  # computed, and rightly so
            continue
        tensor = loaded.get_parameter_or_buffer(name)
        if not tensor.is_floating_point():
            raise UserError(f"model {model}: its files lack {name}; get the whole checkpoint")
        tensor.fill_(torch.nan)


def _refuse_renamed(missing: Sequence[str], unexpected: Sequence[str], model: str) -> None:
    """Raise UserError when missing weights are in the files under names that a wrapper or an adapter gave them."""
    adapters = [key for key in unexpected if "lora_" in key or ".base_layer." in key]
    if adapters:
        raise UserError(
            f"model {model}: its files hold an adapter that is not merged ({named(adapters)}); load it with peft and "
            "save it with model.merge_and_unload().save_pretrained(FOLDER)"
        )
    # a file of the model without its head lacks the first part of a name, too
    wanted = {*missing, *(name.partition(".")[2] for name in missing)}
    wrapped = [key for key in unexpected if _bare(key) != key and _bare(key) in wanted]
    mark = next((mark for mark in _WRAPPERS if wrapped and mark in wrapped[0]), "")
    mark = mark or _prefix(missing, unexpected)
    if mark:
        keys = wrapped or unexpected
        place = "begin with" if keys[0].startswith(mark) else "contain"
        raise UserError(
            f"model {model}: {len(missing):,} of its weights are not in its files, whose keys {place} '{mark}' "
            f"({named(keys)}); save the unwrapped model{_WRAPPERS.get(mark, '')}"
        )


def _bare(key: str) -> str:
    for mark in _WRAPPERS:
        key = key.replace(mark, "")
    return key


def _prefix(missing: Sequence[str], unexpected: Sequence[str]) -> str:
    """Return what stands before the names of most of the missing weights in the files, or nothing."""
    there = set(unexpected)
    for key in unexpected[:20]:
        parts = key.split(".")
        for cut in range(1, len(parts)):
            prefix = ".".join(parts[:cut]) + "."
            if 2 * sum(prefix + name in there for name in missing) > len(missing):
                return prefix
    return ""
