"""NumPy's .npy and .npz files, read without believing them: no header makes memory be reserved for data not there.

An array of a file is mapped where it lies unpacked, so nothing is read before it is asked for. A packed one is read
whole, when it is not far too large. Python objects, which only a pickle can hold, are refused.
"""

import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Literal, NamedTuple

import numpy as np

from wsae.core.errors import UserError, first_line
from wsae.core.files import opened
from wsae.core.memory import size

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
