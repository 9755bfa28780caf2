"""The ranks of a job: who this one is, whom it shares work with, and what they tell each other."""

import contextlib
import ctypes
import functools
import json
import os
import signal
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Int64
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from wsae.core.errors import UserError
from wsae.kernels.native.build import library, why_not
from wsae.train.parallel.config import AXES, Layout, parse_layout

PATIENCE_S = 3.0
"""How long the rank that reports a failure looks for the one that is gone."""
SPEAKER = "speaker"
"""Key of the store that is there once a rank has failed."""
_SIGNS = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe")


class RankLost(RuntimeError):
    """Another rank ended without a word, or stopped answering."""


@contextlib.contextmanager
def one_voice(store: dist.Store, rank: int, ranks: int) -> Iterator[None]:
    """Let the first rank that fails inside the block report it in one line, and close the stderr of every later one.

    A collective that broke because another rank is gone becomes a `RankLost` naming that rank where it ran on the same
    machine. SIGTERM, which torchrun sends to the ranks that are left, interrupts the block; it cannot cut the report.
    """

    def interrupt(number: int, frame: object) -> None:  # noqa: ARG001
        raise KeyboardInterrupt

    def leave() -> bool:  # in order; whether this rank is the first to fail
        try:
            store.set(f"leaves/{rank}", "1")
            return store.add(SPEAKER, 1) == 1
        except RuntimeError:  # the store went with the rank or the torchrun that kept it
            return True

    main = threading.current_thread() is threading.main_thread()
    old = signal.signal(signal.SIGTERM, interrupt) if main else None
    store.set(f"who/{rank}", f"{_machine()} {os.getpid()}")
    try:
        yield
        store.set(f"leaves/{rank}", "1")
    except BaseException as error:
        if main:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        text = str(error).lower()
        broken = isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS)
        if not leave():
            sys.stderr.flush()
            with open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), 2)
        elif broken or isinstance(error, dist.DistError):
            raise RankLost(_report(store, rank, ranks)) from error
        raise
    finally:
        if main and signal.getsignal(signal.SIGTERM) is interrupt:
            signal.signal(signal.SIGTERM, old)


def _report(store: dist.Store, rank: int, ranks: int) -> str:
    until = time.monotonic() + PATIENCE_S
    try:
        while time.monotonic() < until:
            if gone := gone_ranks(store, rank, ranks):
                return gone
            time.sleep(0.05)
    except RuntimeError:  # the store is gone too
        return "the rank that keeps the job's addresses is gone"
    return "a rank on another machine is gone, or did not answer in time"


def gone_ranks(store: dist.Store, rank: int, ranks: int) -> str:
    """Name the ranks of this machine whose process ended without leaving in order; empty where none did."""
    here, found = _machine(), []
    for other in range(ranks):
        known = store.check([f"who/{other}"]) and not store.check([f"leaves/{other}"])
        if other == rank or not known:
            continue
        place, _, pid = store.get(f"who/{other}").decode().partition(" ")
        if place == here and _ended(int(pid)):
            found.append(str(other))
    if not found:
        return ""
    who = (
        f"rank {found[0]} of {ranks} is"
        if len(found) == 1
        else f"ranks {', '.join(found)} of {ranks} are"
    )
    return f"{who} gone (killed, or out of memory)"


def _look(store: dist.Store, rank: int, ranks: int) -> None:
    """Raise RankLost where waiting for the other ranks is of no use."""
    if gone := gone_ranks(store, rank, ranks):
        raise RankLost(gone)
    if store.check([SPEAKER]):
        raise RankLost("another rank has ended the job")


def _machine() -> str:
    """Name what makes two process numbers comparable: the host, and on Linux the container's view of processes."""
    view = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()}/{os.readlink(view) if view.exists() else ''}"


def _ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    # a zombie has a pid; where there is no /proc it is reaped soon
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z"


TIMEOUT_S = 300
"""A collective that waits longer than this for another rank fails. Work that only one rank does (checksums, the
finished members) is waited for without limit."""
ALIVE_S = 0.5
"""Seconds between looks at the other ranks while waiting for them."""
SUM, MAX, MIN = dist.ReduceOp.SUM, dist.ReduceOp.MAX, dist.ReduceOp.MIN
_OPERATIONS = {SUM: torch.add, MAX: torch.maximum, MIN: torch.minimum}


