"""A batch of sparse codes in row-compressed form, shared by every activation function."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int, Int64
from torch import Tensor


class SparseCode(NamedTuple):
    """Active latents of a batch: row b holds entries offsets[b] : offsets[b + 1]. A value of exactly 0 is inactive."""

    values: Float[Tensor, " nnz"]
    indices: Int64[Tensor, " nnz"]
    offsets: Int64[Tensor, " batch_plus_1"]

    @property
    def batch(self) -> int:
        """Number of rows."""
        return len(self.offsets) - 1

    def rows(self) -> Int64[Tensor, " nnz"]:
        """Return the row of each entry."""
        counts = self.offsets.diff()
        return torch.repeat_interleave(counts, output_size=len(self.indices))

    def active(self) -> Int64[Tensor, ""]:
        """Return the number of active latents, all rows together."""
        return torch.count_nonzero(self.values)

    def sums(self, d_sae: int, moments: bool) -> "CodeSums":
        """Return sums over the rows; those of z and z^2 where asked for."""
        fired = torch.zeros(d_sae, dtype=torch.int32, device=self.indices.device)
        fired.index_add_(0, self.indices, (self.values != 0).int())
        if not moments:
            return CodeSums(self.batch, fired)
        z = self.values.double()
        both = [torch.bincount(self.indices, w, minlength=d_sae) for w in (z, z * z)]
        return CodeSums(self.batch, fired, torch.stack(both))

    def where(self, kept: Bool[Tensor, " nnz"]) -> "SparseCode":
        """Return the entries for which `kept` is true."""
        offsets = offsets_of(self.rows()[kept], self.batch)
        return SparseCode(self.values[kept], self.indices[kept], offsets)

    def padded(self) -> tuple[Float[Tensor, "batch k"], Int64[Tensor, "batch k"]]:
        """Return values and indices as rectangles; shorter rows end in value 0, index 0."""
        counts, rows = self.offsets.diff(), self.rows()
        width = int(counts.max()) if self.batch else 0
        place = torch.arange(len(rows), device=rows.device) - self.offsets[rows]
        values = self.values.new_zeros(self.batch, width).index_put((rows, place), self.values)
        indices = self.indices.new_zeros(self.batch, width)
        return values, indices.index_put((rows, place), self.indices)

    def dense(self, d_sae: int) -> Float[Tensor, "batch d_sae"]:
        """Return z [batch, d_sae]."""
        z = self.values.new_zeros(self.batch, d_sae)
        return z.index_put((self.rows(), self.indices), self.values, accumulate=True)


class CodeSums(NamedTuple):
    """A batch's codes by their sums over the rows alone."""

    batch: int
    fired: Int[Tensor, " d_sae"]
    """Rows in which each latent is active."""
    moments: Float64[Tensor, "2 d_sae"] | None = None
    """Of z and z^2."""

    def active(self) -> Int64[Tensor, ""]:
        """Return the number of active latents, all rows together."""
        return self.fired.sum()

    def sums(self, d_sae: int, moments: bool) -> "CodeSums":  # noqa: ARG002
        """Return itself."""
        return self


def code_from_topk(
    values: Float[Tensor, "batch k"], indices: Int64[Tensor, "batch k"]
) -> SparseCode:
    """Flatten the same number of entries per row."""
    batch, k = values.shape
    offsets = (
        torch.arange(0, batch * k + 1, k, device=values.device) if k else _zeros(batch, values)
    )
    return SparseCode(values.reshape(-1), indices.reshape(-1), offsets)


def code_from_dense(z: Float[Tensor, "batch d_sae"]) -> SparseCode:
    """Keep the non-zero entries of z."""
    rows, indices = z.nonzero(as_tuple=True)
    return SparseCode(z[rows, indices], indices, offsets_of(rows, len(z)))


def offsets_of(rows: Int64[Tensor, " nnz"], batch: int) -> Int64[Tensor, " batch_plus_1"]:
    """Return row offsets of entries sorted by row."""
    counts = torch.bincount(rows, minlength=batch)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _zeros(batch: int, like: Tensor) -> Tensor:
    return torch.zeros(batch + 1, dtype=torch.int64, device=like.device)
