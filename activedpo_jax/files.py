"""JSON, and files that are written whole or not at all, on disk or in an object store (see `remote`).

JSON has no NaN and no infinity: a number that is not finite is written as null.
"""

import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from activedpo_jax.remote import RemotePath, in_store, is_remote, local_copy


def plain(value: Any) -> Any:
    """`value` in JSON's terms: dicts with string keys, lists, strings, numbers; None for numbers that are not finite.

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


def folder_at(path: str) -> pathlib.Path:
    """A folder on disk or in an object store; what has to know which asks `remote.in_store`."""
    # A RemotePath has those methods of a Path that are called here.
    return RemotePath(path) if is_remote(path) else pathlib.Path(path)  # type: ignore[return-value]


def on_disk(folder: str | os.PathLike[str]) -> pathlib.Path:
    """The folder itself; of one in an object store a copy, for as long as this process lives."""
    return local_copy(RemotePath(folder)) if is_remote(folder) else pathlib.Path(folder)


def write_atomic(path: pathlib.Path, content: str | bytes) -> None:
    """Writes a file so that `path` is unchanged or complete, whatever kills the process; makes its folders."""
    data = content.encode() if isinstance(content, str) else content
    if there := in_store(path):
        there.write_bytes(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())  # before the rename: otherwise a power cut could leave an empty file
    os.replace(partial, path)
    _sync_folder(path.parent)


def _sync_folder(folder: pathlib.Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_lines(path: pathlib.Path, lines: Sequence[str]) -> None:
    """Appends lines, each with its line end, and returns once they are on disk.

    A line that a crash cut short, which `read_lines` leaves out, is removed first.  In an object store the whole file
    is written anew.
    """
    if there := in_store(path):
        there.write_bytes("".join([*(f"{line}\n" for line in read_lines(path)), *lines]).encode())
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(path, whole)
    with open(path, "a", encoding="utf-8", newline="\n") as file:
        file.write("".join(lines))
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(path.parent)


def read_lines(path: pathlib.Path) -> Iterator[str]:
    """The complete lines of a file, without their line ends; none if there is no file."""
    if path.exists():
        with path.open(encoding="utf-8", newline="\n") as file:  # U+2028 in a text does not end a line
            for line in file:
                if line.endswith("\n"):
                    yield line[:-1]


def remove_folder(path: pathlib.Path) -> None:
    """Deletes a folder with all that is in it, if there is one."""
    if there := in_store(path):
        there.remove()
    else:
        shutil.rmtree(path, ignore_errors=True)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes `plain(value)` atomically, indented for people."""
    write_atomic(path, json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: pathlib.Path) -> Any:
    """Reads a JSON file.

    Raises:
      FileNotFoundError: if there is no such file.
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
