"""The text of each token id, in the middle of a sentence, and the bytes of those that hold part of a character."""

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_BYTE_NAME = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""How tokenizers that fall back on bytes name one (Llama 2, Mistral, Gemma)."""


def _alphabet() -> dict[str, int]:
    """Return the characters that byte-level tokenizers write for bytes: printable ones stand for themselves."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = (byte for byte in range(256) if byte not in plain)
    return {chr(byte): byte for byte in plain} | {chr(256 + i): b for i, b in enumerate(moved)}


_ALPHABET = _alphabet()


def decode_table(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> dict[int, str | bytes]:
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


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _bytes_of(token: object) -> bytes | None:
    """Return the bytes that a token's name stands for; None where it names none, or bytes of whole characters."""
    if not isinstance(token, str) or not token:
        return None
    if named := _BYTE_NAME.fullmatch(token):
        raw = bytes.fromhex(named[1])
    elif all(char in _ALPHABET for char in token):
        raw = bytes(_ALPHABET[char] for char in token)
    elif len(token) == 1 and ord(token) < 256:  # a byte as the character of its number (ByT5)
        raw = bytes([ord(token)])
    else:
        return None
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw
    return None
