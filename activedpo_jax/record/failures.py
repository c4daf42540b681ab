"""Runs that failed, in a command that goes on with the others: `failed.json` in the run's folder.

{"error": <one line>, "round": <that it failed in>, "traceback": <for those who look for a defect>}
"""

import pathlib
import traceback
from typing import NamedTuple

from activedpo_jax.files import read_json, remove_folder, write_json
from activedpo_jax.remote import in_store


class Failure(NamedTuple):
    error: str  # one line
    round: int  # that it failed in, from 1; 0: before any


def write_failure(folder: pathlib.Path, line: str, error: Exception) -> Failure:
    """Records that the run in `folder` ended with `error`, in a line."""
    failure = Failure(" ".join(line.split()), _round_under_way(folder))
    said = "".join(traceback.format_exception(error))
    write_json(folder / _NAME, failure._asdict() | {"traceback": said})
    return failure


def read_failure(folder: pathlib.Path) -> Failure | None:
    """How the run failed; None: it did not.

    Raises:
      ValueError: the file is not what `write_failure` writes.
    """
    path = folder / _NAME
    if not path.exists():
        return None
    found = read_json(path)
    try:
        return Failure(found["error"], found["round"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: not the record of a failure; restore the file, or remove it") from error


def forget_failure(folder: pathlib.Path) -> None:
    """Before the run is tried again."""
    path = folder / _NAME
    if in_store(path):
        remove_folder(path)
    else:
        path.unlink(missing_ok=True)


def _round_under_way(folder: pathlib.Path) -> int:
    """The one after the last that is in `summary.json`."""
    path = folder / "summary.json"
    return len(read_json(path)["rounds"]) if path.exists() else 0


_NAME = "failed.json"
