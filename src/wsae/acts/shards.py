"""One shard of a store, written as rows arrive: memory does not grow with the shard.

A safetensors header needs the sizes, so room for it is left at the start and filled in at the end.
"""

import contextlib
import json
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from wsae.acts.flow import Step
from wsae.core.artifact import FileRecord, record
from wsae.core.errors import UserError
from wsae.core.files import writing

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int32: "I32"}
_HEADER_BYTES = 512


def shard_name(split: str, hook: str | None, number: int) -> str:
    """Return the relative path of a shard of one hook's rows, or of the token ids (hook None)."""
    return (
        f"{split}/tokens-{number:05d}.safetensors"
        if hook is None
        else f"{split}/{hook}/acts-{number:05d}.safetensors"
    )


class Form(NamedTuple):
    """What a store's shards look like."""

    dtype: str
    """Precision on disk."""
    shard_rows: int
    """Rows after which a shard is closed."""
    seq_len: int | None
    """Token ids kept per sequence; none where rows do not come from text."""


class _RowFile:
    """A safetensors file with one tensor that grows by rows and a few that are added at the end."""

    def __init__(self, file: BinaryIO, name: str, width: int, dtype: torch.dtype) -> None:
        self._file, self._name, self._width, self._dtype = file, name, width, dtype
        self._rows = 0
        file.write(bytes(8 + _HEADER_BYTES))

    def append(self, rows: Tensor) -> None:
        assert (rows.dtype, rows.shape[1]) == (self._dtype, self._width)
        self._file.write(_bytes(rows))
        self._rows += len(rows)

    def finish(self, extra: dict[str, Int[Tensor, " rows"]]) -> None:
        end = self._rows * self._width * self._dtype.itemsize
        entries = {self._name: _entry(self._dtype, (self._rows, self._width), 0, end)}
        for name, tensor in extra.items():
            self._file.write(_bytes(tensor))
            entries[name] = _entry(tensor.dtype, tuple(tensor.shape), end, end + tensor.nbytes)
            end += tensor.nbytes
        header = json.dumps(entries).encode().ljust(_HEADER_BYTES)
        assert len(header) == _HEADER_BYTES
        self._file.seek(0)
        self._file.write(_HEADER_BYTES.to_bytes(8, "little") + header)


class ShardWriter:
    """Writes one shard of every hook and of any token ids; all files appear at `finish`, none after `abort`."""

    def __init__(
        self, out: Path, split: str, number: int, hooks: dict[str, int], form: Form
    ) -> None:
        self._out, self._dtype = out, DTYPES[form.dtype]
        self._names: list[str] = []
        self._stack = contextlib.ExitStack()
        self._seq, self._pos, self._lengths = [], [], []
        self.rows = self.sequences = 0
        try:
            self._tokens = (
                self._open(shard_name(split, None, number), "ids", form.seq_len, torch.int32)
                if form.seq_len
                else None
            )
            self._acts = {
                hook: self._open(shard_name(split, hook, number), "acts", d_in, self._dtype)
                for hook, d_in in hooks.items()
            }
        except BaseException as error:
            self.abort(error)
            raise

    def append(self, step: Step) -> None:
        """Add a step's kept rows and its sequences."""
        try:
            if self._tokens is not None:
                self._tokens.append(step.ids)
            for hook, file in self._acts.items():
                file.append(step.x[hook].to(self._dtype))
        except BaseException as error:
            self.abort(error)
            raise
        self._seq.append(step.seq.int())
        self._pos.append(step.pos.int())
        self._lengths.append(step.lengths)
        self.rows += len(step.seq)
        self.sequences += len(step.ids)

    def finish(self) -> dict[str, FileRecord]:
        """Complete and rename every file; return their records by name."""
        try:
            if self._tokens is not None:
                self._tokens.finish({"lengths": torch.cat(self._lengths)})
            for file in self._acts.values():
                file.finish({"seq": torch.cat(self._seq), "pos": torch.cat(self._pos)})
        except BaseException as error:
            self.abort(error)
            raise
        self._stack.close()
        return {name: record(self._out / name) for name in self._names}

    def abort(self, error: BaseException) -> None:
        """Remove the unfinished files (a full disk becomes a UserError here)."""
        self._stack.__exit__(type(error), error, error.__traceback__)

    def _open(self, name: str, tensor: str, width: int, dtype: torch.dtype) -> _RowFile:
        self._names.append(name)
        temporary = self._stack.enter_context(writing(self._out / name))
        return _RowFile(self._stack.enter_context(temporary.open("wb")), tensor, width, dtype)


def as_stored(step: Step, dtype: str) -> Step:
    """Return the step with kept rows rounded as stored; raises UserError when float16 cannot hold a value."""
    kind = DTYPES[dtype]
    if kind == torch.float32:
        return step
    return step._replace(x={hook: _rounded(x, kind, hook) for hook, x in step.x.items()})


def _rounded(
    x: Float[Tensor, "rows d_in"], dtype: torch.dtype, hook: str
) -> Float[Tensor, "rows d_in"]:
    y = x.to(dtype).float()
    if (
        dtype == torch.float16
        and not bool(torch.isfinite(y.sum()))
        and not bool(torch.isfinite(y).all())
    ):
        worst = float(x.abs().max())
        raise UserError(
            f"{hook}: activation of size {worst:.0f} does not fit float16; use --store-dtype bfloat16"
        )
    return y


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.contiguous()
    return (flat.view(torch.int16) if flat.dtype == torch.bfloat16 else flat).numpy().data


def _entry(dtype: torch.dtype, shape: tuple[int, ...], begin: int, end: int) -> dict[str, object]:
    return {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
