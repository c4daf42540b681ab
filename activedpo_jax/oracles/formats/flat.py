"""Flat rows with the fields of `pairs.jsonl`, filled in."""

from collections.abc import Mapping, Sequence
from typing import Any

from activedpo_jax.data.sources import fail
from activedpo_jax.oracles.formats.fields import (
    Record,
    read_annotator,
    read_pair_id,
    read_preference,
    read_time,
    read_weight,
)
from activedpo_jax.oracles.labels import Label


def pair_id(row: Mapping[str, Any]) -> Any:
    """What stands where a row has the id of its pair."""
    return row.get("pair_id")


def labels(records: Sequence[Record], source: str) -> list[Label]:
    """The answers of rows `{"pair_id", "preference", "annotator"?, "weight"? or "confidence"?, "time"?, ...}`.

    Raises:
      ValueError: a row has no pair_id or no preference, even an empty one, or one of these fields is wrong.
    """
    found = []
    for where, row in records:
        name = read_pair_id(where, row)
        if "preference" not in row:
            fail(where, "there is no preference", "it, empty where there is no answer", "add it, or correct its name")
        preference = read_preference(where, row["preference"])
        if preference is not None:
            annotator = read_annotator(where, row.get("annotator"))
            weight, time = read_weight(where, row), read_time(where, row.get("time"))
            found.append(Label(name, preference, source, annotator, weight, time))
    return found
