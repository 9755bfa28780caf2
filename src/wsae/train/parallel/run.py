"""A training run on many ranks, as the directory that one process would make."""

import contextlib
import shutil
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as Cut

from wsae.acts.source import StoreSource
from wsae.acts.stream import ActivationSource, Batch, BatchStream, ShuffledStream, State
from wsae.core.artifact import GAMMA_FILE, FileRecord, check_file, read_manifest, record
from wsae.core.errors import UserError
from wsae.core.files import as_user_error, read_json, refusals, write_json
from wsae.core.progress import Progress, quiet
from wsae.kernels.native.build import why_not
from wsae.sae.model import SAE
from wsae.train.config import MemberConfig, TrainConfig
from wsae.train.family import FamilyState, Inputs, Start, folded
from wsae.train.loop import (
    PLACE,
    FamilyJob,
    Team,
    TrainJob,
    checkpoints,
    enter,
    finish_checkpoint,
    held,
    member_tensors,
    place_of,
    train_job,
)
from wsae.train.parallel.config import even_part
from wsae.train.parallel.step import Shard, make_shard, unfit_shard
from wsae.train.parallel.world import MAX, MIN, Mesh, MeshAxis, by_latents
from wsae.train.run import about, begun_from, finish_run, identity_of, start_family, write_member
from wsae.train.state import MemberState

_ROWS = ("sae.W_dec", "sae.b_enc", "since_fired", "dead")
_COLUMNS = ("sae.W_enc", "latent_moments")
AGREE_S, AGREE_STEPS = 1.0, 100
"""Ranks ask each other whether to save or stop about so often, and at least every so many steps."""


class ShardsJob(FamilyJob):
    """Trains one rank's shards of a family on its rows of every batch; the rows of metrics are those of all ranks.

    Its checkpoints are torch.distributed.checkpoint's in safetensors, for any other number of ranks: each rank writes
    the latents it holds to one file, with their offsets. The tensors have the names that `wsae.train.loop` gives
    them, so either kind of checkpoint resumes on any mesh.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        family: FamilyState,
        source: ActivationSource,
        world: Mesh,
        keys: list[str],
    ) -> None:
        super().__init__(cfg, family, source)
        self.world, self.keys = world, keys
        """`keys`: every member of the run as HOOK|NAME, in the order of one process."""

    def open(self, place: State | None) -> BatchStream:
        """Return this rank's rows of the batches from a stream's place on, or from the start.

        Where the rows of all ranks are trained on here, those of the others come from them.
        """
        size, readers = self.cfg.batch_size, self.world.readers
        whole = self.world.place.data.size == 1
        part = even_part(size, readers.size, readers.index)
        stream = self.source.stream(size, self.cfg.seed, place)
        if isinstance(stream, ShuffledStream):  # stores and arrays read no other rows
            gather = stream._gather
            stream._gather = lambda index: gather(index[part])
            return _Gathered(stream, readers, size) if whole and readers.size > 1 else stream
        return stream if whole else _Owned(stream, part)  # every rank runs a live model

    def rows(self, done: int) -> Iterator[dict[str, Any]]:
        """Yield every member's metrics since its last row; called by all ranks, as they add up their parts."""
        own = {f"{row['hook']}|{row['member']}": row for row in super().rows(done)}
        names = ("loss", "reconstruction", "auxk", "fvu", "fvu_weighted", "l0", "dead_frac", "lr")
        table = torch.zeros(len(self.keys), len(names), dtype=torch.float64)
        for key, row in own.items() if self.world.place.leads else ():
            table[self.keys.index(key)] = table.new_tensor([row[name] for name in names])
        sums = self.world.reduce_(table.to(self.world.device)).tolist()
        for key, values in zip(self.keys, sums, strict=True):
            hook, member = key.rsplit("|", 1)
            head = {"step": done, "tokens": done * self.per_step, "hook": hook, "member": member}
            row = head | dict(zip(names, values, strict=True))
            self.fields = {"fvu": row["fvu"], "l0": row["l0"]}
            yield row

    def parts(self, to_write: bool = False) -> dict[str, Any]:
        """Return this rank's tensors by name; those over latents are DTensors cut along them, the others plain.

        They share memory with the members, so that loading fills them, except the copies that writing needs contiguous.
        """
        found: dict[str, Any] = {}
        for hook, member in self.family.all():
            parameters = member.optimizer.parameters
            for key, value in member_tensors(member).items():
                of_kind = key.removeprefix("sae.") in member.sae.arch.parameters
                dim = 0 if key in _ROWS or of_kind else 1 if key in _COLUMNS else None
                if key.startswith("adam.") and value.ndim:
                    of = parameters[int(key.split(".")[1])]
                    dim = None if of is member.sae.b_dec or of is member.sae.W_skip else 0
                tensor = value.detach().contiguous() if to_write else value.detach()
                if dim is not None:
                    tensor = self._cut(tensor, dim, member)
                found[f"{hook}|{member.name}|{key}"] = tensor
        return found

    def _cut(self, local: Tensor, dim: int, member: MemberState) -> DTensor:
        assert isinstance(member.part, Shard)
        shape = list(local.shape)
        shape[dim] = member.part.d_sae
        stride = torch.empty(shape, dtype=torch.float32, device="meta").stride()
        return DTensor.from_local(
            local,
            self.world.sub,
            [Replicate(), Cut(dim)],
            run_check=False,
            shape=torch.Size(shape),
            stride=stride,
        )


