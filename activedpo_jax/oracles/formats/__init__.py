"""The files in which a round's pairs go out to people, and in which the answers come back.

A file of answers is a container of records, told by its suffix: `.jsonl`, `.csv`, `.tsv`, or `.json` with one list.
What its records are is told by the first of them: a Label Studio task, an Argilla record, or else a flat row with the
fields of `pairs.jsonl`.
"""

import pathlib
from collections.abc import Callable, Collection, Sequence

from activedpo_jax.data.sources import fail
from activedpo_jax.oracles.formats import argilla, flat, json_list, jsonl, label_studio, spreadsheet
from activedpo_jax.oracles.formats.fields import Record
from activedpo_jax.oracles.labels import Label, Question

FORMATS: tuple[Callable[[pathlib.Path, Sequence[Question]], None], ...] = (
    jsonl.write,
    spreadsheet.write,
    label_studio.write,
    argilla.write,
)
# What `write` makes for tools to import: nobody fills these in.
TASKS = frozenset({"label_studio.json", "label_studio_config.xml", "argilla.json", "argilla_settings.json"})
_CONTAINERS: dict[str, Callable[[pathlib.Path], list[Record]]] = {
    ".jsonl": jsonl.records,
    ".csv": spreadsheet.records,
    ".tsv": spreadsheet.records,
    ".json": json_list.records,
}


def write(folder: pathlib.Path, questions: Sequence[Question]) -> None:
    """Writes `folder/pairs.jsonl`, `pairs.csv`, `label_studio.json`, `argilla.json` and the two tools' settings.

    Each file of pairs holds every question, and none says how the strategy ranked them.  Files of these names that are
    there already are replaced, with what people have filled in.
    """
    for write_format in FORMATS:
        write_format(folder, questions)


def read(path: pathlib.Path, asked: Collection[str] | None = None) -> list[Label]:
    """The answers in one file, in its order; `source` is the file's name.

    A record whose preference is empty or null has no answer yet and gives no label.  Several annotators may answer
    the same pair: each gives a label.

    Args:
      asked: the ids of the pairs that the answers may be about; None: of any.

    Raises:
      ValueError: the file is not there, is empty, cut short, not UTF-8 or of an unknown format, or a record is
        wrong or about another pair; names the file with the line or the record's number from 1, and what to change.
    """
    if path.suffix not in _CONTAINERS:
        fail(
            str(path), f"the suffix is {path.suffix!r}", f"one of {', '.join(_CONTAINERS)}", "rename or export the file"
        )
    if not path.is_file():
        fail(str(path), "no such file", "a file of answers", "check the name")
    if not path.read_bytes().strip():
        fail(str(path), "the file is empty", "answers", "save or export it again")
    records = _CONTAINERS[path.suffix](path)
    if not records:
        return []
    _, first = records[0]
    kind = next((tool for tool in (label_studio, argilla) if tool.recognises(first)), flat)
    labels = kind.labels(records, path.name)
    unknown = set() if asked is None else {label.pair_id for label in labels}.difference(asked)
    for location, record in records:
        if (name := kind.pair_id(record)) in unknown:
            fail(
                location,
                f"there is no pair {name!r}",
                "a pair_id as in pairs.jsonl, to the character",
                "copy the id from there; a spreadsheet program may have made a number or a date of it",
            )
    return labels