class HostMemory:
    """Memory that all ranks of a group see, where they run on one machine: they meet and exchange tensors in it.

    Each rank writes to its own part, and reads the others' once all have met. There are two of each in turn, so one
    meeting an exchange is enough. The memory has no name and goes with the processes. A meeting takes microseconds;
    over a socket, on cores that are busy, a millisecond.
    """

    SEAT = 4096
    """Bytes before a part, of which the first four say at which meeting its rank is."""

    def __init__(self, group: dist.ProcessGroup, look: Callable[[], None]) -> None:
        self._group, self._own, self._look = group, dist.get_rank(group), look
        self._parts: list[Tensor] = []
        """Of each rank [2, bytes]."""
        self._seats = (ctypes.c_void_p * 0)()
        self._met, self._able = 0, True

    def exchange(self, tensor: Tensor) -> list[Tensor] | None:
        """Return every rank's tensor of one shape, to be read before the next exchange; None where that cannot be."""
        size = tensor.nbytes
        if not self._able or tensor.device.type != "cpu":
            return None
        if not self._parts or self._parts[0].shape[1] < size:
            self._able = self._share(size)
        if not self._able:
            return None
        self._met += 1
        every = [
            part[self._met % 2, :size].view(tensor.dtype).view(tensor.shape) for part in self._parts
        ]
        every[self._own].copy_(tensor)
        while not library().meet_ranks(
            self._seats, len(every), self._own, self._met, int(ALIVE_S * 1e6)
        ):
            self._look()
        return every

    def _told(self, *numbers: int) -> Int64[Tensor, "ranks numbers"]:
        """Return every rank's numbers, once all are here."""
        own = torch.tensor(numbers, dtype=torch.int64, device="cpu")
        every = [torch.empty_like(own) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(every, own, group=self._group)
        return torch.stack(every)

    def _share(self, size: int) -> bool:
        """Take new memory of every rank, at least [2, size] bytes each; False where one of them cannot have it."""
        size = -(-size // self.SEAT) * self.SEAT
        whole, file = self.SEAT + 2 * size, None
        place = zlib.crc32(_machine().encode())
        try:
            if hasattr(os, "memfd_create") and why_not() is None:
                file = os.memfd_create("wsae")
                with contextlib.suppress(OSError):  # no room: the file stays shorter than asked for
                    os.posix_fallocate(file, 0, whole)
            if file is None or os.fstat(file).st_size < whole:
                place = -1
            told = self._told(place, os.getpid(), -1 if file is None else file)
            memory = []
            if place >= 0 and bool((told[:, 0] == place).all()):
                with contextlib.suppress(RuntimeError):  # another user's, or no /proc
                    memory = [
                        _mapped(f"/proc/{pid}/fd/{fd}", whole) for _, pid, fd in told.tolist()
                    ]
            met = self._told(len(memory) == len(told))
        finally:
            if file is not None:
                os.close(file)
        self._parts = [part[self.SEAT :].view(2, size) for part in memory]
        self._seats = (ctypes.c_void_p * len(memory))(*(part.data_ptr() for part in memory))
        self._met = 0
        return bool(met.all())


def _mapped(path: str, size: int) -> Tensor:
    return torch.from_file(path, shared=True, size=size, dtype=torch.uint8)


@dataclass(frozen=True)
class MeshAxis:
    """One axis of the mesh: how many ranks share its work, which of them this is, and their process group."""

    size: int = 1
    index: int = 0
    group: dist.ProcessGroup | None = None
    memory: HostMemory | None = None

    def reduce_(self, tensor: Tensor, op: dist.ReduceOp.RedOpType = SUM) -> Tensor:
        """Replace a tensor by its sum (or largest, smallest) over the axis; every rank gets the same bits."""
        if self.size == 1:
            return tensor
        every = None if self.memory is None else self.memory.exchange(tensor)
        if every is None:
            dist.all_reduce(tensor, op=op, group=self.group)
            return tensor
        of_two, (first, second, *others) = _OPERATIONS[op], every
        of_two(first, second, out=tensor)
        for other in others:
            of_two(tensor, other, out=tensor)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """Return every rank's tensor of one shape, stacked in the order of the axis [size, ...]."""
        if self.size == 1:
            return tensor[None]
        every = None if self.memory is None else self.memory.exchange(tensor)
        if every is not None:
            return torch.stack(every)
        out = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(out, tensor.contiguous(), group=self.group)
        return torch.stack(out)


@dataclass(frozen=True)
class MeshPlace:
    """Where a rank stands among those that train the same members."""

    data: MeshAxis = MeshAxis()
    latents: MeshAxis = MeshAxis()

    @property
    def leads(self) -> bool:
        """Whether this rank speaks for them."""
        return self.data.index == 0 and self.latents.index == 0

    def reduce_(self, tensor: Tensor, op: dist.ReduceOp.RedOpType = SUM) -> Tensor:
        """Replace a tensor by its sum (or largest, smallest) over all of them."""
        return self.data.reduce_(self.latents.reduce_(tensor, op), op)

    def before(self, count: Tensor) -> Tensor:
        """Return the sum of the counts of the ranks before this one (by data, then by latents)."""
        row = self.latents.gather(count)
        rows = self.data.gather(row.sum(0))
        return row[: self.latents.index].sum(0) + rows[: self.data.index].sum(0)


@dataclass
class Mesh:
    """All ranks of a job; `sub` is the mesh [data, latents] of those that train the same members."""

    rank: int
    layout: Layout
    device: str
    store: dist.Store
    place: MeshPlace = field(default_factory=MeshPlace)
    layer: int = 0
    sub: DeviceMesh | None = None
    readers: MeshAxis = MeshAxis()
    """Those that read other rows than this rank: the axis `data`, also where they then share latents (`by_latents`)."""
    unfit: str | None = None
    """Why the compiled kernels cannot run on every rank."""
    _told: int = 0

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which alone prints and writes the run's own files."""
        return self.rank == 0

    def from_first(self, call: Callable[[], Any]) -> Any:
        """Let rank 0 call and give its JSON-ready result to all; the others wait without limit."""
        self._told += 1
        key = f"wsae/{self._told}"
        if self.first:
            value = call()
            self.store.set(key, json.dumps(value))
            return value
        return json.loads(self._waited(key))

    def to_first(self, value: Any) -> list[Any]:
        """Return every rank's JSON-ready value in order on rank 0, which waits without limit; [] elsewhere."""
        self._told += 1
        key = f"wsae/{self._told}"
        self.store.set(f"{key}/{self.rank}", json.dumps(value))
        if not self.first:
            return []
        found = []
        for rank in range(self.layout.ranks):
            found.append(json.loads(self._waited(f"{key}/{rank}")))
            self.store.delete_key(f"{key}/{rank}")
        return found

    def reduce_(self, tensor: Tensor, op: dist.ReduceOp.RedOpType = SUM) -> Tensor:
        """Replace a tensor by its sum (or largest, smallest) over all ranks."""
        if self.layout.ranks > 1:
            dist.all_reduce(tensor, op=op)
        return tensor

    def _waited(self, key: str) -> bytes:
        """Return a key's value once it is there; looks now and then, so that signals and losses are noticed."""
        pause = 0.01
        while not self.store.check([key]):
            if pause >= ALIVE_S:
                _look(self.store, self.rank, self.layout.ranks)
            time.sleep(pause)
            pause = min(ALIVE_S, 1.5 * pause)
        return self.store.get(key)


@contextlib.contextmanager
def joined(mesh: str | None, device: str = "cpu") -> Iterator[Mesh]:
    """Join the job that torchrun's environment describes, in the layout of `parse_layout`, until the block ends.

    gloo carries CPU tensors, NCCL those on a GPU. When the block fails on several ranks, one of them keeps its voice
    and the others' stderr is closed; a rank that vanished becomes a `RankLost` that names it.
    """
    limit = timedelta(seconds=TIMEOUT_S)
    store, rank, ranks = next(dist.rendezvous("env://", timeout=limit))
    with one_voice(store, rank, ranks):
        layout = parse_layout(mesh, ranks)
        where = _own_device(device)
        kind = torch.device(where).type
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        groups = dist.PrefixStore("groups", store)
        dist.init_process_group(backend, store=groups, rank=rank, world_size=ranks, timeout=limit)
        try:
            yield lay_out(layout, rank, where, store)
        finally:
            dist.destroy_process_group()


def _own_device(device: str) -> str:
    if not device.startswith("cuda"):
        if torch.device(device).type != "cpu":
            raise UserError(f"--device {device}: several processes train on cpu or cuda only")
        return device
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= torch.cuda.device_count():
        raise UserError(
            f"--device {device}: process {local} of this machine has no GPU of its own "
            f"({torch.cuda.device_count()} here); lower torchrun's --nproc-per-node"
        )
    torch.cuda.set_device(local)
    return f"cuda:{local}"


def lay_out(layout: Layout, rank: int, device: str, store: dist.Store) -> Mesh:
    """Return the world of a process group that is there already, in this layout."""
    sizes = tuple(getattr(layout, name) for name in AXES)
    mesh = init_device_mesh(torch.device(device).type, sizes, mesh_dim_names=AXES)
    look = functools.partial(_look, store, rank, layout.ranks)

    def axis(name: str, size: int) -> MeshAxis:
        group = mesh.get_group(name)
        memory = HostMemory(group, look) if size > 1 else None
        return MeshAxis(size, mesh.get_local_rank(name), group, memory)

    layers, data, latents = map(axis, AXES, sizes)
    sub = mesh["data", "latents"]
    return Mesh(rank, layout, device, store, MeshPlace(data, latents), layers.index, sub, data)


def by_latents(world: Mesh) -> Mesh:
    """Return the mesh in which ranks that share rows share latents instead; each reads the rows that it read."""
    layout = world.layout
    latents = Layout(layers=layout.layers, latents=layout.data * layout.latents)
    other = lay_out(latents, world.rank, world.device, world.store)
    return replace(world, place=other.place, sub=other.sub)
