"""TensorBoard: one event file in `tensorboard/` of the run directory."""

import logging
import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wsae.core.files import opened
from wsae.train.loggers.mirror import Logger, needed

_WRITER = "tensorboard.summary.writer.record_writer"
_EVENT = "tensorboard.compat.proto.event_pb2"
_SUMMARY = "tensorboard.compat.proto.summary_pb2"
_HEAD = struct.Struct("<QI")
_FOOT = 4
_log = logging.getLogger(__name__)


def tensorboard() -> Logger:
    """Return the logger that writes TensorBoard's event files."""
    return Logger("tensorboard", _check, EventFile)


def _check() -> None:
    for module in (_WRITER, _EVENT, _SUMMARY):
        needed(module, "tensorboard")


class EventFile:
    """An event file of the scalars of a run; it takes the place of those that were there.

    A step that the former files had keeps its time there.
    """

    def __init__(self, run: Path) -> None:
        self._event: Any = needed(_EVENT, "tensorboard")
        self._summary: Any = needed(_SUMMARY, "tensorboard")
        place = run / "tensorboard"
        place.mkdir(exist_ok=True)
        former = sorted(place.glob("events.out.tfevents.*"))
        self._times: dict[int, float] = {}
        for path in former:
            self._times |= self._times_in(path)
        now = time.time_ns()
        name = f"events.out.tfevents.{now // 10**9}.{socket.gethostname()}.{os.getpid()}.{now}"
        file = (place / name).open("xb")
        self._records = needed(_WRITER, "tensorboard").RecordWriter(file)
        self._add(file_version="brain.Event:2")
        session = self._event.SessionLog(status=self._event.SessionLog.START)
        self._add(session_log=session, step=0)  # a TensorBoard that looks on forgets former files
        self._records.flush()
        for path in former:
            path.unlink()

    def log(self, step: int, values: dict[str, float]) -> None:
        """Append one step's scalars."""
        pairs = [self._summary.Summary.Value(tag=k, simple_value=v) for k, v in values.items()]
        when = self._times.get(step, time.time())
        self._add(summary=self._summary.Summary(value=pairs), step=step, wall_time=when)
        self._records.flush()

    def close(self, finished: bool) -> None:  # noqa: ARG002
        """Close the file."""
        self._records.close()

    def _times_in(self, path: Path) -> dict[int, float]:
        events = map(self._event.Event.FromString, records(path))
        times: dict[int, float] = {}
        try:
            for event in events:
                if event.summary.value:
                    times[event.step] = event.wall_time
        except needed("google.protobuf.message", "tensorboard").DecodeError as error:
            _log.warning("%s: damaged (%s); its later steps get new times", path, error)
        return times

    def _add(self, **fields: Any) -> None:
        event = self._event.Event(**{"wall_time": time.time(), **fields})
        self._records.write(event.SerializeToString())


def records(path: Path) -> Iterator[bytes]:
    """Yield the records of an event file up to the first that was cut (checksums are not compared)."""
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        while len(head := file.read(_HEAD.size)) == _HEAD.size:
            length = _HEAD.unpack(head)[0]
            if file.tell() + length + _FOOT > size:
                return
            yield file.read(length)
            file.seek(_FOOT, os.SEEK_CUR)
