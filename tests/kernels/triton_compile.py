"""Compile the kernels for a Hopper GPU with Triton's own assembler. `test_kernels_triton_compiled` runs this."""

import json
import re
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from wsae.kernels.triton import encode, sums, update
from wsae.kernels.triton import encode as above
from wsae.kernels.triton import encode as group
from wsae.kernels.triton.encode import CONFIGS

FLOATS = ("rate", "scale", "eps", "new1", "old2", "new2")
INT64 = ("keys", "indices", "order", "starts", "offsets", "chunk_offsets", "latents")
INT32 = ("columns", "ends", "words")
POINTERS = (
    *("x", "w", "x_exact", "w_exact", "bias", "limits", "values", "out", "matrix", "weights"),
    *("chunk_sums", "left", "W", "m", "v", "rows"),
)


def kind(name: str, product: str) -> str:
    if name in FLOATS:
        return "fp32"
    if name in INT64:
        return "*i64"
    if name in INT32:
        return "*i32"
    if name in ("x", "w"):
        return product
    return "*fp32" if name in POINTERS else "i32"


def compiled(kernel, constants: dict, product: str = "*bf16", **special: str) -> dict:
    """Return what became of a kernel: the spill slots and tensor-core instructions of its code."""
    options = {"num_warps": constants.pop("warps", 4), "num_stages": constants.pop("stages", 2)}
    function = getattr(kernel, "fn", kernel) if hasattr(kernel, "configs") else kernel
    names = function.arg_names
    signature = {
        name: "constexpr" if name in constants else special.get(name, kind(name, product))
        for name in names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or (name == "D" and name not in constants)
    }
    source = ASTSource(function, signature, constants, aligned)
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = code.asm["ptx"]
    return {
        "name": function.__name__,
        "cubin": len(code.asm["cubin"]),
        "tensor_core": len(re.findall(r"wgmma\.mma_async", ptx)),
        "atomics": len(re.findall(r"\batom\.|\bred\.", ptx)),
    }


def main() -> None:
    tile = {**CONFIGS[0].kwargs, "warps": CONFIGS[0].num_warps, "stages": CONFIGS[0].num_stages}
    small = {**CONFIGS[3].kwargs, "warps": CONFIGS[3].num_warps}
    merge = {"WIDTH": 64, "TOP": 4, "SIZE": 8, "BN": 256, "LANES": 8, "BK": 64}
    rows = {"PAIRS": 8, "BD": 256}
    no_order = {"order": None, "chunk_sums": None, "chunk_offsets": None}
    given = dict.fromkeys(
        ("columns", "weights", "order", "starts", "ends", "chunk_sums", "chunk_offsets")
    )
    step = {"UNIT": True, "PAIRS": 4, "BD": 1024}
    found = [
        compiled(encode._candidates, {"BN": 256, "SIZE": 64, **small}, "*fp32"),
        compiled(encode._candidates, {"BN": 256, "SIZE": 64, **tile}),
        compiled(encode._merge, merge),
        compiled(encode._merge, {**merge, "D": 1, "k": 1, "bias": None}),
        compiled(group._winners, {"BN": 256, **tile}),
        compiled(above._compare, {"BN": 256, **tile}),
        compiled(sums._sums, dict(rows)),
        compiled(sums._sums, {**rows, **no_order}, columns="*i64", ends="*i64"),
        compiled(sums._products, dict(rows), w="*fp32", rows="*i64"),
        compiled(update._step, {**step, "factor": None, "squares": None}),
        compiled(update._step, dict(step), factor="*fp32", squares="*fp32"),
        compiled(update._step, {**step, **given}, factor="*fp32", squares="*fp32"),
    ]
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
