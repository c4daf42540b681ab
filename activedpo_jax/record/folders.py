"""The work directory of a command, and how files get into it in one piece.

    DIR/config.json                the command and its options, written at the start and compared on going on
    DIR/<strategy>/seed<seed>/     one folder a run, where there are several; else the run lies in DIR
        rounds/NNN/selected.jsonl  the pairs picked in round NNN, in pick order, with their labels
        metrics.jsonl, tensorboard/, checkpoints, adapter/
        summary.json               see `RunSummary`

JSON has no NaN and no infinity: a number that is not finite is written as null.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NotRequired, TypedDict, get_args

import ml_collections
import numpy as np

Preference = Literal["first", "second"]


class RoundSummary(TypedDict):
    """What `summary.json` says of one round.  Round 0, before any label, has no picks or training."""

    round: int
    labels: int  # so far
    accuracy: float  # held-out preference accuracy
    margin: float  # mean held-out margin of the implicit reward
    heldout_loss: NotRequired[float]  # DPO loss of the held-out pairs, nats
    seconds: dict[str, float]  # by stage
    loss: NotRequired[float | None]  # of training, mean of the last epoch; null: it was not finite
    information_gain: NotRequired[float | None]  # of the round's picks: the growth of log det V, in nats
    score_min: NotRequired[float | None]  # of the round's picks
    score_max: NotRequired[float | None]


class RunSummary(TypedDict):
    """What `summary.json` of one run holds."""

    strategy: str
    seed: int
    rounds: list[RoundSummary]


@dataclasses.dataclass(frozen=True)
class Selected:
    """One picked pair with its label: a line of `selected.jsonl`."""

    pair_id: str
    prompt: str | list[dict[str, str]]  # as a person reads it: text, or chat messages
    first: str  # the response shown first
    second: str
    score: float | None  # what the strategy ranked it by when it was picked; None: it ranks by nothing
    preference: Preference  # which of the two is better
    source: str  # where the label came from
    round: int


def plain(value: Any) -> Any:
    """`value` as JSON has it: dicts with string keys, lists, strings, numbers, None for those not finite.

    Takes ConfigDicts, mappings, sequences, and NumPy or JAX scalars and arrays.

    Raises:
      TypeError: for anything else.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping | ml_collections.ConfigDict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "__array__"):
        return plain(np.asarray(value).tolist())
    raise TypeError(f"{value!r} of type {type(value).__name__} cannot be written as JSON")


def write_atomic(path: pathlib.Path, text: str) -> None:
    """Writes a file so that, whatever kills the process, `path` is as it was, or complete; makes folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # before the rename: else a power cut could leave the name on an empty file
    os.replace(partial, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes `plain(value)` atomically, indented for people."""
    write_atomic(path, json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: pathlib.Path) -> Any:
    """Reads a JSON file.

    Raises:
      FileNotFoundError: if it is not there.
      ValueError: if it is not JSON; names file and line.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON ({error.msg}); restore the file or remove it") from error


def flatten(options: Mapping[str, Any] | ml_collections.ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Nested options as one dict, `{"dpo.beta": 0.1, ...}`, in their order."""
    flat: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, Mapping | ml_collections.ConfigDict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def open_workdir(workdir: pathlib.Path, config: ml_collections.ConfigDict, command: str) -> None:
    """Makes the work directory of a new command, or checks that an old one began as the same, with the same options.

    Args:
      command: the module that is run: `main`, `sft` or `generate`.

    Raises:
      ValueError: if `config.json` is there with other options; names each of them with both values.
    """
    path = workdir / "config.json"
    record = plain({"command": command, **config.to_dict()})
    now = flatten(record)
    if not path.exists():
        write_json(path, record)
        return
    before = flatten(read_json(path))
    absent = object()

    def show(value: Any) -> str:
        return "absent" if value is absent else json.dumps(value, ensure_ascii=False)

    differences = [
        f"{name} (was {show(before.get(name, absent))}, now {show(now.get(name, absent))})"
        for name in now | before
        if before.get(name, absent) != now.get(name, absent)
    ]
    if differences:
        raise ValueError(
            f"{path}: this work directory belongs to other options: {', '.join(differences)}; "
            "to go on with it give the same options as before, for a new run another --workdir"
        )


def run_folder(workdir: pathlib.Path, config: ml_collections.ConfigDict, strategy: str, seed: int) -> pathlib.Path:
    """Where one of the command's runs lies: the work directory itself if it is the only one."""
    if len(config.strategies) * len(config.seeds) == 1:
        return workdir
    return workdir / strategy / f"seed{seed}"


def selected_path(folder: pathlib.Path, round_number: int) -> pathlib.Path:
    return folder / "rounds" / f"{round_number:03d}" / "selected.jsonl"


def write_selected(folder: pathlib.Path, round_number: int, rows: Sequence[Selected]) -> None:
    """Writes a round's picks, in pick order, all or nothing."""
    lines = [json.dumps(plain(dataclasses.asdict(row)), ensure_ascii=False, allow_nan=False) for row in rows]
    write_atomic(selected_path(folder, round_number), "".join(line + "\n" for line in lines))


def read_selected(folder: pathlib.Path, round_number: int) -> list[Selected]:
    """Reads a round's picks back, in pick order.

    Raises:
      FileNotFoundError: if the round was not written.
      ValueError: if a line is not what `write_selected` writes; names file, line and field.
    """
    path = selected_path(folder, round_number)
    rows = []
    with open(path, encoding="utf-8") as file:  # not splitlines(): U+2028 in a response is no end of line
        for number, line in enumerate(file, start=1):
            try:
                rows.append(_selected(json.loads(line), round_number))
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}; restore the file, or remove its round") from error
    return rows


def _selected(row: Any, round_number: int) -> Selected:
    fields = [field.name for field in dataclasses.fields(Selected)]
    if not isinstance(row, dict) or sorted(row) != sorted(fields):
        found = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"got {found}, expected an object with the fields {', '.join(fields)}")
    expected: dict[str, tuple[bool, str]] = {
        "prompt": (isinstance(row["prompt"], str | list), "a string or a list of messages"),
        "score": (isinstance(row["score"], int | float | None), "a number or null"),
        "preference": (row["preference"] in get_args(Preference), "'first' or 'second'"),
        "round": (row["round"] == round_number, str(round_number)),
    }
    for name in ("pair_id", "first", "second", "source"):
        expected[name] = (isinstance(row[name], str), "a string")
    for name, (holds, what) in expected.items():
        if not holds:
            raise ValueError(f"{name}: got {row[name]!r}, expected {what}")
    return Selected(**row)
