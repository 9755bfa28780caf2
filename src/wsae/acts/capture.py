"""Read hook points during a forward pass that stops at the deepest one, or replace one during a full pass."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from wsae.acts.hookpoints import HookPoint, probe, put_back, taken, watch
from wsae.acts.layout import TokenLayout, tokens
from wsae.acts.names import Place
from wsae.core.errors import UserError


class _DeepestReached(Exception):  # noqa: N818  (control flow, not an error)
    """Ends a forward pass whose remaining layers nobody reads."""


class Capture:
    """Activations at several hook points from one forward pass, stopped once the last of them has fired."""

    def __init__(self, model: nn.Module, hooks: Sequence[HookPoint]) -> None:
        self.hooks = {hook.name: hook.d_in for hook in hooks}
        self._model = model
        self._points = list(hooks)
        self._deepest = max(hooks, key=lambda hook: hook.order).name

    def __call__(
        self, ids: Int[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"] | None = None
    ) -> dict[str, Float[Tensor, "batch seq _"]]:
        """Return each hook's rows on tokens; `mask` is false at padding (none: no padding, a little faster)."""
        attention = None if mask is None else mask.long()
        return self.read({"input_ids": ids, "attention_mask": attention, "use_cache": False})

    @torch.inference_mode()
    def read(self, inputs: Mapping[str, Any]) -> dict[str, Float[Tensor, "batch positions _"]]:
        """Return each hook's rows when the model is called with these keyword arguments, its main input first."""
        seen: dict[str, Tensor] = {}
        size = tuple(next(iter(inputs.values())).shape)

        def keep(hook: HookPoint, value: Any) -> None:
            rows = rows_of(hook, value, size)
            seen[hook.name] = rows.clone() if hook.copied else rows
            if hook.name == self._deepest:
                raise _DeepestReached

        with _watched(self._model, self._points, keep), contextlib.suppress(_DeepestReached):
            self._model(**inputs)
        for name in self.hooks:
            if name not in seen:
                raise UserError(f"hook {name!r}: did not run on this batch; name another module")
        return {name: seen[name] for name in self.hooks}


def rows_of(
    hook: HookPoint, value: Any, size: tuple[int, ...]
) -> Float[Tensor, "batch positions _"]:
    """Return the rows in a module's output or input; raises UserError where they are not as in the probe."""
    x = taken(value, hook.item)
    rows = hook.layout.rows(x, size) if isinstance(x, Tensor) else None
    if rows is None:
        shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise UserError(
            f"hook {hook.name!r}: its {hook.side} is {shape} for an input of {size}, where {hook.layout} "
            "was found before; name another module"
        )
    return rows


@contextlib.contextmanager
def splice(
    model: nn.Module,
    hook: str | HookPoint,
    replace: Callable[[Float[Tensor, "batch seq d_in"]], Tensor],
) -> Iterator[None]:
    """Within the context, `replace(x)` takes the place of the hook's rows x in every forward pass on tokens.

    The rest of an output or input passes unchanged; the result is cast to the dtype of x. A hook that is named is
    probed first. Raises UserError when no module, or more than one, has this name.
    """
    point = hook if isinstance(hook, HookPoint) else one_hook(model, hook)
    size: tuple[int, ...] = ()

    def begin(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal size
        given = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs_embeds"))
        assert isinstance(given, Tensor), "a model is called with tokens, or with their vectors"
        size = tuple(given.shape)

    def swap(value: Any) -> Any:
        x = rows_of(point, value, size)
        new = replace(x).to(x.dtype)
        assert new.shape == x.shape, f"replacement of shape {tuple(new.shape)} for {tuple(x.shape)}"
        return with_rows(point, value, new)

    first = model.register_forward_pre_hook(begin, with_kwargs=True, prepend=True)
    try:
        with replaced(model, point, swap):
            yield
    finally:
        first.remove()


def one_hook(model: nn.Module, name: str) -> HookPoint:
    """Return the one hook point that a name or pattern means, probed; raises UserError where it means several."""
    hooks = probe(model, [name], tokens()).hooks
    if len(hooks) > 1:
        names = ", ".join(hook.name for hook in hooks[:3])
        raise UserError(f"hook {name!r}: names {len(hooks)} modules ({names}, ...); name one")
    return hooks[0]


def with_rows(hook: HookPoint, value: Any, rows: Float[Tensor, "batch seq _"]) -> Any:
    """Return a module's output or input with other rows in place, of as many sequences as they have."""
    assert isinstance(hook.layout, TokenLayout), "rows of tokens"
    return put_back(value, hook.item, hook.layout.back(rows, taken(value, hook.item)))


@contextlib.contextmanager
def replaced(model: nn.Module, hook: HookPoint, swap: Callable[[Any], Any]) -> Iterator[None]:
    """Within the context, `swap(value)` takes the place of what the module gives, or takes."""
    handle = watch(model, Place(hook.path, hook.side), lambda _place, value: swap(value))
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _watched(
    model: nn.Module, hooks: list[HookPoint], keep: Callable[[HookPoint, Any], None]
) -> Iterator[None]:
    handles = [
        watch(
            model, Place(hook.path, hook.side), lambda _place, value, hook=hook: keep(hook, value)
        )
        for hook in hooks
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
