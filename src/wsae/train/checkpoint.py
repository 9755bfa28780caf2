"""Checkpoints: the whole state of a run at a step, so that a killed run continues bit for bit."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wsae.core.artifact import CHECKPOINTS, MANIFEST, FileRecord, read_manifest, write_manifest
from wsae.core.errors import UserError, understood
from wsae.core.files import read_json, write_json
from wsae.core.tensors import load_tensors, save_tensors
from wsae.train.family import FamilyState
from wsae.train.native import as_usual, leave
from wsae.train.state import SUMS, MemberState

KEEP = 2
PLACE, _STATE = "position.json", "state.safetensors"


def save_checkpoint(
    run: Path, step: int, tensors: dict[str, Tensor], place: dict[str, Any]
) -> None:
    """Write `run/checkpoints/step-N`, manifest last, then drop all but the newest two.

    `place` is JSON-ready: the position in the data and the length of metrics.jsonl.
    """
    path = place_of(run, step)
    save_tensors(path / _STATE, tensors)
    write_json(path / PLACE, {"step": step, **place})
    finish_checkpoint(run, step, [_STATE, PLACE])


def place_of(run: Path, step: int) -> Path:
    """Return the directory of the checkpoint after `step` steps."""
    return run / CHECKPOINTS / f"step-{step:09d}"


def finish_checkpoint(run: Path, step: int, files: list[str] | dict[str, FileRecord]) -> None:
    """Write a checkpoint's manifest, then drop all but the newest two."""
    write_manifest(place_of(run, step), "checkpoint", {"step": step}, files)
    for old in checkpoints(run)[:-KEEP]:
        (old / MANIFEST).unlink()  # first: half a removal must not look whole
        shutil.rmtree(old)


def checkpoints(run: Path) -> list[Path]:
    """Return the finished checkpoints, oldest first; unfinished ones (no manifest) are not counted."""
    found = (run / CHECKPOINTS).glob("step-*")
    return sorted(p for p in found if (p / MANIFEST).exists())


def load_checkpoint(
    run: Path, restore: Callable[[dict[str, Tensor], str], None]
) -> dict[str, Any] | None:
    """Hand the newest checkpoint's tensors and its path to `restore`; return its place, or None when there is none.

    Raises UserError naming the file when the checkpoint is cut or altered.
    """
    found = checkpoints(run)
    if not found:
        return None
    path = found[-1]
    try:
        read_manifest(path, "checkpoint")
        tensors = load_tensors(path / _STATE)
        place = read_json(path / PLACE)
    except UserError as error:
        raise UserError(f"{error}; remove {path} to resume from the checkpoint before") from error
    with understood(path / _STATE):
        restore(tensors, str(path))
    return place


def family_tensors(family: FamilyState) -> dict[str, Tensor]:
    """Return everything of a family that changes during training."""
    return {
        f"{hook}|{m.name}|{key}": value
        for hook, m in family.all()
        for key, value in member_tensors(m).items()
    }


def set_family_tensors(family: FamilyState, tensors: dict[str, Tensor], where: str) -> None:
    """Restore what `family_tensors` returned; raises UserError when the members are others."""
    expected = {f"{hook}|{m.name}" for hook, m in family.all()}
    if {key.rsplit("|", 1)[0] for key in tensors} != expected:
        raise UserError(f"{where}: holds other members than this run's config; use another --out")
    for hook, member in family.all():
        prefix = f"{hook}|{member.name}|"
        own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        set_member_tensors(member, own, where)


def member_tensors(member: MemberState) -> dict[str, Tensor]:
    """Return everything of a member that changes during training."""
    with as_usual(member):
        tensors = {f"sae.{k}": v for k, v in member.sae.tensors().items()}
        for i, parameter in enumerate(member.optimizer.parameters):
            for key, value in member.optimizer.state.get(parameter, {}).items():
                tensors[f"adam.{i}.{key}"] = value
    tensors |= {f"sum.{k}": v for k, v in member.sums.items()}
    tensors["since_fired"], tensors["dead"] = member.since_fired, member.dead
    tensors["sparse"] = member.sparse
    tensors["latent_moments"] = member.latent_moments
    for name in ("annealed", "norm"):
        if (value := getattr(member, name)) is not None:
            tensors[name] = value
    return tensors


def set_member_tensors(member: MemberState, tensors: dict[str, Tensor], where: str) -> None:
    """Restore what `member_tensors` returned."""
    leave(member)
    parts: dict[str, dict[str, Tensor]] = {"sae": {}, "adam": {}, "sum": {}}
    for key, value in tensors.items():
        head, _, rest = key.partition(".")
        if rest:
            parts[head][rest] = value
    member.sae.set_tensors(parts["sae"], where)
    for i, parameter in enumerate(member.optimizer.parameters):
        prefix = f"{i}."
        state = {
            k.removeprefix(prefix): v for k, v in parts["adam"].items() if k.startswith(prefix)
        }
        if state:
            member.optimizer.state[parameter] = {
                k: v if k == "step" else v.to(parameter.device) for k, v in state.items()
            }
    device = member.since_fired.device
    member.window = torch.stack([parts["sum"][name] for name in SUMS]).to(device)
    for name in ("since_fired", "dead", "latent_moments", "sparse"):
        value = tensors[name]
        assert isinstance(value, torch.Tensor)
        setattr(member, name, value.to(device))
    # a run that began without a limit to its gradients goes on so
    for name in ("annealed", "norm"):
        setattr(member, name, tensors[name].to(device) if name in tensors else None)
