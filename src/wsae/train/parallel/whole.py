"""A checkpoint of many ranks as one process reads it."""

import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader


def read_whole(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """Return the whole tensors of a checkpoint whose names begin with `prefix`, without it, on this rank alone."""
    known = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    tensors: dict[str, Tensor] = {}
    for key, entry in known.items():
        if key.startswith(prefix):
            assert isinstance(entry, dcp.TensorStorageMetadata)
            tensors[key] = torch.empty(entry.size, dtype=entry.properties.dtype)
    with warnings.catch_warnings():  # that one process reads alone is what is wanted
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
