"""Pairs and answers as CSV that spreadsheet programs open and save.

Such programs take a cell that looks like a number, a date or a formula for one, quoted or not.  An apostrophe in front
keeps it text, and may be shown.  So ids always get one, which reading drops where it is still there; and so do prompts
and responses that could be formulas: a model could be led to write one that runs on the annotator's machine.
"""

import contextlib
import csv
import io
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from activedpo_jax import files
from activedpo_jax.data.sources import fail
from activedpo_jax.oracles.formats.fields import Record, prompt_text
from activedpo_jax.oracles.labels import Question

_COLUMNS = ("pair_id", "round", "prompt", "first", "second", "preference", "annotator", "weight")
_READ = ("pair_id", "preference", "annotator", "weight", "confidence", "time")
_FORMULA = ("=", "+", "-", "@", "\0", "＝", "＋", "－", "＠")  # full-width forms: in some locales
_MAX_CELL = 32_000  # UTF-16 units; Excel spills what is over 32,767 into the next row


def write(folder: pathlib.Path, questions: Sequence[Question]) -> None:
    """Writes `folder/pairs.csv`: UTF-8 with a byte-order mark, every cell quoted, lines that end in CRLF.

    The columns are those of `pairs.jsonl`, with chat messages as text.  A text too long for a cell is cut, and says so.
    """
    table = io.StringIO(newline="")
    writer = csv.writer(table, quoting=csv.QUOTE_ALL, lineterminator="\r\n")
    writer.writerow(_COLUMNS)
    for question in questions:
        texts = (prompt_text(question.prompt), question.first, question.second)
        writer.writerow(["'" + question.pair_id, question.round, *map(_cell, texts), "", "", ""])
    files.write_atomic(folder / "pairs.csv", "\ufeff" + table.getvalue())


def records(path: pathlib.Path) -> list[Record]:
    """The rows of a CSV file as objects of strings; empty rows are skipped.

    Cells are separated by commas, semicolons or tabs, which the line of names tells; columns stand in any order.  Rows
    may lack the last cells, which are then empty: spreadsheet programs leave them out.

    Raises:
      ValueError: the file is not UTF-8 or not CSV, lacks the columns pair_id or preference, has a column twice, or
        has a row with too many cells; names file and line.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        problem = f"this is not UTF-8 ({error.reason} at byte {error.start})"
        fail(str(path), problem, "CSV in UTF-8", "save it as `CSV UTF-8`, or export it with the character set UTF-8")
    reader, names = _open(path, text)
    for name in _READ:
        if names.count(name) > 1:
            fail(f"{path}:1", f"there are {names.count(name)} columns {name}", "one", "delete or rename the others")
    found = []
    for where, cells in _rows(path, reader):
        if not any(cells):
            continue
        if any(cells[len(names) :]):
            problem = f"the row has {len(cells)} cells"
            fail(where, problem, f"{len(names)}, as many as names", "put cells that hold separators in quotes")
        row: dict[str, Any] = dict.fromkeys(names, "") | dict(zip(names, cells, strict=False))
        row["pair_id"] = row["pair_id"].removeprefix("'")
        found.append((where, row))
    return found


def _open(path: pathlib.Path, text: str) -> tuple[Any, list[str]]:
    """A CSV reader past the line of names, and the names."""
    for delimiter in ",;\t":
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        with contextlib.suppress(csv.Error):  # with another delimiter, quotes may stand in the wrong place
            names = [name.strip() for name in next(reader, [])]
            if "pair_id" in names and "preference" in names:
                return reader, names
    line = next(iter(text.splitlines()), "")
    expected = "the names of the columns, with pair_id and preference, separated by commas, semicolons or tabs"
    fail(f"{path}:1", f"the line is {line[:200]!r}", expected, "copy the line from pairs.csv")


def _rows(path: pathlib.Path, reader: Any) -> Iterator[tuple[str, list[str]]]:
    """Rows with the line that each begins on."""
    start = reader.line_num + 1
    try:
        for cells in reader:
            yield f"{path}:{start}", cells
            start = reader.line_num + 1
    except csv.Error as error:
        change = "save it again: it may be cut short, or lack a quote; columns other than pair_id and preference may go"
        fail(f"{path}:{start}", f"this is not CSV ({error})", "a row of cells", change)


def _cell(text: str) -> str:
    units = text.encode("utf-16-le")
    if len(units) > 2 * _MAX_CELL:
        text = units[: 2 * _MAX_CELL].decode("utf-16-le", "ignore")
        text += "\n[cut here, being too long for a cell: pairs.jsonl has the whole text]"
    return "'" + text if text.lstrip().startswith(_FORMULA) else text
