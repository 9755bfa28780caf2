"""A text typed by a visitor: which latents fire on which token. One model and one SAE at a time, loaded when asked.

Texts are read one after the other in a thread of their own, which leaves a core and the right of way to the pages; few
may wait.
"""

import os
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from wsae.core.errors import UserError
from wsae.report.rundata import Json
from wsae.serve.index import Index, Member
from wsae.serve.job import weights_digest
from wsae.serve.model import load
from wsae.serve.schema import key_of
from wsae.serve.served import CHANGED, Served
from wsae.serve.views import latent_link

if TYPE_CHECKING:
    from wsae.acts.capture import Capture
    from wsae.acts.language import LanguageModel
    from wsae.sae import SparseAutoencoder

MAX_CHARS, MAX_TOKENS = 2000, 256
PER_TOKEN, OVERALL = 8, 24
PLACES = 3
"""Texts that are read or wait at once."""


class Token(NamedTuple):
    """One token of the text and the latents that fire on it, strongest first: (latent, activation)."""

    text: str
    latents: list[tuple[int, float]]


class BusyError(UserError):
    """Too many others are being served."""


class Live:
    """The model and SAE last asked for, and the thread that reads with them."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self._thread = ThreadPoolExecutor(1, "live", _give_way)
        self._places = threading.BoundedSemaphore(PLACES)
        self._model: tuple[str, LanguageModel] | None = None
        self._probed: tuple[LanguageModel, str, Capture] | None = None
        self._sae: tuple[tuple[Path, str], SparseAutoencoder] | None = None

    def submit(self, run: Served, member: Member, text: str) -> Future[Json]:
        """Have a text read: its tokens with their latents, and the latents of the whole text.

        Raises UserError when the text is empty or too long, or the model is not at hand, BusyError when others wait.
        """
        index = run.index
        check(text)
        if index.model["why_not"]:
            raise UserError(f"no live reading: {index.model['why_not']}")
        if not member.weights:
            raise UserError(f"no live reading: the run keeps no weights of {member.name}")
        if not self._places.acquire(blocking=False):
            raise BusyError("others are having texts read; try again in a moment")
        try:
            reading = self._thread.submit(self._read, run, member, text)
        except BaseException:
            self._places.release()
            raise
        reading.add_done_callback(lambda _: self._places.release())
        return reading

    def _read(self, run: Served, member: Member, text: str) -> Json:
        tokens = self._tokens(run.path, run.index.model["name"], member, text)
        return {
            "member": member.slug,
            "tokens": [{"text": t.text, "latents": t.latents} for t in tokens],
            "latents": _overall((run.base, run.index, member), tokens),
        }

    def _tokens(self, path: Path, name: str, member: Member, text: str) -> list[Token]:
        import torch

        from wsae.acts.decoding import decode_table
        from wsae.acts.packing import automatic_bos
        from wsae.acts.tokens import joined

        language, sae = self._language(name), self._member(path, member)
        body = language.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if not body:
            raise UserError("text: holds no tokens")
        if len(body) > MAX_TOKENS:
            raise UserError(f"text: {len(body)} tokens, at most {MAX_TOKENS} are read")
        ids = [*automatic_bos(language.tokenizer), *body]
        capture = self._capture(language, member.hook)
        x = next(iter(capture(torch.tensor([ids], device=language.device)).values()))[0]
        with torch.inference_mode():  # what was captured may enter no gradient
            z = sae.encode(x.float().to(sae.W_dec.device)).cpu()
        strongest = z.topk(min(PER_TOKEN, z.shape[1]), dim=1)
        texts = decode_table(language.tokenizer, sorted(set(ids)))
        shown = joined([texts[i] for i in ids])
        found = zip(shown, strongest.indices.tolist(), strongest.values.tolist(), strict=True)
        return [
            Token(text, [(j, v) for j, v in zip(js, vs, strict=True) if v > 0])
            for text, js, vs in found
        ]

    def _capture(self, language: "LanguageModel", hook: str) -> "Capture":
        """Return what reads a hook; it is probed once."""
        from wsae.acts.capture import Capture
        from wsae.acts.hookpoints import probe
        from wsae.acts.layout import tokens

        if self._probed is None or self._probed[:2] != (language, hook):
            found = Capture(language.model, probe(language.model, [hook], tokens()).hooks)
            self._probed = (language, hook, found)
        return self._probed[2]

    def _language(self, name: str) -> "LanguageModel":
        if self._model is None or self._model[0] != name:
            self._model = self._probed = None  # before the next is loaded: one is held at a time
            self._model = (name, load(name, self.device))
        return self._model[1]

    def _member(self, path: Path, member: Member) -> "SparseAutoencoder":
        from wsae.sae import SparseAutoencoder

        wanted = (path, f"{member.hook}|{member.name}|{member.weights}")
        if self._sae is None or self._sae[0] != wanted:
            self._sae = None
            place = path / "members" / member.hook / member.name
            if not place.resolve().is_relative_to(path.resolve()):
                raise UserError(f"{member.name}: its weights lie outside the run")
            if weights_digest(place) != member.weights:
                raise UserError(f"no live reading: {CHANGED}")
            sae = SparseAutoencoder.load(place).to(self.device)
            if weights_digest(place) != member.weights:  # trained again while they were read
                raise UserError(f"no live reading: {CHANGED}")
            self._sae = (wanted, sae)
        return self._sae[1]


def _give_way() -> None:
    """Leave the pages a core, and the right of way on all others: threads that this one starts inherit it."""
    import torch

    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores - 1))
    if sys.platform == "linux":  # elsewhere it would be the whole process
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def check(text: str) -> None:
    """Raise UserError for a text that is not read."""
    if not text.strip():
        raise UserError("text: is empty; type some words")
    if len(text) > MAX_CHARS:
        raise UserError(f"text: {len(text):,} characters, at most {MAX_CHARS:,} are read")


def _overall(place: tuple[str, Index, Member], tokens: list[Token]) -> list[Json]:
    """Return the latents of the whole text, strongest first; the first token is an attention sink and left out."""
    base, index, member = place
    peak: dict[int, float] = {}
    for token in tokens[1:] or tokens:
        for latent, value in token.latents:
            peak[latent] = max(peak.get(latent, 0.0), value)
    best = sorted(peak, key=lambda latent: (-peak[latent], latent))[:OVERALL]
    keys = [key_of(member.id, latent) for latent in best]
    labels = index.labels(keys)
    return [
        {
            "latent": latent,
            "activation": peak[latent],
            "label": labels.get(key, ""),
            "link": latent_link(base, member, latent),
        }
        for latent, key in zip(best, keys, strict=True)
    ]
