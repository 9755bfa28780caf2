"""What the preset tiny makes for itself: a language model of random weights with a tokenizer, and a text encoder.

Its latents mean little; it is there to try every stage from the model to the table, in seconds and offline.
"""

import itertools
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from wsae.acts.config import TextConfig
from wsae.acts.text import documents
from wsae.core.artifact import read_manifest, write_manifest
from wsae.core.hub import quiet_hub
from wsae.core.progress import Progress, quiet

WIDTH, LAYERS, VOCABULARY = 32, 2, 512
_DOCUMENTS = 200
"""Documents the tokenizer is trained on."""
READY = "tiny-model"


def tiny_model(place: Path, seed: int = 0) -> Path:
    """Write a GPT-NeoX model (as Pythia) of random weights with a tokenizer to `place`, unless it is there."""
    if place.exists() and (place / "manifest.json").exists():
        read_manifest(place, READY)
        return place
    shutil.rmtree(place, ignore_errors=True)  # what a killed command left
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    tokenizer = _tokenizer()
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=4 * WIDTH,
        max_position_embeddings=256,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPTNeoXForCausalLM(config)
    with quiet_hub():
        model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    files = [path.name for path in place.iterdir() if path.is_file()]
    write_manifest(place, READY, {"seed": seed, "width": WIDTH, "layers": LAYERS}, files)
    return place


def _tokenizer():  # transformers' class, which may be missing at import time
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (document.text for document in itertools.islice(documents(TextConfig()), _DOCUMENTS))
    raw.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|endoftext|>")


class BagEncoder:
    """Texts as unit vectors of hashed character trigrams: a sentence encoder that needs no package and no download."""

    name = "hashed trigrams"
    DIM = 256

    def encode(
        self,
        texts: Sequence[str],
        progress: Progress = quiet,  # noqa: ARG002
    ) -> Float32[np.ndarray, "texts dim"]:
        """Return one row per text: v = sum of e_hash(trigram), v / |v|; NaN for a text without trigrams."""
        out = np.zeros((len(texts), self.DIM), dtype=np.float32)
        for row, text in zip(out, texts, strict=True):
            for start in range(len(text) - 2):
                row[zlib.crc32(text[start : start + 3].encode()) % self.DIM] += 1
        norm = np.linalg.norm(out, axis=1, keepdims=True)
        return np.where(norm > 0, out / np.maximum(norm, 1), np.nan).astype(np.float32)
