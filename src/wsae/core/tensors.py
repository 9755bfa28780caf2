"""Arrays on disk: safetensors, written atomically, read whole or mapped by rows; and NumPy's .npy and .npz, only read.

Files are read without believing them: no header makes memory be reserved for data not there. An array of NumPy's is
mapped where it lies unpacked, so nothing is read before it is asked for. A packed one is read whole, when it is not far
too large. Python objects, which only a pickle can hold, are refused.
"""

import copy
import json
import math
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from safetensors.torch import load, load_file
from torch import Tensor

from wsae.core.errors import UserError, first_line, size
from wsae.core.files import opened, parse_json, writing

_NUMPY = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "?",
}
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_MAX_HEADER = 100_000_000


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write named tensors atomically, the widest types first, so that each begins at a multiple of its size.

    The format is safetensors'; its library is not used for writing, because it would leave a file under a random name
    where it is killed, and hides the reason when the disk is full.
    """
    plain = {name: tensors[name].detach().cpu() for name in sorted(tensors)}
    ordered = dict(sorted(plain.items(), key=lambda pair: -pair[1].element_size()))
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in ordered.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        shape, dtype = list(tensor.shape), DTYPE_NAMES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    told = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    told += b" " * (-len(told) % 8)
    with writing(path) as temporary, temporary.open("wb") as file:
        file.write(len(told).to_bytes(8, "little") + told)
        for tensor in ordered.values():
            # one stride for all: a contiguous tensor of a single value may have any
            flat = tensor.contiguous().as_strided((tensor.numel(),), (1,))
            file.write(flat.view(torch.uint8).numpy().data)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read every tensor of a safetensors file; raises UserError when it is missing or damaged."""
    try:
        with opened(path) as file:
            if any(
                "\ud800" <= char <= "\udfff" for char in str(path)
            ):  # the library takes UTF-8 names
                return load(file.read())
        return load_file(path)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (
        Exception
    ) as error:  # the library has one exception type of its own plus ValueError and OSError
        raise UserError(f"{path}: not a readable safetensors file ({error})") from error


class MappedTensor:
    """One tensor of a safetensors file as a memory map: rows are read when asked for, nothing before.

    `shape` is the tensor's shape; `rows(index)` returns float32 (or the integer type) copies of those rows.
    """

    def __init__(self, path: Path, name: str) -> None:
        dtype, shape, offset = _locate(path, name)
        self.path, self.shape, self._bf16 = path, shape, dtype == "BF16"
        mapped = np.memmap(path, dtype=_NUMPY[dtype], mode="r", offset=offset, shape=shape)
        self._map = np.asarray(mapped)  # a plain view: the subclass is slow to index

    def as_rows(self) -> "MappedTensor":
        """Return the tensor with all axes but the last made one."""
        flat = copy.copy(self)
        flat._map = self._map.reshape(-1, self.shape[-1])
        flat.shape = flat._map.shape
        return flat

    def rows(self, index: np.ndarray | slice) -> Tensor:
        """Return the rows at `index` as a new tensor (half precisions and float64 become float32)."""
        part = np.array(self._map[index]) if isinstance(index, slice) else self._map[index]
        return torch.from_numpy(self.wide(part))

    @property
    def dtype(self) -> np.dtype:
        """The type of the file's own numbers, as numpy has it: bfloat16 as its bits."""
        return self._map.dtype

    def read(self, index: Int[np.ndarray, " rows"], out: np.ndarray) -> None:
        """Copy the rows at `index`, none of them outside, into `out`: the file's own numbers, for `wide`."""
        np.take(self._map, index, axis=0, out=out, mode="clip")  # any other mode copies twice

    def wide(self, own: np.ndarray) -> np.ndarray:
        """Return the file's own numbers as float32 (or the integer type)."""
        if self._bf16:
            return np.left_shift(own, 16, dtype=np.uint32).view(np.float32)
        return own.astype(np.float32) if own.dtype in (np.float16, np.float64) else own


def _locate(path: Path, name: str) -> tuple[str, tuple[int, ...], int]:
    """Return dtype name, shape and byte offset of a tensor, with every number in the header checked."""
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise UserError(f"{path}: not a safetensors file (header of {length} bytes)")
        try:
            header = parse_json(file.read(length))
            entry = header[name]
            dtype, shape = entry["dtype"], tuple(int(n) for n in entry["shape"])
            begin, end = (int(n) for n in entry["data_offsets"])
            item = np.dtype(_NUMPY[dtype]).itemsize
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{path}: no readable tensor {name!r} in it ({error})") from error
    count = math.prod(shape)
    if (
        min(shape, default=0) < 0
        or end - begin != count * item
        or begin < 0
        or math.prod(n for n in shape if n) * item >= 1 << 63  # as numpy counts, (0, 2^62) too
        or 8 + length + end > size
    ):
        raise UserError(f"{path}: tensor {name!r} does not fit its file (cut or altered)")
    return dtype, shape, 8 + length + begin


# NumPy's files.

