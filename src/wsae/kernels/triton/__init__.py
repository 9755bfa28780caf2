"""The SAE step on a GPU, written in Triton; `wsae.kernels.eager` is the specification.

`support.unsupported` says whether the kernels do a case and imports no Triton; the rest needs it:
`encode` (Top-k fused into the encoder, group Top-k, a threshold, batch Top-k), `sums` (sparse decode, products of
pairs, weight gradients), `update` (gradient, Adam and unit norm in one pass).

Whoever reads the kernels: lanes past the end are masked or repeat the last row; sums are in fp32 (fp64 for fp64) and in
a fixed order, so a step is reproducible; nothing waits for the host unless its docstring says so.
"""