class MeshTeam(Team):
    """All ranks of a run: they stop when any is asked to, and save when rank 0's clock says so."""

    ends_saved = True  # the members are written from the last checkpoint

    def __init__(self, world: Mesh, steps: int) -> None:
        self.world, self.steps = world, steps
        self.done = self.asked = self.ask_at = 0
        self.asked_at = time.monotonic()

    @property
    def first(self) -> bool:
        """Whether this rank writes."""
        return self.world.first

    def agree(self, stop: bool, due: bool) -> tuple[bool, bool]:
        """Return whether all stop after this step, and whether a checkpoint is due; the ranks ask each other seldom."""
        self.done += 1
        if self.done == self.steps or self.done < self.ask_at:
            return False, False
        now = time.monotonic()
        ask = torch.tensor([int(stop), 0, 0], device=self.world.device)
        if self.first:
            a_step = (now - self.asked_at) / (self.done - self.asked)
            ask[1], ask[2] = int(due), max(1, min(AGREE_STEPS, int(AGREE_S / max(a_step, 1e-9))))
        all_stop, all_due, steps = self.world.reduce_(ask, MAX).tolist()
        self.asked, self.asked_at, self.ask_at = self.done, now, self.done + steps
        return bool(all_stop), bool(all_due)

    def save(self, run: Path, done: int, job: TrainJob, place: dict[str, Any]) -> None:
        """Write a checkpoint, every rank its part, manifest last; raises UserError when a rank cannot write."""
        assert isinstance(job, ShardsJob)
        path, world = place_of(run, done), self.world

        def empty() -> None:  # what a killed job left there may have been cut for more ranks
            if path.exists():
                shutil.rmtree(path)
            with refusals(path):
                path.mkdir(parents=True)

        world.from_first(empty)
        writer = HuggingFaceStorageWriter(str(path), save_distributed=True)
        try:
            dcp.save(job.parts(to_write=True), storage_writer=writer)
        except CheckpointException as error:
            for (
                failure
            ) in error.failures.values():  # the first rank's own error in place of all of them
                cause = failure[0]
                raise (
                    as_user_error(cause, path) if isinstance(cause, OSError) else cause
                ) from error
            raise
        name = f"shard-{world.rank + 1:05d}-model-00001-of-00001.safetensors"
        own = {name: record(path / name).to_dict()} if (path / name).exists() else {}
        files = {k: FileRecord.parse(v) for part in world.to_first(own) for k, v in part.items()}

        def complete() -> None:
            write_json(path / PLACE, {"step": done, **place})
            finish_checkpoint(run, done, {**files, PLACE: record(path / PLACE)})

        world.from_first(complete)

    def load(self, run: Path, job: TrainJob) -> dict[str, Any] | None:
        """Restore the newest checkpoint, of whatever mesh, and return its place, or None when there is none.

        Each rank reads the latents it holds and checks a share of the files. Raises UserError naming the file when the
        checkpoint is cut, altered or of another run.
        """
        assert isinstance(job, ShardsJob)
        found = self.world.from_first(lambda: [str(path) for path in checkpoints(run)])
        if not found:
            return None
        path = Path(found[-1])
        try:
            manifest = read_manifest(path, "checkpoint", verify=False)
            for number, (name, expected) in enumerate(sorted(manifest.files.items())):
                if number % self.world.layout.ranks == self.world.rank:
                    check_file(path, name, expected)
            place = read_json(path / PLACE)
        except UserError as error:
            raise UserError(
                f"{error}; remove {path} to resume from the checkpoint before"
            ) from error
        reader = HuggingFaceStorageReader(str(path))
        there = reader.read_metadata().state_dict_metadata.keys()
        for hook, member in job.family.all():
            if f"{hook}|{member.name}|norm" not in there:
                member.norm = None  # it began without a limit to its gradients
        tensors = job.parts()
        if not tensors.keys() <= there:
            raise UserError(
                f"{path}: holds other members than this run's config; use another --out"
            )
        dcp.load(tensors, storage_reader=reader)
        for _, member in job.family.all():
            member.part.note_dead(member.dead)
        self.done = self.asked = int(place["step"])
        return place


class _Gathered:
    """The whole batches of which each rank's stream has some rows."""

    def __init__(self, stream: BatchStream, readers: MeshAxis, size: int) -> None:
        self._stream, self._readers, self._size = stream, readers, size

    def next(self) -> Batch:
        """Return all rows of the next batch by hook."""
        return {hook: self._all(x) for hook, x in self._stream.next().items()}

    def begin(self) -> None:
        """Begin to read this rank's rows; they are exchanged in `next`."""
        self._stream.begin()

    def _all(self, x: Tensor) -> Tensor:
        size, parts = self._size, self._readers.size
        most = -(-size // parts)
        if size % parts == 0:
            return self._readers.gather(x).flatten(0, 1)
        everyone = self._readers.gather(F.pad(x, (0, 0, 0, most - len(x))))
        counts = [len(range(size)[even_part(size, parts, i)]) for i in range(parts)]
        return torch.cat([rows[:n] for rows, n in zip(everyone, counts, strict=True)])

    def state(self) -> State:
        """Return the exact position as JSON."""
        return self._stream.state()


class _Owned:
    """Some rows of every batch of a stream."""

    def __init__(self, stream: BatchStream, rows: slice) -> None:
        self._stream, self._rows = stream, rows

    def next(self) -> Batch:
        """Return the rows of the next batch by hook."""
        return {hook: x[self._rows] for hook, x in self._stream.next().items()}

    def begin(self) -> None:
        """Begin to read the stream's next batch."""
        self._stream.begin()

    def state(self) -> State:
        """Return the exact position as JSON."""
        return self._stream.state()


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


def train_parallel(
    cfg: TrainConfig,
    source: ActivationSource,
    out: Path,
    world: Mesh,
    progress: Progress = quiet,
    resume: bool = False,
    start: Start | None = None,
) -> Path:
    """Train a family into the directory `out` with all ranks of `world`, and return `out`; every rank calls this.

    The run is that of `train_run` up to the order of fp32 sums, and continues with `resume` on any number of ranks.
    Raises UserError as `train_run` does and for a mesh that does not fit, `Stopped` on all ranks when one is
    interrupted, and RuntimeError from torch.distributed when a rank is gone.
    """
    _check(cfg, source, world)
    cfg = begun_from(cfg, source, start)
    world = suited(cfg, source, world)
    identity = identity_of(cfg, source, start) if world.first else {}
    with held(out) if world.first else contextlib.nullcontext():
        if not world.from_first(lambda: enter(out, "run", identity, resume)):
            return out
        pairs = [(hook, name) for hook in cfg.read(source.hooks) for name in cfg.names()]
        own = pairs[even_part(len(pairs), world.layout.layers, world.layer)]
        hooks = tuple(dict.fromkeys(hook for hook, _ in own))
        given = {hook: goal for hook in hooks if (goal := cfg.given(hook)) is not None}
        cfg = cfg.model_copy(update={"hook_out": given or None})
        part, wanted = source, tuple(dict.fromkeys([*hooks, *given.values()]))
        if isinstance(source, StoreSource) and wanted != tuple(source.hooks):
            part = StoreSource(source.store.path, wanted, verify=False)  # rank 0 checked the files
        every = part.stats(progress)
        stats = {hook: every[hook] for hook in wanted}

        def make(hook: str, name: str, member: MemberConfig, inputs: Inputs) -> MemberState | None:
            if (hook, name) not in own:
                return None
            begun = None if start is None else start.begun(hook, member, inputs)
            return make_shard(name, member, cfg, inputs, world, begun)

        family = start_family(cfg, part, stats, world.device, progress, make, start)
        own_told = {"gamma": family.gamma_record, **about(stats)} if world.place.leads else {}
        told = _merged(world.to_first(own_told))
        if world.first:
            write_json(out / GAMMA_FILE, told["gamma"])
        keys = [f"{hook}|{name}" for hook, name in pairs]
        job = ShardsJob(cfg, family, part, world, keys)
        train_job(job, out, progress, MeshTeam(world, cfg.steps))
        last, gamma = place_of(out, cfg.steps), {hook: {} for hook in hooks}
        for hook, member in family.all() if world.place.leads else ():
            whole = {"d_sae": member.part.d_sae or member.sae.cfg.d_sae}
            sae = SAE(member.sae.cfg.model_copy(update=whole))
            sae.set_tensors(read_whole(last, f"{hook}|{member.name}|sae."), str(last))
            sae = folded(member, sae)
            gamma[hook][member.name] = write_member(out, hook, member, sae)
        finals = world.to_first({"gamma": gamma})
        if world.first:
            told = _merged([told, *finals])
            finish_run(out, identity, cfg, told.pop("gamma"), told)
        world.from_first(lambda: None)  # nobody leaves before the manifest is there
    return out


def _check(cfg: TrainConfig, source: ActivationSource, world: Mesh) -> None:
    hooks = cfg.read(source.hooks)
    layout, pairs = world.layout, len(hooks) * len(cfg.members)
    if layout.data > cfg.batch_size:
        raise UserError(
            f"--mesh data={layout.data}: a batch of {cfg.batch_size} rows leaves a rank without; use fewer"
        )
    if layout.layers > pairs:
        raise UserError(
            f"--mesh layers={layout.layers}: there are {len(hooks)} hooks of {len(cfg.members)} members to "
            f"divide; use at most {pairs}"
        )
    if cfg.loss is not None:
        raise UserError(f"loss {cfg.loss} runs through one model; train it in one process")


def suited(cfg: TrainConfig, source: ActivationSource, world: Mesh) -> Mesh:
    """Return the mesh on which the compiled kernels train the members where they can, else `world`.

    They have no gradient matrix to sum over rows, so ranks that share rows share latents there. Every rank calls this.
    """
    if cfg.kernels == "eager" or torch.device(world.device).type != "cpu":
        return world
    able = world.reduce_(torch.tensor(int(why_not() is None)), MIN)
    if not able:
        return replace(world, unfit=why_not() or "they do not work on another process")
    parts = world.layout.data * world.layout.latents
    wholes = [
        member.sae_config(
            source.hooks[hook], source.hooks.get(cfg.given(hook) or ""), cfg.crosscoder
        )
        for member in cfg.members
        for hook in cfg.read(source.hooks)
    ]
    fits = not any(unfit_shard(whole, parts) for whole in wholes)
    return by_latents(world) if fits and world.layout.data > 1 else world


def _merged(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return nested dicts as one; where two have a value the later wins."""
    whole: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            whole[key] = _merged([whole.get(key, {}), value]) if isinstance(value, dict) else value
    return whole
