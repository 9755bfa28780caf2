"""A training run on many ranks, as the directory that one process would make."""

import contextlib
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as Cut

from wsae.acts.source import StoreSource
from wsae.acts.stream import ActivationSource, Batch, BatchStream, ShuffledStream, State
from wsae.core.artifact import (
    CHECKPOINTS,
    CONFIG,
    GAMMA_FILE,
    MANIFEST,
    MEMBERS,
    METRICS_FILE,
    SPEED,
    FileRecord,
    check_file,
    read_manifest,
    record,
    write_manifest,
)
from wsae.core.errors import UserError
from wsae.core.files import as_user_error, read_json, refusals, write_json
from wsae.core.progress import Progress, Tick, quiet
from wsae.losses.gamma import describe_gamma
from wsae.sae.model import WEIGHTS, SparseAutoencoder
from wsae.train.checkpoint import KEEP, checkpoints, member_tensors
from wsae.train.config import TrainConfig
from wsae.train.family import covariances, gamma_record, initial_gamma, power_of_two_scale
from wsae.train.loggers.mirror import current
from wsae.train.loop import CHECKPOINT_SECONDS, Stopped, enter, held, same_run
from wsae.train.metrics import JsonLines
from wsae.train.parallel.config import even_part
from wsae.train.parallel.step import Shard, Start, make_shard, shared_step
from wsae.train.parallel.world import MAX, World
from wsae.train.state import make_batch, metrics_row
from wsae.train.step import lr_factor

# Checkpoints of a run on many ranks: torch.distributed.checkpoint in safetensors, for any other
# number of ranks.
#
# Each rank writes the latents it holds to one safetensors file with their offsets. The tensors have
# the names that `wsae.train.checkpoint` gives them, so either kind of checkpoint resumes on any
# mesh.

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
    return run / CHECKPOINTS / f"step-{step:09d}"


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


# What each rank reads: its hooks, and its rows of every batch. The batches are those of one
# process.


def only_hooks(source: ActivationSource, hooks: tuple[str, ...]) -> ActivationSource:
    """Return a source that reads these hooks alone where it can (a store), else the source itself."""
    if isinstance(source, StoreSource) and hooks != tuple(source.hooks):
        return StoreSource(source.store.path, hooks, verify=False)  # rank 0 has checked the files
    return source


def rows_of(
    source: ActivationSource, batch_size: int, seed: int, state: State | None, rows: slice
) -> BatchStream:
    """Return the source's stream of batches with these rows of each only.

    Stores and arrays read no other rows; a live model computes all of them, so every rank runs it.
    """
    stream = source.stream(batch_size, seed, state)
    if isinstance(stream, ShuffledStream):
        whole = stream._gather
        stream._gather = lambda index: whole(index[rows])
        return stream
    return _Rows(stream, rows)


class _Rows:
    """Some rows of every batch of a stream."""

    def __init__(self, stream: BatchStream, rows: slice) -> None:
        self._stream, self._rows = stream, rows

    def next(self) -> Batch:
        """Return the rows of the next batch by hook."""
        return {hook: x[self._rows] for hook, x in self._stream.next().items()}

    def state(self) -> State:
        """Return the exact position as JSON."""
        return self._stream.state()


# The loop of a run on many ranks: all take the same steps, agree when to save and stop, and rank 0
# writes metrics.

AGREE_S, AGREE_STEPS = 1.0, 100
"""Ranks ask each other whether to save or stop about so often, and at least every so many steps."""
METRICS = ("loss", "reconstruction", "auxk", "fvu", "fvu_weighted", "l0", "dead_frac")


def run_steps(
    cfg: TrainConfig,
    shards: list[Shard],
    stream: BatchStream,
    first: int,
    tick: Tick,
    on_step: Callable[[int], None],
) -> None:
    """Train this rank's shards from step `first` to the end; `on_step(n)` follows each step with the number done."""
    hooks: dict[str, list[Shard]] = {}
    for shard in shards:
        hooks.setdefault(shard.hook, []).append(shard)
    for step in range(first, cfg.steps):
        batch = stream.next()
        for hook, own in hooks.items():
            x = batch[hook].to(own[0].window.device)
            common = make_batch(x, own[0].member)
            for shard in own:
                shared_step(shard, common, step, cfg)
        on_step(step + 1)
        tick(cfg.batch_size)


