"""Short names that stand in addresses."""

import re
from collections.abc import Iterable

RESERVED = ("all", "live")
"""Words that mean something else where a member's name stands."""


def slugs(names: Iterable[str]) -> list[str]:
    """Return one name per name, in order: safe characters only, none twice, none reserved."""
    out: list[str] = []
    for name in names:
        base = re.sub(r"[^A-Za-z0-9._~-]+", "-", name).strip("-.") or "x"
        slug, number = base, 1
        while slug in out or slug in RESERVED:
            number += 1
            slug = f"{base}-{number}"
        out.append(slug)
    return out
