"""A pytest plugin: tests written for a CPU make their tensors on the device that WSAE_TEST_DEVICE names.

    WSAE_TEST_DEVICE=cuda PYTHONPATH=tests/support python -m pytest -p on_device tests/kernels/triton_cases.py

Random numbers come from the generators that the tests give, which are a CPU's, and are moved.
"""

import os
from collections.abc import Callable, Iterator

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
    """Let Triton's interpreter put its own functions into `triton.language` once, not at every call in a kernel too.

    That is half of its time.
    """
    from triton.runtime import interpreter

    done, patch = set[str](), interpreter._patch_lang

    def once(function: Callable[..., object]) -> object:
        if function.__module__ not in done:
            done.add(function.__module__)
            patch(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = once


def pytest_configure() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        interpret_faster()