class Recorder:
    """Writes metrics and checkpoints between steps, and stops all ranks between steps when one is asked to."""

    def __init__(
        self,
        run: Path,
        cfg: TrainConfig,
        shards: list[Shard],
        rates: dict[str, float],
        world: World,
    ) -> None:
        self.run, self.cfg, self.shards, self.world = run, cfg, shards, world
        self.rates = rates
        """Peak learning rate of every member of the run, by its name in checkpoints, in the order of one process."""
        self.metrics, self.speed = JsonLines(run / METRICS_FILE), JsonLines(run / SPEED)
        self.mirror = current()
        self.stream: BatchStream | None = None
        self.stop = False
        self.fields: dict[str, float] = {}
        self._saved_at = self._logged_at = self._asked_at = time.monotonic()
        self._cost = 0.0
        self._logged = self._asked = self._ask_at = 0

    def begin(self, stream: BatchStream, first: int) -> None:
        """Start at step `first` of a stream."""
        self.stream, self._logged, self._asked, self._ask_at = stream, first, first, first + 1
        self._saved_at = self._logged_at = self._asked_at = time.monotonic()

    def on_step(self, done: int) -> None:
        """Log every `log_every` steps and at the end; save when due or asked to stop, then raise Stopped."""
        last = done == self.cfg.steps
        if done % self.cfg.log_every == 0 or last:
            self._log(done)
        if last or done < self._ask_at:
            return
        stop, due = self._agree(done)
        if stop or due:
            self.save(done)
        if stop:
            raise Stopped(done, self.cfg.steps)

    def save(self, done: int) -> Path:
        """Write a checkpoint of the state after `done` steps."""
        assert self.stream is not None
        begin = time.monotonic()
        for shard in self.shards:
            shard.show_sums()
        place = {"stream": self.stream.state(), **self.metrics.mark()}
        path = save(self.run, done, self.shards, place, self.world)
        self._saved_at = time.monotonic()
        self._cost = self._saved_at - begin
        return path

    def _agree(self, done: int) -> tuple[bool, bool]:
        """Return whether any rank was asked to stop, and whether rank 0's clock says a checkpoint is due."""
        now = time.monotonic()
        ask = torch.tensor([int(self.stop), 0, 0], device=self.world.device)
        if self.world.first:
            due = now - self._saved_at > max(CHECKPOINT_SECONDS, 20 * self._cost)
            a_step = (now - self._asked_at) / max(1, done - self._asked)
            ask[1], ask[2] = int(due), max(1, min(AGREE_STEPS, int(AGREE_S / max(a_step, 1e-9))))
        stop, due, steps = self.world.reduce_(ask, MAX).tolist()
        self._asked, self._asked_at, self._ask_at = done, now, done + steps
        return bool(stop), bool(due)

    def _log(self, done: int) -> None:
        keys = list(self.rates)
        table = torch.zeros(len(keys), len(METRICS), dtype=torch.float64)
        for shard in self.shards:
            shard.show_sums()
            row = metrics_row(shard.member) | {"dead_frac": shard.dead / shard.piece.d_sae}
            if shard.piece.place.leads:
                values = [row[name] for name in METRICS]
                table[keys.index(shard.key)] = torch.tensor(values, dtype=torch.float64)
            shard.window.zero_()
        rows = self.world.reduce_(table.to(self.world.device)).tolist()
        if self.world.first:
            self._write(done, rows)

    def _write(self, done: int, rows: list[list[float]]) -> None:
        cfg = self.cfg
        factor = lr_factor(done - 1, cfg.steps, cfg.warmup, cfg.decay)
        written = []
        for (key, rate), values in zip(self.rates.items(), rows, strict=True):
            hook, name = key.rsplit("|", 1)
            row = dict(zip(METRICS, values, strict=True))
            head = {"step": done, "tokens": done * cfg.batch_size, "hook": hook, "member": name}
            written.append({**head, **row, "lr": rate * factor})
            self.metrics.write(written[-1])
            self.fields = {"fvu": row["fvu"], "l0": row["l0"]}
        self.mirror.write(written)
        now = time.monotonic()
        if done > self._logged:
            tokens = (done - self._logged) * cfg.batch_size
            self.speed.write({"step": done, "tokens_per_s": tokens / (now - self._logged_at)})
        self._logged_at, self._logged = now, done


