"""Sparse encode and decode. The eager code here is the specification of any faster path."""

from wsae.kernels.codes import CodeSums, SparseCode, code_from_dense, code_from_topk, offsets_of
from wsae.kernels.select import select_batch_topk, select_group_topk, select_topk
from wsae.kernels.sparse import Plan, decode, encode_at

__all__ = [
    "CodeSums",
    "Plan",
    "SparseCode",
    "code_from_dense",
    "code_from_topk",
    "decode",
    "encode_at",
    "offsets_of",
    "select_batch_topk",
    "select_group_topk",
    "select_topk",
]
