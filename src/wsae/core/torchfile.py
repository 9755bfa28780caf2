"""Files of `torch.save`: the only ones this project reads that hold a pickle (SAEs and activations of other tools).

Reading is fenced in: a zip as `torch.save` writes it, nothing compressed, its pickle small; `weights_only`, whose
unpickler builds tensors and plain numbers and calls nothing a file names; and then each value is checked to be a dense
tensor no larger than the file, or a number. Writing makes such a file from a plain dict of tensors.
"""

import zipfile
from pathlib import Path

import torch
from torch import Tensor

from wsae.core.errors import UserError
from wsae.core.files import writing

_MAGIC = b"PK\x03\x04"
MAX_PICKLE = 2**20
"""Bytes of the pickle that names the tensors; an SAE's has about one thousand."""


def load_state(path: Path, words: dict[str, str] | None = None) -> dict[str, Tensor]:
    """Read a state dict (numbers become 0-dim tensors); raises UserError for anything else in the file.

    With `words` its strings are put there, and dicts of settings beside the tensors are left out.
    """
    found = _loaded(path, "not a state dict of tensors and numbers", mapped=False)
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds a {type(found).__name__}, not a state dict")
    for key in found:
        if not isinstance(key, str):
            kind = type(key).__name__
            raise UserError(f"{path}: a key of its state dict is a {kind}, not a name")
    room = path.stat().st_size
    if words is not None:
        words.update({key: value for key, value in found.items() if isinstance(value, str)})
        found = {key: value for key, value in found.items() if not isinstance(value, str | dict)}
    return {key: _tensor(key, value, room, path) for key, value in found.items()}


def map_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name, memory-mapped: of a dict, a list (numbered) or the only one.

    Raises UserError for anything else in the file.
    """
    found = _loaded(path, "neither a tensor nor a dict or list of tensors", mapped=True)
    if isinstance(found, Tensor):
        found = {"tensor": found}
    elif isinstance(found, list | tuple):
        found = dict(enumerate(found))
    if not isinstance(found, dict):
        raise UserError(
            f"{path}: holds a {type(found).__name__}, neither a tensor nor a dict of them"
        )
    room = path.stat().st_size
    return {str(key): _tensor(str(key), value, room, path) for key, value in found.items()}


def _loaded(path: Path, otherwise: str, mapped: bool) -> object:
    _check_zip(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except MemoryError:
        raise
    except Exception as error:  # whatever a damaged or hostile file makes the reader say
        reason = str(error).split("\n", 1)[0][:200]
        raise UserError(f"{path}: {otherwise}, so it is not opened ({reason})") from error


def save_state(path: Path, state: dict[str, Tensor]) -> None:
    """Write a plain dict of tensors as `torch.save` does, atomically."""
    save_plain(
        path, {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    )


def save_plain(path: Path, value: object) -> None:
    """Write tensors on the CPU, numbers, text, and dicts and lists of these as `torch.save` does, atomically."""
    with writing(path) as temporary, temporary.open("wb") as file:
        torch.save(value, file)  # by a name, the archive would hold it: other bytes every time


def _check_zip(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with path.open("rb") as file:
            begins = file.read(len(_MAGIC)) == _MAGIC
        if not begins:  # a zip may begin anywhere, but torch.load takes such a file for its old format, a bare pickle
            raise zipfile.BadZipFile("does not begin with an entry")
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise UserError(
            f"{path}: not a zip as torch.save writes it (cut, altered, or of a torch before 1.6): {error}"
        ) from error
    size = path.stat().st_size
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > size:
            raise UserError(
                f"{path}: entry {entry.filename!r} is compressed; torch.save does not do that"
            )
        if entry.filename.endswith(".pkl") and entry.file_size > MAX_PICKLE:
            raise UserError(
                f"{path}: a pickle of {entry.file_size:,} bytes; a state dict needs a few thousand"
            )


def _tensor(name: str, value: object, room: int, path: Path) -> Tensor:
    if isinstance(value, int | float):
        kind = torch.float32 if isinstance(value, float) else None
        return torch.tensor(value, dtype=kind, device="cpu")
    if not isinstance(value, Tensor):
        raise UserError(f"{path}: {name} is a {type(value).__name__}, not a tensor or a number")
    dense = value.layout == torch.strided and value.device.type == "cpu"
    if not dense or value.is_quantized or value.numel() * value.element_size() > room:
        raise UserError(f"{path}: {name} is not a dense tensor that fits into this file")
    return value.detach()
