"""GGUF files: dequantised once, then read as safetensors from the cache (`wsae.core.cache`)."""

import contextlib
import functools
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from wsae.core.cache import cached
from wsae.core.errors import UserError
from wsae.core.files import sha256_file
from wsae.core.hub import quiet_hub

_log = logging.getLogger(__name__)


def dequantised(path: Path) -> Path:
    """Return a model directory with the float32 weights and tokenizer of a GGUF file, made at the first call.

    The cache key is the file's SHA-256 and size and the version of the library that reads it; a copy that was damaged
    or is not this user's is made again. Raises UserError when the file is not readable GGUF, or nothing can be written.
    """
    key = f"{sha256_file(path)[:16]}-{path.stat().st_size}-{transformers.__version__}"
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
        with quiet_hub(), _no_conversion_bar():
            options = {"gguf_file": name, "local_files_only": True, "trust_remote_code": False}
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
                **options,
            )
            model.config.__dict__.pop("quantization_config", None)
            tokenizer.save_pretrained(scratch)
            model.save_pretrained(scratch)
    except ImportError as error:
        raise UserError(
            f"model {path}: GGUF needs the packages gguf and accelerate; pip install 'wsae[lm]'"
        ) from error
    except OSError as error:
        if error.errno is None:  # the library's own "no such file in this repository"
            raise UserError(f"model {path}: not a readable GGUF model ({_first(error)})") from error
        raise
    except Exception as error:  # a damaged file fails in many ways somewhere inside
        raise UserError(f"model {path}: not a readable GGUF model ({_first(error)})") from error


def _first(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
