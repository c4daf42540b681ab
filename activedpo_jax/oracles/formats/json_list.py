"""JSON files with one list of objects, as annotation tools export them."""

import json
import pathlib

from activedpo_jax.data.sources import fail, kind
from activedpo_jax.oracles.formats.fields import Record


def records(path: pathlib.Path) -> list[Record]:
    """The objects of the list, numbered from 1.

    Raises:
      ValueError: the file is not UTF-8, not JSON, or not a list of objects.
    """
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        fail(str(path), f"this is not UTF-8 ({error})", "JSON in UTF-8", "save or export it in UTF-8")
    except json.JSONDecodeError as error:
        problem = f"this is not JSON ({error.msg}, column {error.colno})"
        fail(f"{path}:{error.lineno}", problem, "one JSON list", "export it again: it may be cut short")
    if not isinstance(content, list):
        change = "export all records together, or put the object in brackets"
        fail(str(path), f"the file is {kind(content)}", "a JSON list of objects", change)
    for number, record in enumerate(content, start=1):
        if not isinstance(record, dict):
            fail(f"{path}: record {number}", f"this is {kind(record)}", "a JSON object", "correct or delete it")
    return [(f"{path}: record {number}", record) for number, record in enumerate(content, start=1)]
