"""Token ids of sequences and what they read, without model or tokenizer."""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE_NAME = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""How tokenizers that fall back on bytes name one (Llama 2, Mistral, Gemma)."""


@cache
def _alphabet() -> dict[str, int]:
    """Return the characters that byte-level tokenizers write for bytes."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {char: byte for byte, char in bytes_to_unicode().items()}


def ids_behind(tokenizer: Any, text: str, before: str = "\n") -> list[int]:
    """Return the ids of a text that goes on after another: at a beginning many tokenizers put a space of their own."""
    lead, both, alone = (
        list(tokenizer(one, add_special_tokens=False, verbose=False)["input_ids"])
        for one in (before, before + text, text)
    )
    return (both[len(lead) :] if both[: len(lead)] == lead else []) or alone


def decode_table(
    tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]
) -> dict[int, str | bytes]:
    """Return {id: text} as in the middle of a sentence: some tokenizers drop a token's space when it comes first.

    A token that holds part of a character has no text of its own; its bytes are returned.
    """
    lead = [int(i) for i in tokenizer("a", add_special_tokens=False)["input_ids"][-1:]]
    before = _decode(tokenizer, lead)
    table: dict[int, str | bytes] = {}
    for i in map(int, ids):
        both = _decode(tokenizer, [*lead, i])
        text = both.removeprefix(before) if both.startswith(before) else _decode(tokenizer, [i])
        suspect = not text or "\ufffd" in text
        raw = _bytes_of(tokenizer.convert_ids_to_tokens(i)) if suspect else None
        table[i] = text if raw is None else raw
    return table


def _decode(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _bytes_of(token: object) -> bytes | None:
    """Return the bytes that a token's name stands for; None where it names none, or bytes of whole characters."""
    if not isinstance(token, str) or not token:
        return None
    if named := _BYTE_NAME.fullmatch(token):
        raw = bytes.fromhex(named[1])
    elif all(char in _alphabet() for char in token):
        raw = bytes(_alphabet()[char] for char in token)
    elif len(token) == 1 and ord(token) < 256:  # a byte as the character of its number (ByT5)
        raw = bytes([ord(token)])
    else:
        return None
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw
    return None


_MARKERS = frozenset(
    {
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|im_end|>",
        "<|eot_id|>",
        "<|end|>",
        "<end_of_turn>",
        "</s>",
        "<eos>",
    }
)
"""How end-of-text tokens read, for stores that did not note their ids."""
Texts = Mapping[int, str | bytes]
"""Token id -> its text, or its bytes where it holds part of a character."""
REACH = 3
"""Tokens beyond a cut that a character may begin or end in: it has four bytes at most."""
_CHARACTER = re.compile(
    rb"[\x00-\x7f]|[\xc2-\xdf][\x80-\xbf]|\xe0[\xa0-\xbf][\x80-\xbf]|[\xe1-\xec\xee\xef][\x80-\xbf]{2}|"
    rb"\xed[\x80-\x9f][\x80-\xbf]|\xf0[\x90-\xbf][\x80-\xbf]{2}|[\xf1-\xf3][\x80-\xbf]{3}|"
    rb"\xf4[\x80-\x8f][\x80-\xbf]{2}"
)
"""One whole character in UTF-8."""


class TokenTable:
    """Sequences of token ids [n_seq, seq_len] with their lengths (the rest is padding), and what the ids read.

    `ends` are the ids that end a document; a document may run on over sequences. Empty: every sequence is one document.
    None: nothing says where documents end.
    """

    def __init__(
        self,
        ids: Int[Tensor, "n_seq seq_len"],
        lengths: Int[Tensor, " n_seq"],
        strings: Texts,
        ends: tuple[int, ...] | None = None,
    ) -> None:
        self.ids, self.lengths, self.ends = ids, lengths, ends
        self._strings = strings

    def texts(self, ids: Sequence[int]) -> dict[int, str | bytes]:
        """Return the text of some ids by themselves, or their bytes."""
        return {i: self._strings.get(i, f"<{i}>") for i in ids}

    def decode(
        self, ids: Sequence[int] | np.ndarray | Tensor, part: slice = slice(None)
    ) -> list[str]:
        """Return the text of each id of a part, leading space included; `ids` go on beyond it where they can.

        A character split over tokens stands whole at the first of them in the part; the others read "".
        """
        return joined([self._strings.get(int(i), f"<{int(i)}>") for i in ids], part)


def joined(tokens: Sequence[str | bytes], part: slice = slice(None)) -> list[str]:
    """Return the text of each token of a part: together they read as the whole characters in it.

    A character split over tokens stands at the first of its tokens in the part. Bytes of no whole character (its rest
    lies beyond the sequence) read as nothing.
    """
    first, stop, _ = part.indices(len(tokens))
    out = ["" if isinstance(token, bytes) else token for token in tokens]
    at = 0
    while at < len(tokens):
        run = at
        while run < len(tokens) and isinstance(tokens[run], bytes):
            run += 1
        if run > at:
            _place(tokens[at:run], out, at, first)
        at = run + 1
    return out[first:stop]


def _place(run: Sequence[str | bytes], out: list[str], start: int, first: int) -> None:
    """Write the characters that the bytes of neighbouring tokens make to `out`, from place `start` on."""
    raw = [token for token in run if isinstance(token, bytes)]
    owner = [start + i for i, token in enumerate(raw) for _ in token]
    for found in _CHARACTER.finditer(b"".join(raw)):
        place = owner[found.start()]
        if place < first <= owner[found.end() - 1]:
            place = first
        out[place] += found[0].decode()


def alone(token: str | bytes) -> str:
    """Return how a token reads by itself: bytes of no whole character by name, "<0xE6>"."""
    if isinstance(token, str):
        return token
    text, end = "", 0
    for found in [*_CHARACTER.finditer(token), None]:
        start = len(token) if found is None else found.start()
        text += "".join(f"<0x{byte:02X}>" for byte in token[end:start])
        text, end = (text, end) if found is None else (text + found[0].decode(), found.end())
    return text


def owner_of(texts: Sequence[str], place: int) -> str:
    """Return the text that a token of a context belongs to: of a continued character, the whole one before it."""
    return next((text for text in reversed(texts[: place + 1]) if text), "")


def texts_json(texts: Texts) -> dict[str, Any]:
    """Return what a store writes: text, or {"bytes": hexadecimal}."""
    return {
        str(i): token if isinstance(token, str) else {"bytes": token.hex()}
        for i, token in texts.items()
    }


def texts_of(value: Mapping[str, Any]) -> dict[int, str | bytes]:
    """Return the inverse of `texts_json`; raises ValueError, KeyError or TypeError for anything else."""
    return {
        int(i): token if isinstance(token, str) else bytes.fromhex(token["bytes"])
        for i, token in value.items()
    }


def likely_ends(strings: Texts) -> tuple[int, ...] | None:
    """Return the ids that read like an end-of-text token, or None when none does."""
    found = (i for i, t in strings.items() if isinstance(t, str) and t.strip() in _MARKERS)
    return tuple(sorted(found)) or None