@contextlib.contextmanager
def stopping(recorder: Recorder) -> Iterator[None]:
    """Let Ctrl-C or SIGTERM on any rank stop all of them between steps, after a checkpoint.

    Never at once: torchrun sends a second signal to the ranks that heard the first, and kills those that linger.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: object) -> None:  # noqa: ARG001
        recorder.stop = True

    old = {n: signal.signal(n, ask) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


# A checkpoint of many ranks as one process reads it.


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
    world: World,
    progress: Progress = quiet,
    resume: bool = False,
) -> Path:
    """Train a family into the directory `out` with all ranks of `world`, and return `out`; every rank calls this.

    The run is that of `train_run` up to the order of fp32 sums, and continues with `resume` on any number of ranks.
    Raises UserError as `train_run` does and for a mesh that does not fit, `Stopped` on all ranks when one is
    interrupted, and RuntimeError from torch.distributed when a rank is gone.
    """
    _check(cfg, source, world)
    with held(out) if world.first else contextlib.nullcontext():
        identity = world.from_first(lambda: _entered(cfg, source, out, resume))
        if identity is None:
            return out
        pairs = [(hook, i) for hook in source.hooks for i in range(len(cfg.members))]
        own = pairs[even_part(len(pairs), world.layout.layers, world.layer)]
        part = only_hooks(source, tuple(dict.fromkeys(hook for hook, _ in own)))
        shards, about = _shards(cfg, part, own, world, progress)
        told = _merged(world.to_first(about if world.place.leads else {}))
        if world.first:
            write_json(out / GAMMA_FILE, told["gamma"])
        rates = {
            f"{hook}|{cfg.names()[i]}": cfg.members[i].learning_rate(source.hooks[hook])
            for hook, i in pairs
        }
        recorder = Recorder(out, cfg, shards, rates, world)
        last = _train(cfg, part, recorder, world, progress)
        finals = world.to_first(_write_members(out, last, shards))
        if world.first:
            _finish(out, identity, _merged([told, *finals]), list(source.hooks), cfg)
        world.from_first(lambda: None)  # nobody leaves before the manifest is there
    return out


def _check(cfg: TrainConfig, source: ActivationSource, world: World) -> None:
    layout, pairs = world.layout, len(source.hooks) * len(cfg.members)
    if layout.data > cfg.batch_size:
        raise UserError(
            f"--mesh data={layout.data}: a batch of {cfg.batch_size} rows leaves a rank without; use fewer"
        )
    if layout.layers > pairs:
        raise UserError(
            f"--mesh layers={layout.layers}: there are {len(source.hooks)} hooks of {len(cfg.members)} members to "
            f"divide; use at most {pairs}"
        )
    if cfg.kernels == "native":
        raise UserError("kernels 'native' are for one process; use auto or eager on several")


def _entered(
    cfg: TrainConfig, source: ActivationSource, out: Path, resume: bool
) -> dict[str, Any] | None:
    """Return the run's identity once `out` is ready for it, None when it holds the finished run."""
    identity = {"train": cfg.to_dict(), "data": source.digest(), "source": source.describe()}
    if (out / MANIFEST).exists():
        read_manifest(out, "run")
        same_run(out, identity)
        shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)  # killed before it could
        return None
    enter(out, identity, resume)
    return identity


