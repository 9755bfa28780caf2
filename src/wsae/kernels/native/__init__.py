"""Compiled CPU kernels: built once by the machine's own C++ compiler, loaded through ctypes, optional.

The eager code in `wsae.kernels.select`, `wsae.kernels.sparse` and `wsae.kernels.update` is the specification.
"""

from wsae.kernels.native.build import (
    Unavailable,
    kernel_threads,
    library,
    why_not,
)

__all__ = ["Unavailable", "kernel_threads", "library", "why_not"]
