"""Compile and load the kernels: once per machine and version, kept in the user's cache directory."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from wsae.core.files import flush

FOLDER = Path(__file__).parent
SOURCES = ("common.h", "select.cpp", "sparse.cpp")
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
ALLOCATING = ("select_int8", "sort_pairs", "dots", "update_latents")
"""Kernels with working memory of their own: they return 1 when there is none left."""
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


@functools.cache
def has_int8() -> bool:
    """Say whether this CPU multiplies 8-bit integers fast (AVX-512 VNNI)."""
    return os.environ.get(SWITCH) != "float32" and bool(library().has_int8())


@functools.cache
def _load() -> ctypes.CDLL | str:
    """Load once per process; a failure is remembered too, so that it is tried and told once."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0 turns them off"
    try:
        lib = ctypes.CDLL(str(_built()))
    except (Unavailable, OSError) as error:
        return str(error)
    for name in ALLOCATING:
        function = getattr(lib, name)
        function.restype, function.errcheck = ctypes.c_int64, _succeeded
    return lib


def _succeeded(status: int, function: object, _arguments: object) -> int:
    """Raise MemoryError where a kernel says that memory ran out."""
    if status:
        name = getattr(function, "__name__", "a kernel")
        raise MemoryError(f"std::bad_alloc in the compiled kernel {name}")
    return status


def _built() -> Path:
    """Return the path of the compiled library for this source, compiler and CPU."""
    compiler = _compiler()
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    parts = [(FOLDER / name).read_bytes() for name in SOURCES]
    parts += [version, " ".join(FLAGS).encode(), _cpu().encode()]
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    path = _cache() / f"kernels-{key}.so"
    if not path.exists():
        _compile(compiler, path)
    return path


def _compile(compiler: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(suffix=".so", dir=path.parent)
    os.close(handle)
    files = [str(FOLDER / source) for source in SOURCES if source.endswith(".cpp")]
    try:
        subprocess.run(
            [compiler, *FLAGS, *files, "-o", name],
            capture_output=True,
            check=True,
            timeout=TIMEOUT,
            text=True,
        )
        flush(Path(name))  # half a library would be loaded after a power cut
        os.replace(name, path)  # whole or not there, whoever else compiles at the same time
    except subprocess.CalledProcessError as error:
        first = next((line for line in error.stderr.splitlines() if "error" in line), "no message")
        raise Unavailable(f"{compiler} failed: {first.strip()}") from error
    except (subprocess.TimeoutExpired, OSError) as error:
        raise Unavailable(f"{compiler} failed: {error}") from error
    finally:
        Path(name).unlink(missing_ok=True)


def _compiler() -> str:
    chosen = os.environ.get("CXX")
    for name in (chosen,) if chosen else COMPILERS:
        found = shutil.which(name)
        if found:
            return found
    raise Unavailable(f"no C++ compiler found ({chosen or ', '.join(COMPILERS)}); install g++")


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "wsae" / "native"


def _cpu() -> str:
    """Return what -march=native depends on: a cache shared by several machines keeps one library for each kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.platform() + platform.processor()
    kinds = ("model name", "flags", "Features", "CPU part")
    return "".join(sorted({line for line in lines if line.startswith(kinds)}))
