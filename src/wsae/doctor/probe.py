"""A short look: a few sequences of the text through the model, timed, with every position kept."""

import itertools
import time
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from wsae.acts.capture import Capture
from wsae.acts.config import HarvestConfig
from wsae.acts.hookpoints import HookPoint
from wsae.acts.language import LanguageModel
from wsae.acts.packing import Packer
from wsae.acts.skip import KEPT, SkipRule
from wsae.acts.text import Reading, Repeats, documents, is_heldout, told
from wsae.core.errors import UserError

TEXT_SECONDS = 2.0
"""Time spent reading a text to estimate its tokens."""
SAMPLE_CHARS = 100_000
"""Characters tokenised to learn how many a token has."""


class Probe(NamedTuple):
    """What a short look at a model gave."""

    x: dict[str, Float[Tensor, "batch seq d_in"]]
    kept: Bool[Tensor, "batch seq"]
    """Rows the harvest would keep."""
    tokens_per_s: float
    """Speed of the forward pass, stopped at the deepest hook."""

    def rows(self, hook: str) -> Float[Tensor, "rows d_in"]:
        """Return the kept rows of a hook."""
        return self.x[hook][self.kept]


class TextSize(NamedTuple):
    """How much text there is: tokens for training (at least), whether it was read to its end, and what was left out."""

    tokens: int
    whole: bool
    told: list[str]


def probe_model(
    cfg: HarvestConfig, language: LanguageModel, hooks: list[HookPoint], n_seqs: int
) -> Probe:
    """Run `n_seqs` training sequences; raises UserError when the text has none."""
    packer = Packer(cfg, language.tokenizer, heldout=False)
    batch = list(itertools.islice(packer.sequences(), n_seqs))
    if not batch:
        raise UserError(f"text {cfg.text.path}: no text for training in it; give more documents")
    ids = torch.from_numpy(np.stack([s.ids for s in batch])).long()
    mask = torch.arange(ids.shape[1]) < torch.tensor([s.length for s in batch])[:, None]
    capture = Capture(language.model, hooks)
    where = language.device
    capture(ids[:1].to(where), mask[:1].to(where))  # the first pass pays for set-up
    start = time.perf_counter()
    x = {
        hook: value.float().cpu() for hook, value in capture(ids.to(where), mask.to(where)).items()
    }
    speed = ids.numel() / (time.perf_counter() - start)
    return Probe(x, _kept(cfg, language, ids, mask, x), speed)


def _kept(
    cfg: HarvestConfig, language: LanguageModel, ids: Tensor, mask: Tensor, x: dict[str, Tensor]
) -> Bool[Tensor, "batch seq"]:
    rule = SkipRule(cfg, language.tokenizer.all_special_ids)
    reasons = rule.by_token(ids, mask).flatten()
    norms = {hook: value.flatten(0, 1).norm(dim=1).nan_to_num(0.0) for hook, value in x.items()}
    rule.calibrate(norms, reasons)
    return (rule.by_norm(norms, reasons) == KEPT).view(ids.shape)


def text_size(
    cfg: HarvestConfig, language: LanguageModel, seconds: float = TEXT_SECONDS
) -> TextSize:
    """Estimate the training tokens of the text, reading it for at most `seconds`."""
    end = time.monotonic() + seconds
    chars, given, sample, taken, whole = 0, 0, [], 0, True
    reading, repeats = Reading(), Repeats()
    for document in documents(cfg.text, reading=reading):
        chars += len(document.text)
        given += 0 if document.ids is None else len(document.ids)
        if document.text and taken < SAMPLE_CHARS:
            sample.append(document.text[:SAMPLE_CHARS])
            taken += len(sample[-1])
        repeats.add(document, is_heldout(document.index, cfg.seed, cfg.heldout_fraction))
        if time.monotonic() > end:
            whole = False
            break
    lines = told({**reading.info(), "repeated": repeats.info()})
    if taken:
        tokens = sum(len(ids) for ids in language.tokenizer(sample, verbose=False)["input_ids"])
        given += int(chars * tokens / taken)
    return TextSize(int(given * (1 - cfg.heldout_fraction)), whole, lines)


def adds_bos(language: LanguageModel) -> str | None:
    """Return the begin-of-text token that the tokenizer puts before any text, or None."""
    tokenizer = language.tokenizer
    ids = tokenizer("a", verbose=False)["input_ids"]
    bos = tokenizer.bos_token_id
    return str(tokenizer.bos_token) if bos is not None and ids and ids[0] == bos else None
