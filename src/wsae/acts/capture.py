"""Read module outputs during a forward pass that stops at the deepest one, or replace one during a full pass."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from wsae.acts.hookpoints import LANGUAGE, HookPoint, Manner, module_named, output_tensor


class _DeepestReached(Exception):  # noqa: N818  (control flow, not an error)
    """Ends a forward pass whose remaining layers nobody reads."""


class Capture:
    """Activations at several hook points from one forward pass, stopped once the last of them has fired."""

    def __init__(
        self, model: nn.Module, hooks: Sequence[HookPoint], manner: Manner = LANGUAGE
    ) -> None:
        self.hooks = {hook.name: hook.d_in for hook in hooks}
        self._model, self._manner = model, manner
        self._modules = [(hook.name, model.get_submodule(hook.path)) for hook in hooks]
        self._deepest = max(hooks, key=lambda hook: hook.order).name

    def __call__(
        self, ids: Int[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"] | None = None
    ) -> dict[str, Float[Tensor, "batch seq _"]]:
        """Return each hook's output on tokens; `mask` is false at padding (none: no padding, a little faster)."""
        attention = None if mask is None else mask.long()
        return self.read({"input_ids": ids, "attention_mask": attention, "use_cache": False})

    @torch.inference_mode()
    def read(self, inputs: Mapping[str, Any]) -> dict[str, Float[Tensor, "batch positions _"]]:
        """Return each hook's output when the model is called with these keyword arguments."""
        seen: dict[str, Tensor] = {}

        def keep(name: str, output: object) -> None:
            seen[name] = output_tensor(output, name, self._manner)
            if name == self._deepest:
                raise _DeepestReached

        with _hooked(self._modules, keep), contextlib.suppress(_DeepestReached):
            self._model(**inputs)
        return {name: seen[name] for name in self.hooks}


@contextlib.contextmanager
def splice(
    model: nn.Module, hook: str, replace: Callable[[Float[Tensor, "batch seq d_in"]], Tensor]
) -> Iterator[None]:
    """Within the context, `replace(x)` takes the place of the hook's output x in every forward pass.

    The other elements of a tuple output pass unchanged; the result is cast to the dtype of x. Raises UserError when
    no module, or more than one, has this name.
    """

    def swap(_module: nn.Module, _inputs: object, output: object) -> object:
        x = output_tensor(output, hook)
        new = replace(x).to(x.dtype)
        assert new.shape == x.shape, f"replacement of shape {tuple(new.shape)} for {tuple(x.shape)}"
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = module_named(model, hook).register_forward_hook(swap)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _hooked(
    modules: list[tuple[str, nn.Module]], keep: Callable[[str, object], None]
) -> Iterator[None]:
    handles = [
        module.register_forward_hook(lambda _m, _i, out, name=name: keep(name, out))
        for name, module in modules
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
