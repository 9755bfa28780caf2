"""Seeds: every random stream has a name, so adding one never shifts another."""

import hashlib


def seed_for(root: int, *names: object) -> int:
    """Return a 63-bit seed for the stream called `names` under `root` (SHA-256, stable across machines)."""
    text = "/".join([str(root), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


class Permutation:
    """A pseudo-random permutation of range(n) in O(1) memory: a Feistel network with cycle walking.

    Shuffles stores of any size without holding an index; `p(i)` maps positions (numpy int64 arrays) to rows.
    """

    ROUNDS = 6

    def __init__(self, n: int, seed: int) -> None:
        self.n = n
        self._half = max(1, ((max(n, 2) - 1).bit_length() + 1) // 2)
        self._keys = [seed_for(seed, "feistel", r) & 0xFFFFFFFFFFFFFFFF for r in range(self.ROUNDS)]

    def __call__(
        self, positions
    ):  # numpy in, numpy out; numpy is imported late to keep `wsae --help` light
        """Return the rows at `positions` (int64 array with values in [0, n))."""
        import numpy as np

        x = np.asarray(positions, dtype=np.uint64)
        out = self._round_trip(x)
        outside = out >= self.n
        while outside.any():  # cycle walking: the domain is under 4n, so a few rounds suffice
            out[outside] = self._round_trip(out[outside])
            outside = out >= self.n
        return out.astype(np.int64)

    def _round_trip(self, x):
        import numpy as np

        half, mask = np.uint64(self._half), np.uint64((1 << self._half) - 1)
        left, right = x >> half, x & mask
        for key in self._keys:
            left, right = right, left ^ (mix64(right, key) & mask)
        return (left << half) | right


def mix64(x, key: int):
    """Hash uint64 values (numpy) under a key: the splitmix64 finaliser of their sum, a bijection."""
    import numpy as np

    with np.errstate(over="ignore"):
        z = x + np.uint64(key)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
