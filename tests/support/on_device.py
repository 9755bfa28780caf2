"""A pytest plugin: tests written for a CPU make their tensors on the device that WSAE_TEST_DEVICE names.

    WSAE_TEST_DEVICE=cuda PYTHONPATH=tests/support python -m pytest -p on_device tests/kernels/triton_cases.py

Random numbers come from the generators that the tests give, which are a CPU's, and are moved.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors


class OnDevice(TorchFunctionMode):
    """What makes tensors makes them there, unless it says where."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func, types, args=(), kwargs=None):  # noqa: ARG002
        kwargs = kwargs or {}
        if func not in _device_constructors() or kwargs.get("device") is not None:
            return func(*args, **kwargs)
        if kwargs.get("generator") is not None:
            return func(*args, **kwargs).to(self.device)
        return func(*args, **kwargs, device=self.device)


@pytest.fixture(autouse=True)
def on_device() -> Iterator[None]:
    with OnDevice(os.environ["WSAE_TEST_DEVICE"]):
        yield


def interpret_faster() -> None:
    """Spare Triton's interpreter (3.7.1) most of its time.

    Its own functions go into `triton.language` once, not at every launch and every call in a kernel; types are looked
    up once; and the reduction of its sorts is NumPy's, not a loop over single numbers.
    """
    from triton.language import standard
    from triton.runtime import interpreter

    done, patch = set[str](), interpreter._patch_lang

    def once(function: Callable[..., object]) -> object:
        if function.__module__ not in done:
            done.add(function.__module__)
            patch(function)
        return interpreter._LangPatchScope()

    types, find = dict[str, Any](), interpreter._get_np_dtype

    def looked_up(made: Any) -> Any:
        name = made.scalar.name
        if name not in types:
            types[name] = find(made)
        return types[name]

    reduce = interpreter.ReduceOps.apply_impl

    def reduced(self: Any, given: Any) -> Any:
        if self.combine_fn != standard._xor_combine:
            return reduce(self, given)
        bits = np.bitwise_xor.reduce(
            given[0].handle.data, axis=self.axis, keepdims=bool(self.keep_dims)
        )
        return self.to_tensor(bits, given[0].dtype)

    interpreter._patch_lang = once
    interpreter._get_np_dtype = looked_up
    interpreter.ReduceOps.apply_impl = reduced


def pytest_configure() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        interpret_faster()
