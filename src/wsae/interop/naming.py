"""Hook points in TransformerLens' words, which SAELens and SAEBench speak."""

import re
from typing import NamedTuple

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|layer)\.(\d+)(?P<rest>\.[\w.]+)?$", flags=re.ASCII)


class HookName(NamedTuple):
    """A hook point for TransformerLens: its name (ours where it has no equal there) and its block."""

    name: str
    layer: int | None


def hook_name(hook: str) -> HookName:
    """Return TransformerLens' name of a module's output.

    A block's output ("layers.9", "h.9", "gpt_neox.layers.9") is `blocks.9.hook_resid_post`. Modules inside a block keep
    their name: where norms and biases are applied differs between models. TransformerLens' own names stay as they are.
    """
    found = _LAYER.search(hook)
    if not found:
        return HookName(hook, None)
    layer = int(found[1])
    whole = found["rest"] is None
    return HookName(f"blocks.{layer}.hook_resid_post" if whole else hook, layer)
