"""A run's `config.json` as what `wsae train --config` reads: the same SAEs on the same data."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsae.cli.flagfile import flag_name
from wsae.cli.live import LiveFlags, reopened
from wsae.cli.plan import PlanFlags
from wsae.core.configfile import read_config
from wsae.core.errors import UserError
from wsae.train.config import TrainConfig

if TYPE_CHECKING:
    from wsae.acts.source import ActivationSource

_OWN = ("tokens", "batch_size", "dtype")
"""Flags of the plan that a run has once, not per SAE: they win over the record."""


def is_record(data: dict[str, Any]) -> bool:
    """Return whether `data` is a run's config.json rather than a flags file."""
    return isinstance(data.get("train"), dict) and "source" in data and "data" in data


def as_flags(data: dict[str, Any], path: Path) -> dict[str, Any] | None:
    """Return the flags that a run's record speaks of, those that have one value for all SAEs; None for other data."""
    if not is_record(data):
        return None
    cfg = TrainConfig.parse(data["train"], where=f"{path}: train")
    place = _place(data["source"])
    return {name: getattr(cfg, name) for name in _OWN} | {
        "seed": cfg.seed,
        **({} if place is None else {"source": place}),
    }


def record_of(path: Path | None) -> dict[str, Any] | None:
    """Return the record at `path`, None for a flags file or no path."""
    data = {} if path is None else read_config(path, "flags").data
    return data if is_record(data) else None


def config_of(record: dict[str, Any], path: Path, plan: PlanFlags, seed: int) -> TrainConfig:
    """Return the record's run with the plan's tokens, batch size and dtype; raises UserError for other flags."""
    for name in PlanFlags.model_fields:
        if name not in _OWN and getattr(plan, name) != getattr(PlanFlags(), name):
            raise UserError(
                f"--{flag_name(name)}: {path} is a run's config, whose SAEs are taken as they are; leave the flag out, "
                "or give all by flags"
            )
    changes = {name: getattr(plan, name) for name in _OWN} | {"seed": seed}
    return TrainConfig.parse({**record["train"], **changes}, where=str(path))


def source_of(
    record: dict[str, Any], path: Path, flags_source: str, live: LiveFlags, device: str
) -> "ActivationSource":
    """Return the record's data, or those at `flags_source` where it names others."""
    if live != LiveFlags():
        raise UserError(
            f"{path}: is a run's config, whose data are taken as they are; leave the flags of a model's text out"
        )
    other = None if flags_source == _place(record["source"]) else flags_source
    return reopened(record["source"], str(path), device, other, "SOURCE")


def _place(source: Any) -> str | None:
    """Return the path or model that a record's source names."""
    if not isinstance(source, dict):
        return None
    harvest = source.get("harvest")
    place = harvest.get("model") if isinstance(harvest, dict) else source.get("path")
    return place if isinstance(place, str) else None
