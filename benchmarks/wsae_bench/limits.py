"""What this machine can do: the primitives of a training step, timed one by one. Loaded by path.

The floor of a step is the encoder product into a buffer that is used again, in fp32 or bf16, whichever is faster, and
torch's fused Adam over both weight matrices: no exact trainer that computes the whole product can be faster. One that
finds the active latents with 8-bit integers is held against the 8-bit floor: that product alone, nothing compared or
kept, and the same Adam.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from wsae.kernels.native.build import has_int8, why_not
from wsae.kernels.native.select import RoundedEncoder, dimension_scales, product_int8
from wsae.kernels.native.slices import to_slices

SLOW = 3.0
"""A product that takes so many times the other's time is no candidate for the floor and is not timed again."""


def make(job: Any, _state: Any, x: Tensor) -> "Limits":
    """Return the primitives at the job's size; `x` [batch, d_in] is any batch."""
    return Limits(job, x)


class Limits:
    """Matrices, gradients and buffers of one size, and the primitives on them."""

    lr = None

    def __init__(self, job: Any, x: Tensor) -> None:
        self.job = job
        rows = torch.randn(job.d_sae, job.d_in, dtype=torch.float32) / job.d_in**0.5
        self.rows = torch.nn.Parameter(rows)
        self.decoder = torch.nn.Parameter(rows.clone())
        for matrix in (self.rows, self.decoder):
            matrix.grad = torch.randn_like(matrix)
        pair = [self.rows, self.decoder]
        self.adams = {
            "adam_fused": torch.optim.Adam(pair, lr=1e-9, fused=True),
            "adam_foreach": torch.optim.Adam(pair, lr=1e-9, foreach=True),
        }
        self.pre = torch.empty(job.batch, job.d_sae, dtype=torch.float32)
        self.low = torch.empty(job.batch, job.d_sae, dtype=torch.bfloat16)
        self.codes, self.values = self._codes(x)
        self.rounded = self._rounded(rows)
        self.best: dict[str, bool] = {}
        self.slow: dict[str, float] = {}

    def _codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return k random latents a row [batch, k] and the transposed code [d_sae, batch] as CSR."""
        job = self.job
        codes = torch.randint(job.d_sae, (job.batch, job.k))
        flat, order = codes.flatten().sort()
        starts = torch.searchsorted(flat, torch.arange(job.d_sae + 1))
        shape = (job.d_sae, len(x))
        weights = torch.rand(len(flat), dtype=torch.float32)
        transposed = torch.sparse_csr_tensor(starts, order // job.k, weights, shape)
        return codes, transposed

    @torch.no_grad()
    def step(self, _step: int, x: Tensor) -> dict[str, float]:
        """Time every primitive once, in seconds; the products in the layout of the weights that suits them."""
        low = (x.bfloat16(), self.rows.detach().bfloat16())
        fp32 = self._product("fp32", x, self.rows.detach(), self.pre)
        bf16 = self._product("bf16", *low, self.low, SLOW * fp32)
        parts = {
            "mm_fp32": fp32,
            "mm_bf16": bf16,
            **self._eight_bits(x),
            "cast_to_bf16": timed(lambda: (x.bfloat16(), self.rows.bfloat16())),
            "topk": timed(lambda: self.pre.topk(self.job.k, sorted=False)),
            "embedding_bag": timed(self._bag),
            "grad_sparse_csr": timed(lambda: self.values @ x),
            "grad_dense": timed(lambda: torch.mm(self.pre.T, x, out=self.decoder.grad)),
            "copy_matrix": timed(lambda: self.rows.detach().copy_(self.decoder)),
        }
        return parts | {name: timed(adam.step) for name, adam in self.adams.items()}

    def _rounded(self, rows: Tensor) -> Any:
        """Return the compiled kernels' 8-bit encoder, None where they have none."""
        if why_not() is not None or not has_int8():
            return None
        d_sae, d_in = rows.shape
        self.slices = to_slices(rows)
        rounded = RoundedEncoder(d_sae, d_in, d_sae, dimension_scales(torch.ones(d_in)))
        rounded.measure(self.slices)
        rounded.pack(self.slices)
        return rounded

    def _eight_bits(self, x: Tensor) -> dict[str, float]:
        """Time the 8-bit product of the compiled kernels, which is faster than torch._int_mm."""
        if self.rounded is None:
            return {}
        return {"mm_int8": timed(lambda: product_int8(self.rounded, self.slices, x))}

    def _bag(self) -> Tensor:
        weights = torch.ones(self.codes.shape, dtype=torch.float32)
        return torch.nn.functional.embedding_bag(
            self.codes, self.decoder, mode="sum", per_sample_weights=weights
        )

    def _product(
        self, dtype: str, x: Tensor, rows: Tensor, out: Tensor, limit: float = math.inf
    ) -> float:
        """Return the seconds of x @ rows^T; the first time both layouts of the weights are tried.

        A type whose first product takes longer than `limit` (bf16 where the CPU emulates it) keeps that time.
        """
        if dtype in self.slow:
            return self.slow[dtype]
        columns = rows.T.contiguous()
        if dtype not in self.best:
            first = timed(lambda: torch.mm(x, rows.T, out=out))
            if first > limit:
                self.slow[dtype] = first
                return first
            by_rows = timed(lambda: torch.mm(x, rows.T, out=out))
            self.best[dtype] = by_rows <= timed(lambda: torch.mm(x, columns, out=out))
        return timed(lambda: torch.mm(x, rows.T if self.best[dtype] else columns, out=out))

    def reconstruct(self, x: Tensor) -> None:  # noqa: ARG002
        """Primitives reconstruct nothing."""


def timed(call: Callable[[], object]) -> float:
    """Return the seconds one call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
