"""`wsae train`: a family of SAEs over the same batches."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import tyro

from wsae.acts.config import TextConfig, same_place
from wsae.acts.hooknames import among
from wsae.cli.common import (
    UI,
    Common,
    CommonFlags,
    LoggerFlags,
    MaybeName,
    MaybePlace,
    Place,
    Switch,
    config_values,
    device,
    mirrored,
)
from wsae.cli.evaluate import strangers
from wsae.cli.live import (
    LiveFlags,
    MixingFlags,
    PlanFlags,
    labelled,
    open_data,
    open_joined,
    open_sides,
)
from wsae.cli.runner import together
from wsae.core.config import FLAG_OF, FLAGS, Config
from wsae.core.errors import UserError, understood
from wsae.core.files import read_json
from wsae.core.progress import quiet
from wsae.run import CONFIG, MEMBERS, METRICS_FILE, Run
from wsae.train.config import TrainConfig
from wsae.train.loggers import read_json_lines
from wsae.train.parallel.config import launched

if TYPE_CHECKING:
    from wsae.acts.source import ActivationSource
    from wsae.train.family import Start

ABOUT = """\
Train SAEs on activations: the plain one, and with --alpha, --gamma or --precondition others beside it as its twins, all
on the same batches. Flags of the SAEs' shape take several values, which make a grid: --k 16 32 --lr 1e-3 3e-3."""

SHOWN = ("fvu", "fvu_weighted", "l0", "dead_frac")


class Flags(Config):
    """Flags of `wsae train`."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A store, an array (.npy, .npz, .safetensors, .pt, .arrow) or a folder of them, or a model with --text and
    --hook."""
    out: Place
    """Directory of the run."""
    resume: Switch = False
    """Continue an interrupted run in --out; its own config is used where no flag says otherwise."""
    init_from: MaybeName = None
    """An SAE to go on with (fine-tuning), in place of new ones: a run or its member's folder, one SAE's folder,
    hub:owner/name, RELEASE:ID or whatever wsae import reads. Its kind and width are kept, its k unless --k is given."""
    labels: MaybePlace = None
    """A .npy array of one class per row of an array, for --gamma consistency."""
    hook_out: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="PATTERN ...", help_behavior_hint="")
    ] = ()
    """Train transcoders, which read --hook and are to give this: "layers.9.mlp" of --hook "layers.9.mlp.input"; for an
    array or a store, another one with the same rows may be named."""
    crosscoder: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="HOOK|DATA ...", help_behavior_hint="")
    ] = ()
    """Train crosscoders, which read several hooks of each row at once: name the hooks ("layers.9 layers.19"), or other
    stores or arrays with the same rows, another model's on the same text, to be read beside SOURCE at --hook."""
    mesh: MaybeName = None
    """How the processes that torchrun started share the work: "data=2,latents=4"; axes are layers (hooks and SAEs),
    data (rows of a batch) and latents (of each SAE). Default: they all share the rows."""
    plan: tyro.conf.OmitArgPrefixes[PlanFlags] = PlanFlags()
    """The SAEs and their training."""
    live: tyro.conf.OmitArgPrefixes[LiveFlags] = LiveFlags()
    """For a model: its text and the rows to keep."""
    mixing: tyro.conf.OmitArgPrefixes[MixingFlags] = MixingFlags()
    """How a live model's rows are mixed."""
    loggers: tyro.conf.OmitArgPrefixes[LoggerFlags] = LoggerFlags()
    """Copies of the metrics for other tools."""
    common: CommonFlags = Common()
    """Flags of every command."""

    @classmethod
    def from_record(cls, data: dict[str, Any], path: Path) -> dict[str, Any]:
        """Return the flags that a run's config.json stands for, its SAEs as `members`; other data as they are."""
        if not (isinstance(data.get("train"), dict) and "source" in data and "data" in data):
            return data
        cfg = TrainConfig.parse(data["train"], where=f"{path}: train")
        with understood(path):
            source, crosscoder, given = _as_given(dict(data["source"] or {}), cfg)
            harvest = dict(source.get("harvest") or {})
            place = harvest.pop("model", source.get("path"))
            text = harvest.pop("text", {})
            if crosscoder:
                harvest.pop("hooks", None)
            said: dict[str, Any] = {
                "hooks": source.get("hooks", ()),
                **text,
                **harvest,
                **source.get("mixing", {}),
            }
            said["text"] = said.pop("path", None)
            if cfg.hook_out is not None:
                said["hooks"] = list(cfg.hook_out)
        flags = {FLAG_OF.get(name, name): value for name, value in said.items() if value != ()}
        known = {**LiveFlags.model_fields, **MixingFlags.model_fields}
        return (
            {name: value for name, value in flags.items() if name in known}
            | {name: value for name, value in cfg if name in PlanFlags.model_fields}
            | {"members": cfg.to_dict()["members"], "seed": cfg.seed}
            | ({"init_from": source["init_from"]} if "init_from" in source else {})
            | ({"hook_out": given} if given else {})
            | ({"crosscoder": crosscoder} if crosscoder else {})
            | ({} if place is None else {"source": place})
        )


