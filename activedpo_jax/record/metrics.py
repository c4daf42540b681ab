"""The record of a run: `metrics.jsonl`, which is the truth, and TensorBoard events, which are made from it.

A run that was interrupted does its unfinished round again.  So that its record is the one of a run that was
not, the writer first takes out what the file holds of that round and of later ones, and writes the events
anew from the rest.  Write a round's metrics before its checkpoint: what is in the checkpoint is then here.
"""

import json
import os
import pathlib
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import tensorboardX

from activedpo_jax.files import plain

_RESERVED = ("round", "step", "time")
_SECONDS_TO_TENSORBOARD = 10  # after which events are on disk; should they be lost, the file has them


class MetricsWriter:
    """Appends records to `metrics.jsonl` and `tensorboard/` in a run's folder; a context manager.

    A record is one line: `{"round": 3, "step": 150, "time": <seconds since 1970>, "train/loss": 0.52, ...}`.

    Args:
      folder: of the run; made if it is not there.
      from_round: the first round to be written; what the file holds of it and of later ones is taken out.

    Raises:
      ValueError: if a line of the file that stays is not a record; names file and line.
    """

    def __init__(self, folder: pathlib.Path, from_round: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        kept, size = _records_before(path, from_round) if path.exists() else ([], 0)
        self._file = open(path, "ab")  # noqa: SIM115 (closed by `close`)
        if size < os.path.getsize(path):
            self._file.truncate(size)
            os.fsync(self._file.fileno())
        events = folder / "tensorboard"
        for old in events.glob("events.out.tfevents.*"):
            old.unlink()
        self._events = tensorboardX.SummaryWriter(str(events), flush_secs=_SECONDS_TO_TENSORBOARD)
        for record in kept:
            self._show(record)

    def write(self, round_number: int, step: int, values: Mapping[str, Any]) -> None:
        """Appends one record, and returns once it is on disk.

        Args:
          round_number: the round that it belongs to; never less than that of the record before.
          step: its place on TensorBoard's x axis: labels for a round's figures, say, or optimiser steps.
          values: named scalars, `train/loss` say; TensorBoard groups them by what is before the slash.
            One that is not finite is null in the file, and a gap in TensorBoard.

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

    def close(self) -> None:
        self._file.close()
        self._events.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _show(self, record: Mapping[str, Any]) -> None:
        for name, value in record.items():
            if name not in _RESERVED and value is not None:
                self._events.add_scalar(name, value, record["step"], walltime=record["time"])


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, in order; a last line that was cut short by a crash is left out.

    Raises:
      ValueError: if another line is not a record; names file and line.
    """
    return _records_before(path, None)[0]


def _records_before(path: pathlib.Path, end: int | None) -> tuple[list[dict[str, Any]], int]:
    """The records of rounds below `end` (None: of all), and how many bytes at the file's start they fill."""
    records: list[dict[str, Any]] = []
    size = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break  # the process died while writing it
            try:
                record = json.loads(line)
                this_round = record["round"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}:{number}: not a record with a round; restore the line, or cut the file before it"
                ) from error
            if end is not None and this_round >= end:
                break
            records.append(record)
            size += len(line)
    return records, size
