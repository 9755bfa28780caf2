"""Compiled CPU kernels: built once by the machine's own C++ compiler, loaded through ctypes, optional.

The eager code in `wsae.ops.select`, `wsae.ops.sparse` and `wsae.ops.update` is the specification.
"""

from wsae.ops.native.build import Unavailable, library, why_not

__all__ = ["Unavailable", "library", "why_not"]
