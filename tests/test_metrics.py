"""The record of an interrupted run is that of one that was not; TensorBoard shows what the file says."""

import json
import pathlib
import struct
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import pytest
from tensorboardX.proto import event_pb2

from activedpo_jax.record.metrics import MetricsWriter, read_metrics


def write_rounds(writer: MetricsWriter, rounds: Iterable[int]) -> None:
    for number in rounds:
        for step in range(2):
            writer.write(number, 2 * number + step, {"train/loss": jnp.float32(number + step / 4)})
        writer.write(number, 10 * number, {"round/accuracy": 0.5 + number / 16, "round/labels": 10 * number})


def timeless(path: pathlib.Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k != "time"} for record in read_metrics(path)]


def events(folder: pathlib.Path) -> list[tuple[str, int, float]]:
    """What TensorBoard would read: the TFRecords' scalars, in order."""
    found = []
    for path in (folder / "tensorboard").iterdir():
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            data = data[16 + length :]
    return found


def test_records_are_on_disk_at_once(tmp_path: pathlib.Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(0, 0, {"round/accuracy": 0.25, "round/gain": float("inf")})
        (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()  # the writer is still open
        record = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert record["round"] == 0 and record["round/accuracy"] == 0.25 and record["round/gain"] is None
    assert events(tmp_path) == [("round/accuracy", 0, 0.25)]


@pytest.mark.parametrize("torn", [b"", b'{"round": 2, "step": 5, "ti'])
def test_resumed_record_equals_the_uninterrupted(tmp_path: pathlib.Path, torn: bytes) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    with MetricsWriter(whole) as writer:
        write_rounds(writer, range(4))

    with MetricsWriter(broken) as writer:
        write_rounds(writer, range(2))
        writer.write(2, 4, {"train/loss": 99.0})  # round 2 is under way when the process dies
    with open(broken / "metrics.jsonl", "ab") as file:
        file.write(torn)
    before = read_metrics(broken / "metrics.jsonl")
    with MetricsWriter(broken, from_round=2) as writer:
        write_rounds(writer, range(2, 4))

    assert timeless(broken / "metrics.jsonl") == timeless(whole / "metrics.jsonl")
    assert len(timeless(whole / "metrics.jsonl")) == 12
    assert read_metrics(broken / "metrics.jsonl")[:6] == before[:6]  # what stays keeps its times, too
    assert events(broken) == events(whole) and len(events(whole)) == 16


def test_damaged_line_is_named(tmp_path: pathlib.Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        write_rounds(writer, range(2))
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], b"oops\n", *lines[2:]]))
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not a record"):
        MetricsWriter(tmp_path, from_round=1)
    assert path.read_bytes().count(b"\n") == 6  # nothing was cut off


def test_reserved_names_are_refused(tmp_path: pathlib.Path) -> None:
    with (
        MetricsWriter(tmp_path) as writer,
        pytest.raises(ValueError, match="'time' is a field of every record"),
    ):
        writer.write(0, 0, {"time": 3.0})
