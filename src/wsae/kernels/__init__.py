"""Sparse encode and decode: `eager` is the specification of the faster ways, `native` on CPUs and `triton` on GPUs."""
