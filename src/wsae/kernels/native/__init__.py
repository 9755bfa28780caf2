"""Compiled CPU kernels: built once by the machine's own C++ compiler, loaded through ctypes, optional.

The eager code in `wsae.kernels.eager` is the specification.
"""