def _shards(
    cfg: TrainConfig,
    source: ActivationSource,
    own: list[tuple[str, int]],
    world: World,
    progress: Progress,
) -> tuple[list[Shard], dict[str, Any]]:
    """Return this rank's shards at step 0, and what the run's records say of them."""
    stats = source.stats(progress)
    found = covariances(cfg, source, stats, progress)
    shards, about = [], {"gamma": {}, "d_in": {}, "scale": {}, "rows": {}}
    for hook, number in own:
        s, member = stats[hook], cfg.members[number]
        start = Start(s.kept.mean, s.kept.variance.sqrt(), power_of_two_scale(s.kept))
        shard = make_shard(hook, cfg.names()[number], member, cfg, start, world)
        gamma = initial_gamma(member.gamma, s, found.get(hook))
        shard.member.sae.set_gamma(gamma)
        record = gamma_record(member.gamma, gamma, s, found.get(hook))
        about["gamma"].setdefault(hook, {})[shard.member.name] = record
        about["d_in"][hook], about["rows"][hook] = s.kept.d_in, s.kept.n
        about["scale"][hook] = start.scale
        shards.append(shard)
    return shards, about


def _merged(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return nested dicts as one; where two have a value the later wins."""
    whole: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            whole[key] = _merged([whole.get(key, {}), value]) if isinstance(value, dict) else value
    return whole


def _train(
    cfg: TrainConfig,
    source: ActivationSource,
    recorder: Recorder,
    world: World,
    progress: Progress,
) -> Path:
    """Train to the end and return the checkpoint of the last step, from which the members are written."""
    place = load(recorder.run, recorder.shards, world)
    first = int(place["step"]) if place else 0
    data = world.place.data
    rows = even_part(cfg.batch_size, data.size, data.index)
    stream = rows_of(source, cfg.batch_size, cfg.seed, place["stream"] if place else None, rows)
    recorder.begin(stream, first)
    if world.first:
        recorder.metrics.back_to(place)
    total = cfg.steps * cfg.batch_size
    copied = recorder.mirror.following(recorder.run) if world.first else contextlib.nullcontext()
    with stopping(recorder), copied:
        if first == cfg.steps:  # killed between the last step and the members
            return place_of(recorder.run, first)
        with progress("train", total, "tokens", first * cfg.batch_size) as tick:
            run_steps(
                cfg,
                recorder.shards,
                stream,
                first,
                lambda n, **fields: tick(n, **recorder.fields, **fields),
                recorder.on_step,
            )
    return recorder.save(cfg.steps)


def _write_members(out: Path, last: Path, shards: list[Shard]) -> dict[str, Any]:
    """Write the members this rank speaks for (scale folded in), one after the other, and return their final gamma."""
    told: dict[str, Any] = {"gamma": {}}
    for shard in shards:
        if not shard.piece.place.leads:
            continue
        member = shard.member
        sae = SparseAutoencoder(member.cfg.sae_config(len(member.mean)))
        sae.set_tensors(read_whole(last, f"{shard.key}|sae."), str(last))
        sae = sae.scaled(member.scale).requires_grad_(False)
        sae.save(out / MEMBERS / shard.hook / member.name)
        if member.cfg.gamma.rule == "latent_variance":
            final = describe_gamma(member.cfg.gamma, sae.gamma)
            told["gamma"].setdefault(shard.hook, {})[member.name] = final
    return told


def _finish(
    out: Path, identity: dict[str, Any], told: dict[str, Any], hooks: list[str], cfg: TrainConfig
) -> None:
    """Write the records and the manifest, then drop the checkpoints."""
    names = {hook: cfg.names() for hook in hooks}
    files = [CONFIG, GAMMA_FILE, METRICS_FILE]
    for hook in hooks:
        for name in names[hook]:
            place = Path(MEMBERS) / hook / name
            files += [str(place / file) for file in (CONFIG, WEIGHTS, MANIFEST)]
    write_json(out / GAMMA_FILE, told["gamma"])
    info = {"members": names, **{key: told[key] for key in ("d_in", "scale", "rows")}}
    write_manifest(out, "run", identity, files, inputs={"data": identity["data"]}, info=info)
    shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
