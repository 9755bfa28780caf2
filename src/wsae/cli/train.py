"""`wsae train`: a family of SAEs over the same batches."""

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import tyro

from wsae.cli.flags import (
    Common,
    CommonFlags,
    LoggerFlags,
    MaybeName,
    MaybePlace,
    Place,
    Switch,
    flag_name,
    mirrored,
)
from wsae.cli.live import LiveFlags, PlanFlags, open_data, open_labelled, reopened
from wsae.cli.ui import UI
from wsae.core.artifact import CHECKPOINTS, CONFIG, METRICS_FILE
from wsae.core.config import Config
from wsae.core.configfile import read_config
from wsae.core.errors import UserError
from wsae.core.files import read_json
from wsae.core.progress import quiet
from wsae.sae.config import JumpReLU, ReLU
from wsae.train.config import TrainConfig
from wsae.train.metrics import read_json_lines
from wsae.train.parallel.config import launched

if TYPE_CHECKING:
    from wsae.acts.source import ActivationSource
    from wsae.train.loggers.mirror import Logger

# A run's `config.json` as what `wsae train --config` reads: the same SAEs on the same data.

_OWN = tuple(name for name in TrainConfig.model_fields if name in PlanFlags.model_fields)
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


ABOUT = "Train SAEs on activations: one per --alpha and their plain twin, all on the same batches."

SHOWN = ("fvu", "fvu_weighted", "l0", "dead_frac")


class Flags(Config):
    """Flags of `wsae train`."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A store, an array (.npy, .npz, .safetensors, .pt), a folder of arrays, or a model with --text and --hook."""
    out: Place
    """Directory of the run."""
    resume: Switch = False
    """Continue an interrupted run in --out; its own config is used where no flag says otherwise."""
    labels: MaybePlace = None
    """A .npy array of one class per row of an array, for --gamma consistency."""
    mesh: MaybeName = None
    """How the processes that torchrun started share the work: "data=2,latents=4"; axes are layers (hooks and SAEs),
    data (rows of a batch) and latents (of each SAE). None means that they all share the rows."""
    plan: tyro.conf.OmitArgPrefixes[PlanFlags] = PlanFlags()
    """The SAEs and their training."""
    live: tyro.conf.OmitArgPrefixes[LiveFlags] = LiveFlags()
    """For a model: its text and the rows to keep."""
    loggers: tyro.conf.OmitArgPrefixes[LoggerFlags] = LoggerFlags()
    """Copies of the metrics for other tools."""
    common: CommonFlags = Common()
    """Flags of every command."""

    @classmethod
    def from_record(cls, data: dict[str, Any], path: Path) -> dict[str, Any] | None:
        """Return the flags in a run's config.json, for --config; None for another file."""
        return as_flags(data, path)


def run(flags: Flags, ui: UI) -> dict[str, Any]:
    """Train and return the run's path and each member's last metrics."""
    config(flags, None)  # bad flags are refused before anything is loaded
    loggers = flags.loggers.made()
    if launched():
        return _together(flags, ui, loggers)
    if flags.mesh is not None:
        raise UserError(
            f"--mesh {flags.mesh}: is for several processes; start them with "
            "torchrun --nproc-per-node N -m wsae.cli train ..."
        )
    from wsae.cli.runner import device
    from wsae.train.run import train_run

    where = device(flags.common.device)
    cfg, source = _opened(flags, where)
    with mirrored(loggers, ui):
        result = train_run(cfg, source, flags.out, ui.progress, flags.resume, where)
    return {
        "run": str(result.path),
        "members": last_metrics(result.path),
        "notes": _notes(cfg, source),
    }


def _together(flags: Flags, ui: UI, loggers: "list[Logger]") -> dict[str, Any]:
    """Train as one of the processes that torchrun started; rank 0 alone prints."""
    from wsae.cli.runner import device
    from wsae.train.parallel.run import train_parallel
    from wsae.train.parallel.world import RankLost, joined

    try:
        with joined(flags.mesh, device(flags.common.device)) as world:
            if not world.first:
                _close_stdout()
            cfg, source = _opened(flags, world.device)
            progress = ui.progress if world.first else quiet
            with mirrored(loggers, ui, world.first):
                train_parallel(cfg, source, flags.out, world, progress, flags.resume)
    except RankLost as error:
        kept = (flags.out / CHECKPOINTS).is_dir()
        how = "go on with the same command and --resume" if kept else "start the same command again"
        ui.note(f"wsae: error: {error}; the job has ended; {how}")
        raise SystemExit(1) from error
    return {"run": str(flags.out), "members": last_metrics(flags.out), "notes": _notes(cfg, source)}