class _Given(NamedTuple):
    source: dict[str, Any]
    crosscoder: list[str]
    hook_out: list[str]


def _as_given(source: dict[str, Any], cfg: TrainConfig) -> _Given:
    """Return the record of a run's source as it is without --crosscoder or --hook-out, and what these said."""
    if source.get("kind") == "aligned":
        read, given = source["sources"]
        return _Given(read, [], [given["path"]])
    if source.get("kind") != "joined":
        return _Given(source, [], list((cfg.hook_out or {}).values()))
    inner = source["of"]
    rest = {key: value for key, value in source.items() if key not in ("kind", "of", "hooks")}
    if inner["kind"] != "aligned":
        return _Given({**inner, **rest, "hooks": ()}, inner["hooks"], [])
    first, *others = inner["sources"]
    alike = all(other["hooks"] == first["hooks"] for other in others)  # else each has one alone
    own = {**first, **rest, "hooks": first["hooks"] if alike else ()}
    return _Given(own, [other["path"] for other in others], [])


def run(flags: Flags, ui: UI) -> dict[str, Any]:
    """Train and return the run's path and each member's last metrics."""
    if flags.init_from is None:
        config(flags, None)  # bad flags are refused before anything is loaded
    loggers = flags.loggers.made()
    if launched():
        from wsae.train.parallel.run import train_parallel

        with together(flags.common, flags.out, ui, flags.mesh) as world:
            cfg, source, start, strange = _opened(flags, world.device)
            if world.first:
                _tell_cost(cfg, source, world.device, ui)
            progress = ui.progress if world.first else quiet
            with mirrored(loggers, ui, world.first):
                train_parallel(cfg, source, flags.out, world, progress, flags.resume, start)
    elif flags.mesh is not None:
        raise UserError(
            f"--mesh {flags.mesh}: is for several processes; start them with "
            "torchrun --nproc-per-node N -m wsae.cli train ..."
        )
    else:
        from wsae.train.run import train_run

        where = device(flags.common.device)
        cfg, source, start, strange = _opened(flags, where)
        _tell_cost(cfg, source, where, ui)
        with mirrored(loggers, ui):
            train_run(cfg, source, flags.out, ui.progress, flags.resume, where, start)
    found: dict[str, dict[str, dict[str, float | int]]] = {}
    for row in read_json_lines(flags.out / METRICS_FILE):
        kept = {name: row[name] for name in ("step", "tokens", *SHOWN) if name in row}
        found.setdefault(row["hook"], {})[row["member"]] = kept
    return {"run": str(flags.out), "members": found, "notes": [*strange, *_notes(cfg, source)]}


class _Opened(NamedTuple):
    """A run's config, its data, what it starts from, and what speaks against starting so."""

    cfg: TrainConfig
    source: "ActivationSource"
    start: "Start | None"
    strange: list[str]


def _opened(flags: Flags, where: str) -> _Opened:
    """Return what there is before training; raises UserError for shapes that cannot be."""
    plan, seed = flags.plan, flags.common.seed
    rest = {"dtype": plan.dtype, **({} if plan.tokens is None else {"tokens": plan.tokens})}
    rest |= _named_as_begun(flags)
    hook_out: dict[str, str] | None = None
    parts: list[dict[str, object]] | None = None
    if flags.crosscoder:
        _alone(flags)
        about = (flags.crosscoder, flags.live, flags.mixing, seed, where)
        source = open_joined(flags.source, *about, **rest)
        parts = [{"name": name, "width": width} for name, width in source.parts.items()]
    elif flags.hook_out:
        about = (flags.hook_out, flags.live, flags.mixing, seed, where)
        source, hook_out = open_sides(flags.source, *about, **rest)
    else:
        source = open_data(flags.source, flags.live, flags.mixing, seed, where, **rest)
    source = labelled(source, flags.labels)
    start, strange = _start(flags, hook_out or dict.fromkeys(source.hooks), source)
    cfg = config(flags, source.n_rows, start)
    if hook_out or parts:
        both = {"hook_out": hook_out, "crosscoder": parts}
        cfg = TrainConfig.parse(cfg.to_dict() | both, where=FLAGS)
    for member in cfg.members:  # before anything is written
        for hook in cfg.read(source.hooks):
            out = cfg.given(hook)
            d_out = None if out is None else source.hooks[out]
            member.sae_config(source.hooks[hook], d_out, cfg.crosscoder)
    return _Opened(cfg, source, start, strange)


