"""Pairs and answers as JSONL: one JSON object a line."""

import json
import pathlib
from collections.abc import Sequence

from activedpo_jax import files
from activedpo_jax.data.sources import read_rows
from activedpo_jax.oracles.formats.fields import Record
from activedpo_jax.oracles.labels import Question

# JSON lets these stand in a string as they are, but many editors and programs end a line at them.
_LINE_ENDS = {ord(mark): f"\\u{ord(mark):04x}" for mark in "\x85\u2028\u2029"}


def write(folder: pathlib.Path, questions: Sequence[Question]) -> None:
    """Writes `folder/pairs.jsonl`: `pair_id`, `round`, `prompt`, `first`, `second`, all exact, and to be filled in
    `preference`, `annotator` and `weight`.  A prompt of chat messages is a list of objects.
    """
    lines = []
    for question in questions:
        row = {
            "pair_id": question.pair_id,
            "round": question.round,
            "prompt": files.plain(question.prompt),
            "first": question.first,
            "second": question.second,
            "preference": "",
            "annotator": "",
            "weight": None,
        }
        lines.append(json.dumps(row, ensure_ascii=False).translate(_LINE_ENDS) + "\n")
    files.write_atomic(folder / "pairs.jsonl", "".join(lines))


def records(path: pathlib.Path) -> list[Record]:
    """The objects of a JSONL file in UTF-8; empty lines are skipped.

    Raises:
      ValueError: a line is not a JSON object, or not UTF-8; names file and line.
    """
    return list(read_rows(str(path), split=""))