def _opened(flags: Flags, where: str) -> "tuple[TrainConfig, ActivationSource]":
    """Return the run's config and its data."""
    wanted = flags.plan.tokens
    rest = {"dtype": flags.plan.dtype, **({} if wanted is None else {"tokens": wanted})}
    record = record_of(flags.common.config)
    if record is not None and flags.labels is None:
        path = cast(Path, flags.common.config)
        source = source_of(record, path, flags.source, flags.live, where)
    elif flags.labels is not None:
        source = open_labelled(flags.source, flags.labels)
    else:
        source = open_data(flags.source, flags.live, flags.common.seed, where, rest)
    cfg = config(flags, source.n_rows)
    for member in cfg.members:  # shapes that cannot be are refused before anything is written
        for d_in in source.hooks.values():
            member.sae_config(d_in)
    return cfg, source


def _notes(cfg: TrainConfig, source: "ActivationSource") -> list[str]:
    """Return what makes the run's SAEs worth little, as far as its settings tell."""
    notes = [*cfg.doubts()]
    for hook, d_in in source.hooks.items():
        dense = [
            f"{name} (k = {m.activation.k})"
            for name, m in zip(cfg.names(), cfg.members, strict=True)
            if not isinstance(m.activation, ReLU | JumpReLU) and m.activation.k >= d_in
        ]
        if dense:
            notes.append(
                f"{hook}: {', '.join(dense)}: as many active latents as the {d_in} dimensions or more can copy any "
                "activation; lower --k"
            )
    return notes


def _close_stdout() -> None:
    """Point stdout at nothing, whatever writes there."""
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)


def config(flags: Flags, rows: int | None) -> TrainConfig:
    """Return the run's config: that in --config or of the run to resume where no flag speaks of it, else the flags'."""
    record = record_of(flags.common.config)
    if record is not None:
        path = cast(Path, flags.common.config)
        return config_of(record, path, flags.plan, flags.common.seed)
    stored = flags.out / CONFIG
    if flags.resume and flags.plan == PlanFlags() and stored.exists():
        data = read_json(stored)
        if isinstance(data, dict) and isinstance(data.get("train"), dict):
            return TrainConfig.parse(data["train"], where=str(stored))
    return flags.plan.config(rows, flags.common.seed)


def printable(flags: Flags) -> None:
    """Raise UserError where the flags are not all: with a run's config in --config."""
    if record_of(flags.common.config) is not None:
        raise UserError(
            f"{flags.common.config}: is a run's config, whose SAEs are not flags; give it to --config as it is"
        )


def last_metrics(run: Path) -> dict[str, dict[str, dict[str, float | int]]]:
    """Return hook -> member -> the last row of its metrics."""
    found: dict[str, dict[str, dict[str, float | int]]] = {}
    for row in read_json_lines(run / METRICS_FILE):
        kept = {name: row[name] for name in ("step", "tokens", *SHOWN) if name in row}
        found.setdefault(row["hook"], {})[row["member"]] = kept
    return found


def show(result: dict[str, Any], ui: UI) -> None:
    """Print each member's last training metrics and what to do next."""
    rows = [
        [hook, name, *(f"{metrics.get(key, float('nan')):.4g}" for key in SHOWN)]
        for hook, members in result["members"].items()
        for name, metrics in members.items()
    ]
    ui.table("last training batches", ("hook", "member", *SHOWN), rows)
    for note in result["notes"]:
        ui.say(f"note: {note}")
    place = shlex.quote(result["run"])
    ui.say(
        f"run: {result['run']}\nnext: wsae evaluate {place}, then wsae report {place} --out report.html"
    )


def interrupted(flags: Flags, words: list[str], error: KeyboardInterrupt) -> str:
    """Say what is kept and how to go on."""
    again = shlex.join(["wsae", "train", *(w for w in words if w != "--resume"), "--resume"])
    done = f"{error}; " if str(error) else ""
    if launched():
        again = "the same torchrun command and --resume"
    if not (flags.out / CHECKPOINTS).is_dir():
        return f"{done}no checkpoint yet; the same command starts again"
    return f"{done}{flags.out} keeps the work so far; go on with: {again}"
