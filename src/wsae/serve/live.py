"""A text typed by a visitor: which latents fire on which token. One model and one SAE at a time, loaded when asked."""

import threading
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from wsae.core.errors import UserError
from wsae.report.rundata import Json
from wsae.serve.index import Index, Member
from wsae.serve.model import load
from wsae.serve.schema import key_of
from wsae.serve.served import Served
from wsae.serve.views import latent_link

if TYPE_CHECKING:
    from wsae.acts.capture import Capture
    from wsae.acts.language import LanguageModel
    from wsae.sae import SparseAutoencoder

MAX_CHARS, MAX_TOKENS = 2000, 256
PER_TOKEN, OVERALL = 8, 24


class Token(NamedTuple):
    """One token of the text and the latents that fire on it, strongest first: (latent, activation)."""

    text: str
    latents: list[tuple[int, float]]


class Live:
    """The model and SAE last asked for. Calls take turns."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self._turn = threading.Lock()
        self._model: tuple[str, LanguageModel] | None = None
        self._probed: tuple[LanguageModel, str, Capture] | None = None
        self._sae: tuple[tuple[Path, int], SparseAutoencoder] | None = None

    def read(self, run: Served, member: Member, text: str) -> Json:
        """Return the tokens of a text with their latents, and the latents of the whole text.

        Raises UserError when the text is empty or too long, or the model is not at hand.
        """
        path, index = run.path, run.index
        check(text)
        if index.model["why_not"]:
            raise UserError(f"no live reading: {index.model['why_not']}")
        if not member.weights:
            raise UserError(f"no live reading: the run keeps no weights of {member.name}")
        with self._turn:
            tokens = self._tokens(path, index.model["name"], member, text)
        return {
            "member": member.slug,
            "tokens": [{"text": t.text, "latents": t.latents} for t in tokens],
            "latents": _overall((run.slug, index, member), tokens),
        }

    def _tokens(self, path: Path, name: str, member: Member, text: str) -> list[Token]:
        import torch

        from wsae.acts.decoding import decode_table
        from wsae.acts.packing import automatic_bos

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
        found = zip(ids, strongest.indices.tolist(), strongest.values.tolist(), strict=True)
        return [
            Token(texts[str(i)], [(j, v) for j, v in zip(js, vs, strict=True) if v > 0])
            for i, js, vs in found
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

        wanted = (path, member.id)
        if self._sae is None or self._sae[0] != wanted:
            self._sae = None
            place = path / "members" / member.hook / member.name
            if not place.resolve().is_relative_to(path.resolve()):
                raise UserError(f"{member.name}: its weights lie outside the run")
            self._sae = (wanted, SparseAutoencoder.load(place).to(self.device))
        return self._sae[1]


def check(text: str) -> None:
    """Raise UserError for a text that is not read."""
    if not text.strip():
        raise UserError("text: is empty; type some words")
    if len(text) > MAX_CHARS:
        raise UserError(f"text: {len(text):,} characters, at most {MAX_CHARS:,} are read")


def _overall(place: tuple[str, Index, Member], tokens: list[Token]) -> list[Json]:
    """Return the latents of the whole text, strongest first; the first token is an attention sink and left out."""
    slug, index, member = place
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
            "link": latent_link(slug, member, latent),
        }
        for latent, key in zip(best, keys, strict=True)
    ]