def _named_as_begun(flags: Flags) -> dict[str, object]:
    """Return model and text as the live run in --out names them, where they are the ones that the flags name."""
    source = Run(flags.out).source if (flags.out / CONFIG).exists() else {}
    with understood(flags.out / CONFIG):
        harvest = source.get("of", source).get("harvest")
        if harvest is None or flags.live.text is None:
            return {}
        names = (harvest["model"], flags.source), (harvest["text"]["path"], flags.live.text)
        if not all(same_place(*pair) for pair in names):
            return {}
        text = config_values(flags.live, TextConfig) | {"path": harvest["text"]["path"]}
        return {"model": harvest["model"], "text": text}


def _alone(flags: Flags) -> None:
    """Raise UserError for flags that do not go with --crosscoder."""
    for name, given in (("hook-out", flags.hook_out), ("skip", flags.plan.skip)):
        if given:
            raise UserError(
                f"--{name}: is of transcoders; a crosscoder gives what it reads, so leave it out"
            )


class _Begun(NamedTuple):
    """The SAEs to start from, and what speaks against them here."""

    start: "Start | None" = None
    strange: list[str] = []


def _start(flags: Flags, hooks: Mapping[str, str | None], source: "ActivationSource") -> _Begun:
    """Return the SAE of each hook {hook: what a transcoder gives} that --init-from names, or the resumed run began."""
    address = flags.init_from
    if address is None and flags.resume and (flags.out / CONFIG).exists():
        address = Run(flags.out).source.get("init_from")
    if address is None:
        return _Begun()
    from wsae.interop.saes import about_sae, open_run
    from wsae.sae.model import SAE
    from wsae.train.family import Start

    found, saes, strange = open_run(address), {}, []
    for hook, out in hooks.items():
        if found.single and len(hooks) > 1:
            raise UserError(
                f"--init-from {address}: is one SAE, and there are {len(hooks)} hooks; name one with --hook"
            )
        there = next(iter(found.members)) if found.single else among(hook, found.members)
        if there is None:
            raise UserError(
                f"--init-from {address}: has no SAE of {hook}; it has those of {', '.join(found.members)}"
            )
        names = found.members[there]
        if len(names) > 1:
            few = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
            raise UserError(
                f"--init-from {address}: {len(names)} SAEs at {there} ({few}); give one: "
                f"{Path(address) / MEMBERS / there / names[0]}"
            )
        place = found.place(there, names[0])
        saes[hook], about = SAE.load(place), about_sae(place)
        so = "it begins as good as anew"
        if saes[hook].cfg.sources is None:  # whose names are compared with the data's
            strange += strangers(about.model, about.hook, source, hook, so)
        if out is not None:
            strange += strangers(None, about.hook_out, source, out, so)
    local = Path(address)
    return _Begun(Start(saes, str(local.resolve()) if local.exists() else address), strange)


_MANY = 3
"""SAEs from which on a run is told of before it begins."""
_PROBE_S = 2.0
"""Seconds of steps behind what is said of its time."""


def _tell_cost(cfg: TrainConfig, source: "ActivationSource", where: str, ui: UI) -> None:
    """Say what a grid of SAEs will need, before anything is trained."""
    if len(cfg.members) >= _MANY and cfg.hook_out is None:
        from wsae.doctor.measure import forecast

        ui.note(forecast(cfg, source, where, _PROBE_S))


def _notes(cfg: TrainConfig, source: "ActivationSource") -> list[str]:
    """Return what makes the run's SAEs worth little, as far as its settings tell."""
    notes = [*cfg.doubts()]
    for hook in cfg.read(source.hooks):
        d_in = source.hooks[hook]
        dense = [
            f"{name} (k = {getattr(m.activation, 'k', 0)})"
            for name, m in zip(cfg.names(), cfg.members, strict=True)
            if getattr(m.activation, "k", 0) >= d_in
        ]
        if dense:
            notes.append(
                f"{hook}: {', '.join(dense)}: as many active latents as the {d_in} dimensions or more can copy any "
                "activation; lower --k"
            )
    return notes


def config(flags: Flags, rows: int | None, start: "Start | None" = None) -> TrainConfig:
    """Return the config that the flags describe, or that of the run to resume where no flag speaks of it."""
    stored = flags.out / CONFIG
    if flags.resume and flags.plan == PlanFlags() and stored.exists():
        data = read_json(stored)
        if isinstance(data, dict) and isinstance(data.get("train"), dict):
            asked = {"seed": flags.common.seed} if flags.common.seed else {}
            return TrainConfig.parse(data["train"] | asked, where=str(stored))
    like = None if start is None else next(iter(start.saes.values())).cfg
    return flags.plan.config(rows, flags.common.seed, like)


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
