"""GGUF files: dequantised once, then read as safetensors from the cache (`wsae.core.cache`)."""

import contextlib
import functools
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from wsae.core.cache import cached
from wsae.core.errors import UserError, named, reason
from wsae.core.files import read_json, sha256_file, write_json
from wsae.core.hub import quiet_hub

_log = logging.getLogger(__name__)
_UNUSED = "unused.json"
"""In a copy: the names of the file's tensors that the model has no place for."""
_CHECKED = 2
"""Goes up when a copy must be made again: copies of the first kind hold random numbers for weights that were absent."""
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def dequantised(path: Path) -> Path:
    """Return a model directory with the float32 weights and tokenizer of a GGUF file, made at the first call.

    The cache key is the file's SHA-256 and size and the version of the library that reads it; a copy that was damaged
    or is not this user's is made again. Raises UserError when the file is not readable GGUF, lacks weights or is a part
    of a split one, or nothing can be written.
    """
    refuse_parts([path])
    key = f"{sha256_file(path)[:16]}-{path.stat().st_size}-{transformers.__version__}-{_CHECKED}"
    target = _copy(path, key)
    if unused := read_json(target / _UNUSED):
        _log.warning("note: model %s: in this file but not used: %s", path, named(unused))
    return target


def refuse_parts(files: Sequence[Path]) -> None:
    """Raise UserError when a file is named as a part of a split GGUF file."""
    found = _PART.fullmatch(files[0].name)
    if not found:
        return
    whole, parts = found[1], int(found[3])
    folder = files[0].parent
    names = [f"{whole}-{i:05d}-of-{parts:05d}.gguf" for i in range(1, parts + 1)]
    absent = [name for name in names if not (folder / name).is_file()]
    fetch = f"fetch the rest ({named(absent)}), then " if absent else ""
    raise UserError(
        f"model {files[0]}: one of {parts} parts of a model; {fetch}merge them: "
        f"llama-gguf-split --merge {folder / names[0]} {folder / whole}.gguf"
    )


def _refuse_part(path: Path, reader: Any) -> None:
    """Raise UserError when a file says that it is a part of a split one, whatever its name."""
    field = reader.fields.get("split.count")
    parts = int(field.contents()) if field else 1
    if parts > 1:
        raise UserError(
            f"model {path}: one of {parts} parts of a model; give all their names back "
            f"(NAME-00001-of-{parts:05d}.gguf) and merge them with llama-gguf-split --merge"
        )


def _unused(reader: Any, model: PreTrainedModel) -> list[str]:
    """Return the file's tensors that the model has no place for; experts, which are renamed, are not looked at."""
    from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map

    known = get_gguf_hf_weights_map(model, TensorProcessor())
    names = (tensor.name for tensor in reader.tensors)
    return [n for n in names if n not in known and "_exps" not in n and not n.startswith("rope_")]


def _copy(path: Path, key: str) -> Path:
    try:
        return cached("gguf", key, functools.partial(_convert, path))
    except OSError as error:
        place = error.filename or "a temporary folder"
        raise UserError(
            f"{place}: cannot write the dequantised model ({error.strerror}); set WSAE_CACHE"
        ) from error


@contextlib.contextmanager
def _no_conversion_bar() -> Iterator[None]:
    """Disable the one progress bar that the library's own switch does not reach."""
    from transformers import modeling_gguf_pytorch_utils as module

    shown = module.tqdm
    module.tqdm = functools.partial(shown, disable=True)
    try:
        yield
    finally:
        module.tqdm = shown


def _convert(path: Path, scratch: Path) -> None:
    _log.info("dequantising %s (once)", path)
    from transformers import GgufConfig

    folder, name = str(path.parent), path.name
    try:
        from gguf import GGUFReader

        reader = GGUFReader(path)
        _refuse_part(path, reader)
        with quiet_hub(), _no_conversion_bar():
            options = {"gguf_file": name, "local_files_only": True, "trust_remote_code": False}
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
                output_loading_info=True,
                **options,
            )
            model, info = loaded
            missing = sorted(info["missing_keys"])
            if missing:
                raise UserError(
                    f"model {path}: {len(missing):,} of the model's weights are not in this file ({named(missing)}); "
                    "get the whole file"
                )
            write_json(scratch / _UNUSED, _unused(reader, model))
            model.config.__dict__.pop("quantization_config", None)
            tokenizer.save_pretrained(scratch)
            model.save_pretrained(scratch)
    except UserError:
        raise
    except ImportError as error:
        raise UserError(
            f"model {path}: GGUF needs the packages gguf and accelerate; pip install 'wsae[lm]'"
        ) from error
    except OSError as error:
        if error.errno is None:  # the library's own "no such file in this repository"
            raise UserError(f"model {path}: not a readable GGUF model ({reason(error)})") from error
        raise
    except Exception as error:  # a damaged file fails in many ways somewhere inside
        raise UserError(f"model {path}: not a readable GGUF model ({reason(error)})") from error
