"""Tiny models with tokenizers in a local directory, and texts for them (no network, made in seconds)."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from wsae.acts.capture import tokens
from wsae.acts.config import HarvestConfig, TextConfig
from wsae.acts.hookpoints import HookPoint, probe

SENTENCE = "the cat sat on a mat and saw two dogs run over green hills while rain fell all day"
WORDS = SENTENCE.split()
WIDTH, LAYERS = 16, 3
VOCABULARY = 50
"""Of models without a tokenizer."""


def make_text(path: Path, documents: int = 60, seed: int = 0) -> Path:
    """Write random sentences of 5 to 60 words as JSONL."""
    rng = random.Random(seed)
    rows = [" ".join(rng.choices(WORDS, k=rng.randint(5, 60))) for _ in range(documents)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


def make_model(path: Path, kind: str = "llama", bos: bool = False, positions: int = 128) -> Path:
    """Save a tiny model of the kind and a byte-level tokenizer trained on the words."""
    tokenizer = make_tokenizer(bos)
    size = {"vocab_size": len(tokenizer), "hidden_size": WIDTH, "num_hidden_layers": LAYERS}
    torch.manual_seed(0)
    if kind == "llama":
        config = LlamaConfig(
            **size, intermediate_size=32, num_attention_heads=2, max_position_embeddings=positions
        )
        model = LlamaForCausalLM(config)
    else:
        config = GPTNeoXConfig(
            **size, intermediate_size=32, num_attention_heads=2, max_position_embeddings=positions
        )
        model = GPTNeoXForCausalLM(config)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def untrained(kind: type, config: type, layers: int = 2, **more: object) -> nn.Module:
    """Return a tiny frozen model with weights large enough that its logits differ from token to token."""
    torch.manual_seed(0)
    made = config(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=layers,
        intermediate_size=32,
        num_attention_heads=2,
        initializer_range=0.5,
        **more,
    )
    return kind(made).eval().requires_grad_(False)


def make_bert(path: Path) -> Path:
    """Save a tiny model that sees later tokens, with the same tokenizer."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = tf.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    tf.BertForMaskedLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def make_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """Train a byte-level tokenizer; `bos` makes it put <s> before every text."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([" ".join(WORDS)] * 20, trainer)
    if bos:
        raw.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def rewritten(path: Path, change: Callable[[dict], dict]) -> Path:
    """Change the tensors in a saved model's file."""
    file = path / "model.safetensors"
    changed = {key: x.clone() for key, x in change(load_file(file)).items()}
    save_file(changed, file, metadata={"format": "pt"})
    return path


def reconfigured(path: Path, **values: object) -> Path:
    """Change a saved model's config."""
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return path


_SMALL: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2}
_SMALL |= {"num_attention_heads": 2}
_TEXT: dict[str, Any] = {"vocab_size": 320, **_SMALL}
_IMAGES: dict[str, Any] = {**_SMALL, "image_size": 28, "patch_size": 14}
_BOTH: dict[str, Any] = {
    "encoder_layers": 2,
    "decoder_layers": 1,
    "d_model": WIDTH,
    "vocab_size": 320,
}
_BOTH |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
_BOTH |= {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
_WHISPER: dict[str, Any] = dict.fromkeys(("max_source_positions", "max_target_positions"), 9)
_WHISPER |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
KINDS: dict[str, Callable[[], tf.PreTrainedModel]] = {
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=320, d_model=WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    ),
    "bart": lambda: tf.BartForConditionalGeneration(tf.BartConfig(**_BOTH)),
    "bert": lambda: tf.BertModel(tf.BertConfig(**_TEXT)),
    "modernbert": lambda: tf.ModernBertForMaskedLM(
        tf.ModernBertConfig(**_TEXT, pad_token_id=2, bos_token_id=0, eos_token_id=1)
    ),
    "llava": lambda: tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(
            text_config=LlamaConfig(**_TEXT), vision_config=tf.CLIPVisionConfig(**_IMAGES)
        )
    ),
    "clip": lambda: tf.CLIPModel(tf.CLIPConfig(text_config=_TEXT, vision_config=_IMAGES)),
    "mixtral": lambda: tf.MixtralForCausalLM(
        tf.MixtralConfig(**_TEXT, num_key_value_heads=2, num_local_experts=3)
    ),
    "vit": lambda: tf.ViTModel(tf.ViTConfig(**_IMAGES)),
    "whisper": lambda: tf.WhisperForConditionalGeneration(
        tf.WhisperConfig(**_BOTH, num_mel_bins=8, **_WHISPER)
    ),
}
"""Tiny models of other kinds than causal language models, by their name in the hub's library."""


def make_kind(path: Path, kind: str) -> Path:
    """Save a tiny model of one of `KINDS` and a tokenizer."""
    torch.manual_seed(0)
    KINDS[kind]().save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def make_gguf(path: Path, without: str = "-", more: str = "", parts: int = 1) -> Path:
    """Write a tiny Llama as GGUF without the tensors whose names hold `without`, with one named `more`."""
    import gguf

    words = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "th"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(2)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3, 3] + [1] * (len(words) - 2))
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    if parts > 1:
        writer.add_uint16("split.count", parts)
    shapes = {
        "token_embd": (len(words), WIDTH),
        "output_norm": (WIDTH,),
        "output": (len(words), WIDTH),
    }
    for block in ("blk.0.", "blk.1."):
        shapes |= {f"{block}{name}_norm": (WIDTH,) for name in ("attn", "ffn")}
        shapes |= {f"{block}attn_{name}": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")}
        shapes |= {f"{block}ffn_{name}": (32, WIDTH) for name in ("gate", "up")}
        shapes[f"{block}ffn_down"] = (WIDTH, 32)
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        if without not in name:
            writer.add_tensor(f"{name}.weight", rng.normal(size=shape).astype(np.float32))
    if more:
        writer.add_tensor(more, np.zeros(WIDTH, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def some_ids(batch=2, seq=7) -> torch.Tensor:
    """Return random ids of the tokenizer's."""
    return torch.randint(3, 90, (batch, seq), generator=torch.Generator().manual_seed(0))


def hooks_of(model: nn.Module, patterns: list[str]) -> list[HookPoint]:
    """Return the hook points that the patterns name in a language model."""
    return probe(model, patterns, tokens()).hooks


def config(text: str, **values) -> HarvestConfig:
    """Return the settings of a harvest of short sequences of a text."""
    values = {"seq_len": 16, "heldout_fraction": 0.2, **values}
    return HarvestConfig(model="unused", text=TextConfig(path=text), **values)
