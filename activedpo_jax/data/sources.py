"""Rows of fields from data sources: JSONL and Parquet files, and whatever `datasets` can load."""

import contextlib
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, Protocol

import numpy as np

_FILES = (".jsonl", ".parquet")
_SCANNED_BYTES = 1 << 24
_PARQUET_ROWS = _DATASET_ROWS = 1000  # that are in memory at a time
_OPTIONS = "config.data.train, train_split, heldout and heldout_split"


class Rows(Protocol):
    """The rows of a data set, which stay where they are until they are read."""

    def __len__(self) -> int: ...

    def location(self, row: int) -> str:
        """Where a row is, for error messages: `file:line` from 1, or a row number from 0."""
        ...

    def read(self, rows: Sequence[int] | np.ndarray) -> Iterator[dict[str, Any]]:
        """The fields of these rows, which ascend.

        Raises:
          ValueError: a row cannot be read, or is not a JSON object.
        """
        ...


def open_rows(source: str, split: str, options: str = _OPTIONS) -> Rows:
    """The rows of a data set.

    Args:
      source: a `.jsonl` or `.parquet` file, or a directory or name for `datasets`.
      split: of a `datasets` directory or name; a file is one split.
      options: the options that name source and split, for error messages.

    Raises:
      ValueError: the source cannot be read.
    """
    if not source:
        raise ValueError(f"no data set is named; expected a file or a `datasets` name: set {options}")
    path = pathlib.Path(source).expanduser()
    if path.is_file() and path.suffix not in _FILES:
        raise ValueError(f"{source}: expected a .jsonl or .parquet file, or a `datasets` directory or name")
    if path.suffix in _FILES and not path.exists():
        raise ValueError(f"{source}: no such file; check {options}")
    if not path.is_file():
        return _DatasetRows(_load_dataset(source, path, split, options), f"{source} [{split}]")
    return _JsonlRows(path) if path.suffix == ".jsonl" else _ParquetRows(path, source)


def read_rows(source: str, split: str, options: str = _OPTIONS) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row of a data set with its location; arguments and errors as in `open_rows`."""
    rows = open_rows(source, split, options)
    for i, row in enumerate(rows.read(range(len(rows)))):
        yield rows.location(i), row


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


class _JsonlRows:
    """The lines of a file that are not blank.  They end at \\n alone: other separators may occur inside a string."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path, self._version = path, _version(path)
        self._starts, self._lines = _scan(path)

    def __len__(self) -> int:
        return len(self._starts)

    def location(self, row: int) -> str:
        return f"{self._path}:{self._lines[row] + 1}"

    def read(self, rows: Sequence[int] | np.ndarray) -> Iterator[dict[str, Any]]:
        if _version(self._path) != self._version:
            raise ValueError(f"{self._path}: has changed while it was read; expected it to stay as it is: start again")
        with open(self._path, "rb") as file:
            for row in rows:
                start = int(self._starts[row])
                if file.tell() != start:
                    file.seek(start)
                yield self._parsed(row, file.readline().removesuffix(b"\n"))

    def _parsed(self, row: int, line: bytes) -> dict[str, Any]:
        try:
            fields = json.loads(line.decode("utf-8-sig" if self._lines[row] == 0 else "utf-8"))
        except UnicodeDecodeError as error:
            problem = f"this is not UTF-8 ({error})"
            fail(self.location(row), problem, "a JSON object in UTF-8", "save the file in UTF-8")
        except json.JSONDecodeError as error:
            problem = f"this is not JSON ({error.msg}, column {error.colno})"
            fail(self.location(row), problem, "one JSON object on the line", "mend or delete the line")
        if not isinstance(fields, dict):
            fail(self.location(row), f"the line is {kind(fields)}", "a JSON object with the fields of a record")
        return fields


def _version(path: pathlib.Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _scan(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Of every line that is not blank where it starts in the file, in bytes, and its number from 0: [n] int64 each."""
    ends, begun = [np.zeros(0, np.int64)], 0
    blank = []  # numbers of lines
    with open(path, "rb") as file:
        while block := file.read(_SCANNED_BYTES):
            ends.append(begun + np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")))
            begun += len(block)
        starts = np.concatenate([[0], np.concatenate(ends) + 1])
        lengths = np.diff(np.append(starts, begun + 1)) - 1
        # Few lines begin like a blank one.
        for number in _like_blank(path, starts, lengths):
            file.seek(starts[number])
            if not file.readline().strip():
                blank.append(number)
    lines = np.delete(np.arange(len(starts)), blank)
    return starts[lines], lines


def _like_blank(path: pathlib.Path, starts: np.ndarray, lengths: np.ndarray) -> list[int]:
    """The numbers of the lines that are empty or begin with white space."""
    empty = lengths <= 0
    if empty.all():
        return list(range(len(starts)))
    content = np.memmap(path, np.uint8, "r")
    first = content[np.where(empty, 0, starts)]
    return np.flatnonzero(empty | np.isin(first, np.frombuffer(b" \t\n\r\x0b\x0c", np.uint8))).tolist()


class _ParquetRows:
    def __init__(self, path: pathlib.Path, name: str) -> None:
        self._path, self._name = path, name
        with self._complaint():
            self._count = int(self._open().metadata.num_rows)

    def __len__(self) -> int:
        return self._count

    def location(self, row: int) -> str:
        return f"{self._name} row {row}"

    def read(self, rows: Sequence[int] | np.ndarray) -> Iterator[dict[str, Any]]:
        wanted = np.asarray(rows, np.int64)
        with self._complaint():
            file, end = self._open(), 0
            for group in range(file.num_row_groups):
                start, end = end, end + file.metadata.row_group(group).num_rows
                if np.searchsorted(wanted, start) == np.searchsorted(wanted, end):
                    continue
                for batch in file.iter_batches(_PARQUET_ROWS, row_groups=[group]):
                    first, last = np.searchsorted(wanted, [start, start + len(batch)])
                    if first < last:
                        yield from batch.take(wanted[first:last] - start).to_pylist()
                    start += len(batch)

    def _open(self) -> Any:
        import pyarrow.parquet  # type: ignore[import-untyped]

        return pyarrow.parquet.ParquetFile(self._path, memory_map=True)

    @contextlib.contextmanager
    def _complaint(self) -> Iterator[None]:
        import pyarrow

        try:
            yield
        except pyarrow.ArrowException as error:
            raise ValueError(f"{self._path}: expected a Parquet file, but {error}: write it anew") from error


class _DatasetRows:
    def __init__(self, data: Any, name: str) -> None:
        self._data, self._name = data, name

    def __len__(self) -> int:
        return len(self._data)

    def location(self, row: int) -> str:
        return f"{self._name} row {row}"

    def read(self, rows: Sequence[int] | np.ndarray) -> Iterator[dict[str, Any]]:
        for first in range(0, len(rows), _DATASET_ROWS):
            yield from self._data.select([int(row) for row in rows[first : first + _DATASET_ROWS]])


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