MOST_UNPACKED = 8 << 30
"""Bytes of packed data that are unpacked into memory."""
PLAIN_UNPACKED, MOST_TIMES = 256 << 20, 100
"""Larger data that have shrunk to less than a hundredth are taken for a bomb; pictures shrink to a tenth."""
_READERS: dict[tuple[int, int], Callable] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


class Header(NamedTuple):
    """What an array is, where in its file the values begin, and their size."""

    shape: tuple[int, ...]
    order: Literal["C", "F"]
    dtype: np.dtype
    start: int
    bytes: int


def mapped_npy(path: Path, where: str) -> np.ndarray:
    """Return the array of a .npy file as a memory map; raises UserError beginning with `where` for any other file."""
    try:
        with opened(path) as file:
            header = _header(file, where)
            file.seek(0, 2)
            there = file.tell() - header.start
        if there < header.bytes:
            raise UserError(
                f"{where}: not a readable .npy array ({there} bytes where its header says {header.bytes}; cut?)"
            )
        return _map(path, header, header.start)
    except FileNotFoundError as error:
        raise UserError(f"{where}: no such file") from error
    except OSError as error:
        raise UserError(
            f"{where}: not a readable .npy array ({error.strerror or error})"
        ) from error


def npz_arrays(
    path: Path, wanted: tuple[str, ...], where: str
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return those of the wanted arrays that an .npz file has, and the names of all.

    Raises UserError beginning with `where` when the file or an array in it is damaged, or unpacks to far too much.
    """
    try:
        with opened(path) as packed, zipfile.ZipFile(packed) as archive:
            names = [
                name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")
            ]
            arrays = {
                name: _entry(path, archive, archive.getinfo(f"{name}.npy"), where)
                for name in wanted
                if name in names
            }
            return arrays, names
    except (UserError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise UserError(f"{where}: no such file") from error
    except Exception as error:  # BadZipFile, OSError, EOFError, zlib.error, RuntimeError, ...
        raise UserError(f"{where}: not a readable .npz file ({first_line(error)[:200]})") from error


def check_unpacked(unpacked: int, packed: int, where: str, fix: str) -> None:
    """Raise UserError when packed data would fill the memory: too many bytes, or far more than were packed."""
    bomb = unpacked > PLAIN_UNPACKED and unpacked > MOST_TIMES * packed
    if bomb or unpacked > MOST_UNPACKED:
        raise UserError(f"{where}: unpacks to {size(unpacked)} from {size(packed)}; {fix}")


def _entry(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo, where: str) -> np.ndarray:
    """Return one array of an .npz file."""
    what = f"{where}: {entry.filename}"
    with archive.open(entry) as file:
        header = _header(file, what)
        there = entry.file_size - header.start
        if there != header.bytes:
            raise UserError(
                f"{what}: not a readable .npy array ({there} bytes where its header says {header.bytes})"
            )
        if entry.compress_type != zipfile.ZIP_STORED:
            fix = "save it with np.savez, which is mapped and not read"
            packed = min(entry.compress_size, path.stat().st_size)
            check_unpacked(entry.file_size, packed, what, fix)
            flat = np.frombuffer(file.read(header.bytes), dtype=header.dtype)
            return flat.reshape(header.shape, order=header.order)
    with path.open("rb") as file:
        file.seek(entry.header_offset + 26)  # the local header says how long its two texts are
        lengths = np.frombuffer(file.read(4), dtype="<u2")
        start = entry.header_offset + 30 + int(lengths.sum()) + header.start
        if start + header.bytes > file.seek(0, 2):
            raise UserError(f"{what}: ends before its header says (cut)")
    return _map(path, header, start)


def _header(file: IO[bytes] | zipfile.ZipExtFile, where: str) -> Header:
    try:
        version = np.lib.format.read_magic(file)
        if version not in _READERS:
            raise ValueError(f"format version {version}")
        shape, fortran, dtype = _READERS[version](file)
        if not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError(f"shape {shape}")
        if not dtype.itemsize:
            raise ValueError(f"values of no size ({dtype})")
        if dtype.hasobject:
            raise ValueError("Python objects, which only a pickle can hold; save numbers")
        # as numpy counts: a shape of (0, 2^62) is too large as well
        largest = math.prod(n for n in shape if n) * dtype.itemsize
        if largest >= 1 << 63:
            raise ValueError(f"shape {shape}")
        n_bytes = math.prod(shape) * dtype.itemsize
        return Header(shape, "F" if fortran else "C", dtype, file.tell(), n_bytes)
    except OSError:
        raise
    except Exception as error:  # numpy evaluates a literal: SyntaxError, TokenError, TypeError, RecursionError, ...
        raise UserError(
            f"{where}: not a readable .npy array ({first_line(error)[:200]})"
        ) from error


def _map(path: Path, header: Header, start: int) -> np.ndarray:
    shape, order, dtype = header.shape, header.order, header.dtype
    if not header.bytes:
        return np.empty(shape, dtype, order)
    mapped = np.memmap(path, dtype, mode="r", offset=start, shape=shape, order=order)
    return np.asarray(mapped)  # a plain view: the subclass is slow to index
