"""Checkpoints of a run on many ranks: torch.distributed.checkpoint in safetensors, for any other number of ranks.

Each rank writes the latents it holds to one safetensors file with their offsets. The tensors have the names that
`wsae.train.checkpoint` gives them, so either kind of checkpoint resumes on any mesh.
"""

import shutil
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as Cut

from wsae.core.artifact import (
    MANIFEST,
    FileRecord,
    check_file,
    read_manifest,
    record,
    write_manifest,
)
from wsae.core.errors import UserError
from wsae.core.files import as_user_error, read_json, refusals, write_json
from wsae.train.checkpoint import KEEP, checkpoints, member_tensors
from wsae.train.parallel.shard import Shard
from wsae.train.parallel.world import World

_PLACE = "position.json"
_ROWS = ("sae.W_dec", "sae.b_enc", "sae.log_threshold", "since_fired", "dead")
_COLUMNS = ("sae.W_enc", "latent_moments")


def save(run: Path, step: int, shards: list[Shard], place: dict[str, Any], world: World) -> Path:
    """Write `run/checkpoints/step-N`, every rank its part, manifest last, then drop all but the newest two.

    `place` is JSON-ready, as for one process. Raises UserError when a rank cannot write.
    """
    path = place_of(run, step)
    world.from_first(lambda: _empty(path))
    writer = HuggingFaceStorageWriter(str(path), save_distributed=True)
    tensors = {key: value for shard in shards for key, value in _state(shard, world, True).items()}
    try:
        dcp.save(tensors, storage_writer=writer)
    except CheckpointException as error:
        _explain(error, path)
    name = f"shard-{world.rank + 1:05d}-model-00001-of-00001.safetensors"
    own = {name: record(path / name).to_dict()} if (path / name).exists() else {}
    records = {k: FileRecord.parse(v) for part in world.to_first(own) for k, v in part.items()}
    world.from_first(lambda: _complete(run, path, {"step": step, **place}, records))
    return path


def place_of(run: Path, step: int) -> Path:
    """Return the directory of the checkpoint after `step` steps."""
    return run / "checkpoints" / f"step-{step:09d}"


def _empty(path: Path) -> None:
    """Make room: what a killed job left here may have been cut for more ranks."""
    if path.exists():
        shutil.rmtree(path)
    with refusals(path):
        path.mkdir(parents=True)


def _complete(run: Path, path: Path, place: dict[str, Any], files: dict[str, FileRecord]) -> None:
    write_json(path / _PLACE, place)
    files = {**files, _PLACE: record(path / _PLACE)}
    write_manifest(path, "checkpoint", {"step": place["step"]}, files)
    for old in checkpoints(run)[:-KEEP]:
        (old / MANIFEST).unlink()  # first: half a removal must not look whole
        shutil.rmtree(old)


def _explain(error: CheckpointException, path: Path) -> NoReturn:
    """Raise the first rank's own error in place of the collection of them."""
    for failure in error.failures.values():
        cause = failure[0]
        if isinstance(cause, OSError):
            raise as_user_error(cause, path) from error
        raise cause from error
    raise error


def load(run: Path, shards: list[Shard], world: World) -> dict[str, Any] | None:
    """Restore the newest checkpoint, of whatever mesh, and return its place, or None when there is none.

    Each rank reads the latents it holds and checks a share of the files. Raises UserError naming the file when the
    checkpoint is cut, altered or of another run.
    """
    found = world.from_first(lambda: [str(path) for path in checkpoints(run)])
    if not found:
        return None
    path = Path(found[-1])
    try:
        manifest = read_manifest(path, "checkpoint", verify=False)
        for number, (name, expected) in enumerate(sorted(manifest.files.items())):
            if number % world.layout.ranks == world.rank:
                check_file(path, name, expected)
        place = read_json(path / _PLACE)
    except UserError as error:
        raise UserError(f"{error}; remove {path} to resume from the checkpoint before") from error
    for shard in shards:
        shard.show_sums()
    tensors = {key: value for shard in shards for key, value in _state(shard, world).items()}
    reader = HuggingFaceStorageReader(str(path))
    if not tensors.keys() <= reader.read_metadata().state_dict_metadata.keys():
        raise UserError(f"{path}: holds other members than this run's config; use another --out")
    dcp.load(tensors, storage_reader=reader)
    for shard in shards:
        shard.take_sums()
        shard.count_dead()
    return place


def _state(shard: Shard, world: World, to_write: bool = False) -> dict[str, Any]:
    """Return a member's tensors by name; those over latents are DTensors cut along them, the others plain.

    They share memory with the member, so that loading fills it, except the copies that writing needs contiguous.
    """
    member, found = shard.member, {}
    parameters = member.optimizer.param_groups[0]["params"]
    for key, tensor in member_tensors(member).items():
        dim = 0 if key in _ROWS else 1 if key in _COLUMNS else None
        if key.startswith("adam.") and tensor.ndim:
            dim = None if parameters[int(key.split(".")[1])] is member.sae.b_dec else 0
        tensor = tensor.detach()
        tensor = tensor.contiguous() if to_write else tensor
        found[f"{shard.key}|{key}"] = tensor if dim is None else _cut(tensor, dim, shard, world)
    return found


def _cut(local: Tensor, dim: int, shard: Shard, world: World) -> DTensor:
    shape = list(local.shape)
    shape[dim] = shard.piece.d_sae
    stride = torch.empty(shape, dtype=torch.float32, device="meta").stride()
    placements = [Replicate(), Cut(dim)]
    return DTensor.from_local(
        local, world.sub, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )
