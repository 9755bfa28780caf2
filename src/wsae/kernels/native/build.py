"""Compile and load the kernels: once per machine and version, kept in the user's cache folder."""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from wsae.core.cache import cached, cached_privately
from wsae.core.calls import one_thread

FOLDER = Path(__file__).parent
LIBRARY = "kernels.so"
SOURCES = ("common.h", "tasks.h", "select.cpp", "sparse.cpp")
COMPILERS = ("c++", "g++", "clang++")
FLAGS = (
    "-O3",
    "-march=native",
    "-std=c++17",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-shared",
    "-fPIC",
    "-w",
)
KERNELS = {
    "has_int8": "",
    "set_threads": "N",
    "meet_ranks": "PNNNN",
    "to_slices": "PPNNPP",
    "from_slices": "PPNNP",
    "sort_pairs": "PPNNNPNPPP",
    "decode": "PPPPPNNNP",
    "dots": "PPPPNNNP",
    "residual": "PPPNNPP",
    "measure_rows": "PPNNPP",
    "pack": "PPPPNNNPPP",
    "padded_latents": "NN",
    "packed_bytes": "NNN",
    "select_int8": "PPPNNPP",
    "product_int8": "PPNN",
    "new_lists": "",
    "free_lists": "P",
    "collect": "PPP",
    "rank_levels": "PNNNP",
    "keep_shared": "PNNNNPPPPP",
    "update_latents": "P",
}
"""What each kernel takes: pointers (P) and 64-bit numbers (N)."""
ALLOCATING = ("select_int8", "keep_shared", "rank_levels", "sort_pairs", "dots", "update_latents")
"""Kernels with working memory of their own: they return 1 when there is none left, 2 for a code that does not fit, 3
when a function that they were given failed."""
TIMEOUT = 300
SWITCH = "WSAE_NATIVE"
"""Environment variable: 0 turns the compiled kernels off, float32 the 8-bit selection alone."""


class Unavailable(Exception):
    """The compiled kernels cannot be used here; the message says why."""


def why_not() -> str | None:
    """Return None where the compiled kernels work, else the reason in a few words."""
    try:
        library()
    except Unavailable as error:
        return str(error)
    return None


def library() -> ctypes.CDLL:
    """Return the loaded library, compiling it the first time; raises Unavailable with the reason."""
    found = _load()
    if isinstance(found, str):
        raise Unavailable(found)
    return found


@contextlib.contextmanager
def kernel_threads(n: int) -> Iterator[None]:
    """Let the kernels called here use n threads and PyTorch one, whose small tasks are not worth waiting for others.

    With as many threads as cores each has a core to itself meanwhile (Linux). No bit of a kernel's result depends on n.
    """
    with one_thread():
        library().set_threads(n)
        try:
            yield
        finally:
            library().set_threads(0)


@functools.cache
def has_int8() -> bool:
    """Return whether this CPU multiplies 8-bit integers fast (AVX-512 VNNI)."""
    return os.environ.get(SWITCH) != "float32" and bool(library().has_int8())


@functools.cache
def _load() -> ctypes.CDLL | str:
    """Load once per process; a failure is remembered too, so that it is tried and told once."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0 turns them off"
    reason = None
    for _ in range(
        2
    ):  # then in a folder of our own: a cache's file system may forbid running what lies there
        try:
            return _opened(_built(reason))
        except Unavailable as error:
            return str(error)
        except (OSError, AttributeError) as error:
            reason = str(error)
    return str(reason)


def _opened(path: Path) -> ctypes.CDLL:
    lib = ctypes.CDLL(str(path))
    for name, takes in KERNELS.items():
        function = getattr(lib, name)
        function.argtypes = [ctypes.c_void_p if kind == "P" else ctypes.c_int64 for kind in takes]
        function.restype = ctypes.c_void_p if name == "new_lists" else ctypes.c_int64
        if name in ALLOCATING:
            function.errcheck = _succeeded
    return lib


def _succeeded(status: int, function: object, _arguments: object) -> int:
    """Raise what a kernel says: memory ran out, or a code names latents or tokens that there are not."""
    name = getattr(function, "__name__", "a kernel")
    if status == 3:
        raise RuntimeError(f"what the compiled kernel {name} asked for failed")
    if status == 2:
        raise ValueError(f"a sparse code that does not fit in the compiled kernel {name}")
    if status:
        raise MemoryError(f"std::bad_alloc in the compiled kernel {name}")
    return status


def _built(refused: str | None = None) -> Path:
    """Return the path of the compiled library for this source, compiler and CPU.

    `refused` says why the library in the cache could not be loaded: one in a temporary folder is made then.
    """
    compiler = _compiler()
    try:
        told = subprocess.run(
            [*compiler, "--version"], capture_output=True, check=False, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{compiler[-1]} failed: {error}") from error
    parts = [(FOLDER / name).read_bytes() for name in SOURCES]
    parts += [told.stdout, " ".join(FLAGS).encode(), _cpu().encode()]
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]

    def make(folder: Path) -> None:
        _compile(compiler, folder)

    if refused is not None:
        return cached_privately("native", key, make, refused) / LIBRARY
    return cached("native", key, make) / LIBRARY


def _compile(compiler: list[str], folder: Path) -> None:
    files = [str(FOLDER / source) for source in SOURCES if source.endswith(".cpp")]
    try:
        subprocess.run(
            [*compiler, *FLAGS, *files, "-o", str(folder / LIBRARY)],
            capture_output=True,
            check=True,
            timeout=TIMEOUT,
            text=True,
            errors="replace",
            env={**os.environ, "TMPDIR": str(folder)},  # the compiler's own scratch files too
        )
    except subprocess.CalledProcessError as error:
        first = next((line for line in error.stderr.splitlines() if "error" in line), "no message")
        raise Unavailable(f"{compiler[-1]} failed: {first.strip()}") from error
    except (subprocess.TimeoutExpired, OSError) as error:
        raise Unavailable(f"{compiler[-1]} failed: {error}") from error
    if not (folder / LIBRARY).is_file():
        raise Unavailable(f"{compiler[-1]} failed: it wrote no library")


def _compiler() -> list[str]:
    """Return the compiler's command: $CXX, which may begin with a helper (`ccache g++`), or the first that is there."""
    chosen = os.environ.get("CXX", "").split()
    for name, *rest in (chosen,) if chosen else ([name] for name in COMPILERS):
        found = shutil.which(name)
        if found:
            return [found, *rest]
    wanted = " ".join(chosen) or ", ".join(COMPILERS)
    raise Unavailable(f"no C++ compiler found ({wanted}); install g++")


def _cpu() -> str:
    """Return what -march=native depends on: a cache shared by several machines keeps one library for each kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.platform() + platform.processor()
    kinds = ("model name", "flags", "Features", "CPU part")
    return "".join(sorted({line for line in lines if line.startswith(kinds)}))
