"""The record of a run: `metrics.jsonl`, which is authoritative, and TensorBoard events, which are made from it.

For a folder in an object store both are written to disk, and uploaded whole from time to time.

An interrupted run repeats its unfinished round.  To leave the same record as an uninterrupted run, the writer first
removes that round and later ones from the file, and rewrites the events from the rest.  Write a round's metrics before
its checkpoint: every round that a checkpoint contains is then on record.
"""

import json
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from activedpo_jax.files import plain
from activedpo_jax.hosts import on_first
from activedpo_jax.remote import RemotePath, in_store

# tensorboardX imports torch where that is installed, which takes seconds, and nothing here uses it.
_torch_is_absent = "torch" not in sys.modules
if _torch_is_absent:
    sys.modules["torch"] = None  # type: ignore[assignment]
from tensorboardX.event_file_writer import EventsWriter  # noqa: E402
from tensorboardX.proto.event_pb2 import Event  # noqa: E402
from tensorboardX.summary import scalar  # noqa: E402

if _torch_is_absent:
    del sys.modules["torch"]

_RESERVED = ("round", "step", "time")
_UPLOAD_SECONDS = 10  # at least, between one upload and the next of records that nothing is built on yet


class MetricsWriter:
    """Appends records to `metrics.jsonl` and `tensorboard/` in a run's folder; a context manager.

    A record is one line: `{"round": 3, "step": 150, "time": <seconds since 1970>, "train/loss": 0.52, ...}`.

    Args:
      folder: the run's folder; made if it is missing.
      from_round: the first round to be written; the file's records of it and of later rounds are removed.

    Raises:
      ValueError: if a line to be kept is not a record; names file and line.
    """

    @on_first
    def __init__(self, folder: pathlib.Path, from_round: int = 0) -> None:
        there = in_store(folder)
        self._copy = _Copy(there) if there else None
        if self._copy is not None:
            folder = self._copy.place
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        kept, size = _records_before(path, from_round) if path.exists() else ([], 0)
        self._file = open(path, "ab")  # noqa: SIM115 (closed by `close`)
        if size < os.path.getsize(path):
            self._file.truncate(size)
            os.fsync(self._file.fileno())
        events = folder / "tensorboard"
        events.mkdir(exist_ok=True)
        for old in events.glob("events.out.tfevents.*"):
            old.unlink()
        # tensorboardX's `SummaryWriter` writes in a thread, which a full disk ends with a traceback of its own.
        self._events = EventsWriter(str(events / "events"))
        for record in kept:
            self._show(record)
        self._events.flush()

    @on_first
    def write(self, round_number: int, step: int, values: Mapping[str, Any]) -> None:
        """Appends one record, and returns once it is on disk.

        Args:
          round_number: the round that it belongs to; never less than the previous record's.
          step: its position on TensorBoard's x axis, such as labels for a round's figures, or optimiser steps.
          values: named scalars such as `train/loss`; TensorBoard groups them by the part before the slash.
            A value that is not finite is null in the file, and a gap in TensorBoard.

        Raises:
          ValueError: if a name is `round`, `step` or `time`.
        """
        if clash := [name for name in values if name in _RESERVED]:
            raise ValueError(f"metrics: {clash[0]!r} is a field of every record; give the value another name")
        record = plain({"round": round_number, "step": step, "time": time.time(), **values})
        self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._show(record)
        self._events.flush()
        if self._copy is not None:
            self._copy.changed()

    @on_first
    def sync(self) -> None:
        """Returns once all records are in the folder: on disk they are, in an object store they may be late."""
        if self._copy is not None:
            self._copy.upload()

    @on_first
    def close(self) -> None:
        self._file.close()
        self._events.close()
        if self._copy is not None:
            self._copy.upload()
            self._copy.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _show(self, record: Mapping[str, Any]) -> None:
        for name, value in record.items():
            if name not in _RESERVED and value is not None:
                self._events.write_event(
                    Event(wall_time=record["time"], step=record["step"], summary=scalar(name, value))
                )


class _Copy:
    """The files of a folder in an object store, on disk."""

    def __init__(self, folder: RemotePath) -> None:
        self._folder, self._uploaded, self._is_changed = folder, 0.0, True
        self._temporary = tempfile.TemporaryDirectory(prefix="activedpo_jax_")
        self.place = pathlib.Path(self._temporary.name)
        path = folder / "metrics.jsonl"
        if path.exists():
            (self.place / path.name).write_bytes(path.read_bytes())

    def changed(self) -> None:
        self._is_changed = True
        if time.monotonic() - self._uploaded > _UPLOAD_SECONDS:
            self.upload()

    def upload(self) -> None:
        if not self._is_changed:
            return
        events = list((self.place / "tensorboard").iterdir())
        for path in (self.place / "metrics.jsonl", *events):
            (self._folder / str(path.relative_to(self.place))).upload(path)
        if not self._uploaded:
            names = {path.name for path in events}
            for old in (self._folder / "tensorboard").iterdir():
                if old.name not in names:
                    old.remove()
        self._uploaded, self._is_changed = time.monotonic(), False

    def close(self) -> None:
        self._temporary.cleanup()


@on_first
def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, in order; a last line that a crash cut short is left out.

    Raises:
      ValueError: if another line is not a record; names file and line.
    """
    return _records_before(path, None)[0]


def _records_before(path: pathlib.Path, end: int | None) -> tuple[list[dict[str, Any]], int]:
    """The records of rounds below `end` (None: of all), and the number of bytes that they fill at the file's start."""
    records: list[dict[str, Any]] = []
    size = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break  # the process died while writing it
            try:
                record = json.loads(line)
                round_number = record["round"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}:{number}: not a record with a round; restore the line, or cut the file before it"
                ) from error
            if end is not None and round_number >= end:
                break
            records.append(record)
            size += len(line)
    return records, size
