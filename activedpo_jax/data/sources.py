"""Rows of fields from data sources: JSONL and Parquet files, and whatever `datasets` can load."""

import json
import pathlib
from collections.abc import Iterator
from typing import Any, NoReturn

_FILES = (".jsonl", ".parquet")
_OPTIONS = "config.data.train, train_split, heldout and heldout_split"


def read_rows(source: str, split: str, options: str = _OPTIONS) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row of a data set with its location: `file:line` from 1, or a row number from 0.

    Args:
      source: a `.jsonl` or `.parquet` file, or a directory or name for `datasets`.
      split: of a `datasets` directory or name; a file is one split.
      options: the options that name source and split, for error messages.

    Raises:
      ValueError: the source cannot be read, or a line of it is not a JSON object.
    """
    if not source:
        raise ValueError(f"no data set is named; expected a file or a `datasets` name: set {options}")
    path = pathlib.Path(source).expanduser()
    if path.is_file() and path.suffix not in _FILES:
        raise ValueError(f"{source}: expected a .jsonl or .parquet file, or a `datasets` directory or name")
    if path.suffix in _FILES and not path.exists():
        raise ValueError(f"{source}: no such file; check {options}")
    if not path.is_file():
        for i, row in enumerate(_load_dataset(source, path, split, options)):
            yield f"{source} [{split}] row {i}", row
    elif path.suffix == ".jsonl":
        yield from _jsonl_rows(path)
    else:
        for i, row in enumerate(_parquet_rows(path)):
            yield f"{source} row {i}", row


def fail(location: str, problem: str, expected: str, change: str = "correct the record") -> NoReturn:
    """Raises an error about data; all of them have this form."""
    raise ValueError(f"{location}: {problem}; expected {expected}: {change}")


def kind(value: Any) -> str:
    """What a row's value is, in JSON's terms."""
    if value in ("", []):
        return f"an empty {'string' if value == '' else 'list'}"
    return _KINDS.get(type(value), f"a {type(value).__name__}")


_KINDS = {
    type(None): "null",
    str: "a string",
    list: "a list",
    dict: "an object",
    bool: "a boolean",
    int: "a number",
    float: "a number",
}


def _jsonl_rows(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    # Lines end at \n alone: other separators may occur inside a JSON string.
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        location = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            fail(location, f"this is not UTF-8 ({error})", "a JSON object in UTF-8", "save the file in UTF-8")
        except json.JSONDecodeError as error:
            problem = f"this is not JSON ({error.msg}, column {error.colno})"
            fail(location, problem, "one JSON object on the line", "mend or delete the line")
        if not isinstance(row, dict):
            fail(location, f"the line is {kind(row)}", "a JSON object with the fields of a record")
        yield location, row


def _parquet_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        return list(pyarrow.parquet.read_table(path).to_pylist())
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: expected a Parquet file, but {error}: write it anew") from error


def _load_dataset(source: str, path: pathlib.Path, split: str, options: str) -> Any:
    import datasets  # takes a second, and most runs read files

    try:
        if (path / "dataset_dict.json").exists():
            return datasets.load_from_disk(source)[split]
        if (path / "state.json").exists():
            return datasets.load_from_disk(source)
        return datasets.load_dataset(source, split=split)
    except Exception as error:  # of a dozen kinds: from the network, the disk, the name, the split
        raise ValueError(
            f"{source}: `datasets` cannot load split {split!r} ({type(error).__name__}: {error}); expected a "
            ".jsonl or .parquet file, or a directory or name for `datasets` with that split: "
            f"check {options}"
        ) from error
