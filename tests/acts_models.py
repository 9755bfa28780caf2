"""Tiny models with tokenizers in a local directory, and texts for them (no network, made in seconds)."""

import json
import random
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

SENTENCE = "the cat sat on a mat and saw two dogs run over green hills while rain fell all day"
WORDS = SENTENCE.split()
WIDTH, LAYERS = 16, 3


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


def make_bert(path: Path) -> Path:
    """Save a tiny model that sees later tokens, with the same tokenizer."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    transformers.BertForMaskedLM(config).save_pretrained(path)
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
