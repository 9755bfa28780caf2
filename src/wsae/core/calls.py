"""What a call from Python brings: numbers in any container, a device, PyTorch set otherwise than at its start."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from wsae.core.errors import UserError, reason

REAL = "fiu"
"""NumPy's kinds of real numbers."""


P = ParamSpec("P")
R = TypeVar("R")


def own_settings(call: Callable[P, R]) -> Callable[P, R]:
    """Make a call set aside what the caller has set for all of PyTorch: our numbers must not depend on it.

    That is the default type and device, autocast, inference mode and switched-off gradients. Raises UserError for a
    `progress` that cannot be called.
    """

    @functools.wraps(call)
    def made(*args: P.args, **named: P.kwargs) -> R:
        if "progress" in named and not callable(named["progress"]):
            raise UserError(f"progress: {named['progress']!r}; give wsae.progress, or leave it out")
        with _usual_settings():
            return call(*args, **named)

    return made


@contextlib.contextmanager
def _usual_settings() -> Iterator[None]:
    default = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if default != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, default)
        yield


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let PyTorch use one thread here, where tasks are small or share the cores already.

    Threads wait for each other after every task: beside another busy process that makes small ones many times slower.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def usable_device(name: str, said: str = "device") -> str:
    """Return the name of a device that this machine has; raises UserError that lists those, `said` before the name."""
    try:
        torch.empty(0, dtype=torch.float32, device=torch.device(name))
    except (RuntimeError, AssertionError, NotImplementedError, ValueError) as error:
        here = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        here += ["mps"] if torch.backends.mps.is_available() else []
        raise UserError(f"{said} {name}: not on this machine; it has {', '.join(here)}") from error
    if torch.device(name).type == "meta":
        raise UserError(f"{said} {name}: holds no values; choose cpu or cuda")
    return name


def numbers(value: object, what: str) -> np.ndarray | Tensor:
    """Return real numbers as an array or a tensor, not copied where they are one already.

    `value` is an array, a tensor, nested lists, a table (pandas, polars, pyarrow), one of its columns whose cells are
    rows, or whatever NumPy or DLPack make an array of. Raises UserError beginning with `what` for anything else.
    """
    found = value if isinstance(value, Tensor) else _array(value, what)
    if isinstance(found, Tensor):
        check_tensor(found, what)
        if found.device.type == "meta":
            raise UserError(f"{what}: a tensor on the meta device, which holds no values")
        return found
    if found.dtype.kind not in REAL:
        raise UserError(f"{what}: dtype {found.dtype}; give real numbers")
    return found


def tensor(value: object, what: str) -> Tensor:
    """Return `numbers` as a tensor (NumPy's are copied: they may be read only, or of the other byte order)."""
    found = numbers(value, what)
    if isinstance(found, Tensor):
        return found
    kind = found.dtype.newbyteorder("=") if found.dtype.itemsize <= 8 else np.dtype(np.float64)
    return torch.from_numpy(np.array(found, dtype=kind, order="C"))


def _array(value: object, what: str) -> np.ndarray | Tensor:
    """Return what the value holds, of any type that NumPy has."""
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise UserError(f"{what}: an array with masked values; fill or drop them")
    if isinstance(value, str | bytes | Mapping | set | frozenset) or value is None:
        raise _unusable(value, what)
    try:
        if hasattr(value, "__array__"):
            found = np.asarray(value)
        elif hasattr(value, "__dlpack__"):
            return torch.from_dlpack(value)
        elif isinstance(value, Sequence) or hasattr(value, "__getitem__"):
            found = _of_list(list(value), what)  # pyright: ignore[reportArgumentType]
        else:
            raise _unusable(value, what)
    except UserError:
        raise
    except Exception as error:  # whatever a stranger's container raises when it is read
        raise UserError(
            f"{what}: given as {_name(value)}, of which no array can be made ({reason(error, 160)})"
        ) from error
    if isinstance(found, Tensor):
        return found
    if found.dtype.kind == "O":
        return _of_objects(found, value, what)
    # bfloat16 and the like of other packages: NumPy knows them by name alone
    return found.astype(np.float32) if found.dtype.name.startswith(("bfloat", "float8")) else found


def _of_list(items: list[Any], what: str) -> np.ndarray | Tensor:
    if items and all(isinstance(item, Tensor) for item in items):
        shapes = {tuple(item.shape) for item in items}
        if len(shapes) > 1:
            raise UserError(
                f"{what}: a list of tensors of {len(shapes)} shapes; give one, torch.cat(them)"
            )
        return torch.stack([item.detach() for item in items])
    if any(isinstance(item, Mapping) for item in items[:1]):
        raise UserError(f"{what}: rows that are dicts; give one column of numbers")
    lengths = {len(item) for item in items if hasattr(item, "__len__")}
    if len(lengths) > 1:
        few = ", ".join(map(str, sorted(lengths)[:4]))
        raise UserError(f"{what}: rows of unequal lengths ({few}); give the same for all")
    return np.asarray(items)


def _of_objects(found: np.ndarray, value: object, what: str) -> np.ndarray | Tensor:
    """Return cells that are rows, or numbers, as one array."""
    cells = found[:, 0] if found.ndim == 2 and found.shape[1] == 1 else found
    if (
        cells.ndim == 1
        and len(cells)
        and hasattr(cells[0], "__len__")
        and not isinstance(cells[0], str)
    ):
        return _array(list(cells), what)
    kinds: set[type] = set()
    try:
        kinds = {type(cell) for cell in found.flat}
        if not any(issubclass(kind, str | bytes) for kind in kinds):
            return found.astype(np.float64)
    except (TypeError, ValueError):
        pass
    named = ", ".join(sorted(kind.__name__ for kind in kinds)[:4])
    raise UserError(f"{what}: given as {_name(value)} with cells that are no numbers ({named})")


def _unusable(value: object, what: str) -> UserError:
    return UserError(
        f"{what}: given as {_name(value)}; give a NumPy array, a PyTorch tensor, a list of rows or a table of numbers"
    )


def _name(value: object) -> str:
    kind = type(value)
    package = kind.__module__.split(".")[0]
    return (
        kind.__name__ if package in ("builtins", "numpy", "torch") else f"{package} {kind.__name__}"
    )


def check_tensor(value: Tensor, what: str) -> None:
    """Raise UserError for a tensor that is not dense, or not of real numbers."""
    if value.is_complex() or value.dtype == torch.bool:
        raise UserError(f"{what}: dtype {value.dtype}; give real numbers")
    if value.layout != torch.strided:
        raise UserError(f"{what}: a tensor of layout {value.layout}; give x.to_dense()")
    if value.is_quantized:
        raise UserError(f"{what}: a quantised tensor; give x.dequantize()")
