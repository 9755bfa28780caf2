"""Names of places in a model: patterns, canonical names, widths and the order in which they fire."""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from wsae.acts.loading import refuse_unloaded
from wsae.core.errors import UserError, nearest


class Manner(NamedTuple):
    """How a kind of model is called, and how a module's output becomes rows."""

    example: Callable[[nn.Module], dict[str, Any]]
    """The keyword arguments of a smallest forward pass, on the model's device."""
    arrange: Callable[[Tensor], Tensor | None]
    """An output as [batch, positions, width]; none where it cannot be."""
    wanted: str
    """The shapes that can be, in words."""


class HookPoint(NamedTuple):
    """A module whose output is read: canonical name, full path, width of its output, rank in firing order."""

    name: str
    path: str
    d_in: int
    order: int
    positions: int = 1
    """Rows that the example of the model's `Manner` gave per element of the batch."""


def canonical_names(paths: Iterable[str]) -> dict[str, str]:
    """Map each module path to its short name.

    The short name starts at the component before the first number ("model.layers.9.mlp" -> "layers.9.mlp"), or is the
    last component where there is none ("model.norm" -> "norm"). Paths whose short names collide keep the full path.
    """
    short = {path: _short(path) for path in paths if path}
    count = Counter(short.values())
    return {path: name if count[name] == 1 else path for path, name in short.items()}


def match(pattern: str, paths: Iterable[str]) -> list[str]:
    """Return the paths that end in `pattern` at a dot, in natural order; `*` stands for characters other than a dot.

    A full path names that module alone. Raises UserError naming the nearest names when nothing matches.
    """
    names = canonical_names(paths)
    if pattern.strip() in names:
        return [pattern.strip()]
    body = "".join("[^.]*" if char == "*" else re.escape(char) for char in pattern.strip())
    regex = re.compile(rf"(?:.*\.)?{body}")
    found = [path for path in names if regex.fullmatch(path)] if body else []
    if not found:
        raise UserError(
            f"hook {pattern!r}: the model has no such module{nearest(pattern, names.values())}"
        )
    return sorted(found, key=natural_key)


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key that puts "layers.9" before "layers.10"."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts if part]


def resolve(
    model: nn.Module, patterns: Iterable[str], manner: Manner | None = None
) -> list[HookPoint]:
    """Return the hook points that the patterns name, in natural order, after one forward pass of an example.

    `manner` none means a language model. Raises UserError when a pattern matches nothing, a module does not run, runs
    twice or gives nothing that can be arranged as rows.
    """
    manner = manner or LANGUAGE
    modules = dict(model.named_modules())
    names = canonical_names(modules)
    paths = sorted(
        {path for pattern in patterns for path in match(pattern, modules)}, key=natural_key
    )
    fired = _fire(model, {path: modules[path] for path in paths}, manner)
    for path, firings in fired.items():
        for _, output in firings:
            refuse_unloaded(model, output, f"hook {names[path]!r}")
    return [_checked(names[path], path, fired[path], manner) for path in paths]


def module_named(model: nn.Module, name: str) -> nn.Module:
    """Return the module with a canonical name, full path or pattern that names exactly one."""
    modules = dict(model.named_modules())
    for path, short in canonical_names(modules).items():
        if name in (short, path):
            return modules[path]
    found = match(name, modules)
    if len(found) > 1:
        raise UserError(
            f"hook {name!r}: names {len(found)} modules ({', '.join(found[:3])}, ...); name one"
        )
    return modules[found[0]]


def output_tensor(output: object, name: str, manner: Manner | None = None) -> Tensor:
    """Return the activation [batch, positions, width] in a module's output: the output or the first of a tuple.

    `manner` none means a language model. Raises UserError when it cannot be arranged so.
    """
    manner = manner or LANGUAGE
    first = output[0] if isinstance(output, tuple | list) and output else output
    rows = manner.arrange(first) if isinstance(first, Tensor) else None
    if rows is None:
        shape = tuple(first.shape) if isinstance(first, Tensor) else type(first).__name__
        raise UserError(
            f"hook {name!r}: its output is {shape}, not {manner.wanted}; name another module"
        )
    return rows


def _two_tokens(model: nn.Module) -> dict[str, Any]:
    device = next(model.parameters()).device
    ids = torch.zeros(1, 2, dtype=torch.long, device=device)
    return {"input_ids": ids, "use_cache": False}


def _sequence(output: Tensor) -> Tensor | None:
    return output if output.ndim == 3 else None


LANGUAGE = Manner(_two_tokens, _sequence, "[batch, sequence, width]")


def _short(path: str) -> str:
    parts = path.split(".")
    first_number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return ".".join(parts[max(first_number - 1, 0) :]) if first_number is not None else parts[-1]


def _fire(
    model: nn.Module, modules: dict[str, nn.Module], manner: Manner
) -> dict[str, list[tuple[int, object]]]:
    fired: dict[str, list[tuple[int, object]]] = {path: [] for path in modules}
    count = 0

    def note(path: str, output: object) -> None:
        nonlocal count
        count += 1
        fired[path].append((count, output))

    handles = [
        module.register_forward_hook(lambda _m, _i, out, path=path: note(path, out))
        for path, module in modules.items()
    ]
    try:
        with torch.inference_mode():
            model(**manner.example(model))
    finally:
        for handle in handles:
            handle.remove()
    return fired


def _checked(name: str, path: str, firings: list[tuple[int, object]], manner: Manner) -> HookPoint:
    if not firings:
        raise UserError(
            f"hook {name!r}: this module does not run in a forward pass; name one that does"
        )
    if len(firings) > 1:
        raise UserError(
            f"hook {name!r}: this module runs {len(firings)} times in a forward pass; name one that runs once"
        )
    order, output = firings[0]
    rows = output_tensor(output, name, manner)
    return HookPoint(name, path, rows.shape[-1], order, rows.shape[1])
