"""One step of a mutation fuzzer: some bytes of a sound file changed, moved, cut or made huge."""

import random
import re

_NUMBERS = (0, 1, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)
_WORDS = (
    b"\0",
    b"../../x",
    b"[",
    b"{",
    b'"',
    b"NaN",
    b"1e999",
    b"-1",
    b"\xff\xfe",
    b"null",
    b"(",
    b"\\ud800",
)


def mutated(data: bytes, seed: int) -> bytes:
    """Return a file like `data`, by one to four changes drawn from the seed."""
    pick, out = random.Random(seed), bytearray(data)
    for _ in range(pick.randint(1, 4)):
        pick.choice((_bits, _bits, _cut, _move, _number, _digits, _word))(out, pick)
    return bytes(out)


def _at(out: bytearray, pick: random.Random) -> int:
    """Return a place, mostly near the ends, where headers are."""
    size = len(out)
    near = pick.choice((size, size, min(size, 64), min(size, 16)))
    place = pick.randrange(near + 1)
    return place if pick.random() < 0.7 else size - place


def _bits(out: bytearray, pick: random.Random) -> None:
    for _ in range(pick.randint(1, 8) if out else 0):
        out[min(_at(out, pick), len(out) - 1)] ^= 1 << pick.randrange(8)


def _cut(out: bytearray, pick: random.Random) -> None:
    del out[_at(out, pick) :]


def _move(out: bytearray, pick: random.Random) -> None:
    first, length = _at(out, pick), pick.randint(1, 40)
    out[_at(out, pick) : 0] = out[first : first + length] * pick.choice((1, 1, 30))


def _number(out: bytearray, pick: random.Random) -> None:
    width = pick.choice((1, 2, 4, 8))
    value = pick.choice(_NUMBERS) % (1 << 8 * width)
    first = _at(out, pick)
    out[first : first + width] = value.to_bytes(width, pick.choice(("little", "big")))


def _digits(out: bytearray, pick: random.Random) -> None:
    """Put another number in place of one in a text header."""
    found = list(re.finditer(rb"\d+", bytes(out)))
    if found:
        match = pick.choice(found)
        out[match.start() : match.end()] = str(pick.choice(_NUMBERS)).encode()


def _word(out: bytearray, pick: random.Random) -> None:
    first = _at(out, pick)
    out[first:first] = pick.choice(_WORDS)
