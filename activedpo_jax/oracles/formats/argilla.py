"""Pairs as Argilla's records, and answers as Argilla 2 exports them.

The formats are those of `rg.Settings.to_json`, `dataset.records.to_json` and `dataset.records.to_list(flatten=True)` in
https://docs.argilla.io/latest/how_to_guides/import_export.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

from activedpo_jax import files
from activedpo_jax.data.sources import fail, kind
from activedpo_jax.oracles.formats.fields import (
    Record,
    prompt_text,
    read_annotator,
    read_objects,
    read_pair_id,
    read_preference,
)
from activedpo_jax.oracles.labels import Label, Question

_CHOICES = {
    "first": "The first",
    "second": "The second",
    "tie": "Equally good",
    "both_bad": "Both bad",
    "skip": "I cannot say",
}
_STATUSES = ("submitted", "draft", "discarded", None)
_FLAT = ".responses"


def write(folder: pathlib.Path, questions: Sequence[Question]) -> None:
    """Writes `folder/argilla.json`, records, and `argilla_settings.json`; Argilla reads each with a `from_json`.

    A record is `{"id", "fields": {"prompt", "first", "second"}, "metadata": {"round"}, "responses": {}}`: its id is the
    pair's, chat messages are text, and the question is named `preference`.
    """
    records = [
        {
            "id": question.pair_id,
            "fields": {"prompt": prompt_text(question.prompt), "first": question.first, "second": question.second},
            "metadata": {"round": question.round},
            "responses": {},
        }
        for question in questions
    ]
    fields = [("prompt", "Prompt"), ("first", "First response"), ("second", "Second response")]
    options = [{"value": value, "text": text} for value, text in _CHOICES.items()]
    settings = {
        "guidelines": "Read the prompt, then both responses, and say which response is better.  Submit every record: "
        "where you cannot say, choose that rather than discard it.",
        "fields": [
            {"name": name, "title": title, "required": True, "settings": {"type": "text", "use_markdown": False}}
            for name, title in fields
        ],
        "questions": [
            {
                "name": "preference",
                "title": "Which response is better?",
                "required": True,
                "settings": {"type": "label_selection", "options": options, "visible_options": len(options)},
            }
        ],
        "metadata": [
            {
                "name": "round",
                "title": "Round",
                "visible_for_annotators": False,
                "settings": {"type": "integer"},
            }
        ],
        "vectors": [],
        "allow_extra_metadata": False,
        "distribution": {"strategy": "overlap", "min_submitted": 1},
    }
    files.write_json(folder / "argilla.json", records)
    files.write_json(folder / "argilla_settings.json", settings)


def recognises(record: dict[str, Any]) -> bool:
    """Whether this is a record, nested or flat."""
    return "_server_id" in record or ("fields" in record and "responses" in record)


def pair_id(record: dict[str, Any]) -> Any:
    """What stands where a record has the id of its pair."""
    return record.get("id")


def labels(records: Sequence[Record], source: str) -> list[Label]:
    """The answers in an export: every response to the question `preference`, by its `user_id`.

    A discarded response is `skip`, a draft is no answer.  `records.to_json` leaves responses' status out: all of them
    count once the record is completed, that is, submitted as often as the settings ask; before that, none.
    `records.to_list(flatten=True)`, dumped as JSON, has it.

    Raises:
      ValueError: a record has no id, no response of the file is to `preference`, or one is wrong.
    """
    found: list[Label] = []
    names: set[str] = set()
    for where, record in records:
        name = read_pair_id(where, record, "id")
        responses = _responses(where, record)
        names |= responses.keys()
        for number, response in enumerate(responses.get("preference", []), start=1):
            place = f"{where}, response {number}"
            status = response.get("status")
            if status not in _STATUSES:
                fail(place, f"status is {status!r}", "submitted, draft or discarded", "export the records again")
            if status == "draft" or (status is None and record.get("status") == "pending"):
                continue
            preference = "skip" if status == "discarded" else read_preference(place, response.get("value"))
            if preference is not None:
                found.append(Label(name, preference, source, read_annotator(place, response.get("user_id"))))
    if names and "preference" not in names:
        change = "use argilla_settings.json, or rename the question in the export"
        fail(records[0][0], f"the questions are {', '.join(sorted(names))}", "one named preference", change)
    return found


def _responses(where: str, record: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """`{question: [{"value", "user_id", "status"?}, ...]}` of a record, nested or flat."""
    if "fields" in record:
        nested = record.get("responses") or {}
        if not isinstance(nested, dict):
            fail(where, f"responses is {kind(nested)}", "an object", "export the records again")
        return {name: read_objects(where, f"responses.{name}", value) for name, value in nested.items()}
    flat: dict[str, list[dict[str, Any]]] = {}
    for column in record:
        if column.endswith(_FLAT):
            parts = [record.get(column + part) or [] for part in ("", ".users", ".status")]
            if not all(isinstance(part, list) for part in parts) or len({len(part) for part in parts}) > 1:
                expected = f"lists of one length in {column}, {column}.users and {column}.status"
                fail(where, f"the responses are {parts}", expected, "export the records again")
            keys = ("value", "user_id", "status")
            flat[column.removesuffix(_FLAT)] = [dict(zip(keys, part, strict=True)) for part in zip(*parts, strict=True)]
    return flat
