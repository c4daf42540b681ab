"""Pairs as Label Studio's tasks, and answers as it exports them: JSON, JSON-MIN or CSV.

The formats are those of https://labelstud.io/guide/export and https://labelstud.io/guide/task_format.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

from activedpo_jax import files
from activedpo_jax.data.sources import fail, kind
from activedpo_jax.oracles.formats import flat
from activedpo_jax.oracles.formats.fields import (
    Record,
    prompt_text,
    read_annotator,
    read_objects,
    read_pair_id,
    read_preference,
    read_time,
)
from activedpo_jax.oracles.labels import Label, Preference, Question

# An alias is what the export holds.
_CONFIG = """\
<View>
  <Header value="Prompt"/>
  <Text name="prompt" value="$prompt"/>
  <View style="display: flex; gap: 2em">
    <View style="flex: 1 1 0"><Header value="First response"/><Text name="first" value="$first"/></View>
    <View style="flex: 1 1 0"><Header value="Second response"/><Text name="second" value="$second"/></View>
  </View>
  <Header value="Which response is better?"/>
  <Choices name="preference" toName="prompt" choice="single-radio" showInline="true" required="true">
    <Choice value="The first" alias="first" hotkey="1"/>
    <Choice value="The second" alias="second" hotkey="2"/>
    <Choice value="Equally good" alias="tie" hotkey="3"/>
    <Choice value="Both bad" alias="both_bad" hotkey="4"/>
    <Choice value="I cannot say" alias="skip" hotkey="5"/>
  </Choices>
</View>
"""


def write(folder: pathlib.Path, questions: Sequence[Question]) -> None:
    """Writes `folder/label_studio.json`, tasks to import, and `label_studio_config.xml`, the labelling interface.

    A task is `{"data": {"pair_id", "round", "prompt", "first", "second"}}`, with chat messages as text.
    """
    tasks = [
        {
            "data": {
                "pair_id": question.pair_id,
                "round": question.round,
                "prompt": prompt_text(question.prompt),
                "first": question.first,
                "second": question.second,
            }
        }
        for question in questions
    ]
    files.write_json(folder / "label_studio.json", tasks)
    files.write_atomic(folder / "label_studio_config.xml", _CONFIG)


def recognises(record: dict[str, Any]) -> bool:
    """Whether this is a task, or a row of JSON-MIN or of the exported CSV."""
    return isinstance(record.get("data"), dict) or "annotation_id" in record


def pair_id(record: dict[str, Any]) -> Any:
    """What stands where a task, or a flat row, has the id of its pair."""
    return flat.pair_id(record["data"] if isinstance(record.get("data"), dict) else record)


def labels(records: Sequence[Record], source: str) -> list[Label]:
    """The answers in an export.

    Of a task, every annotation is one, by its `completed_by`; a cancelled one is `skip`.  The preference is the choice
    of a control named `preference`, or the side selected with a Pairwise control of any name.  Drafts and predictions
    are no answers.  JSON-MIN and CSV have one annotation a row, and leave cancelled ones out: their pairs then count as
    not answered.

    Raises:
      ValueError: a task has no pair_id; an annotation chooses nothing, or different things.
    """
    found: list[Label] = []
    for where, record in records:
        if isinstance(record.get("data"), dict):
            found += _task_labels(where, record, source)
        else:
            found += flat.labels([(where, _flat_row(record))], source)
    return found


def _task_labels(where: str, task: dict[str, Any], source: str) -> list[Label]:
    name = read_pair_id(where, task["data"])
    found = []
    for number, annotation in enumerate(read_objects(where, "annotations", task.get("annotations")), start=1):
        place = f"{where}, annotation {number}"
        preference = "skip" if annotation.get("was_cancelled") else _chosen(place, annotation)
        if preference is not None:
            author = annotation.get("completed_by")
            if isinstance(author, dict):
                author = author.get("email") or author.get("id")
            time = read_time(place, annotation.get("updated_at") or annotation.get("created_at"))
            found.append(Label(name, preference, source, read_annotator(place, author), time=time))
    return found


def _chosen(where: str, annotation: dict[str, Any]) -> Preference | None:
    """The preference in an annotation; None: it is empty."""
    results = read_objects(where, "result", annotation.get("result"))
    chosen: list[Any] = []
    for result in results:
        if result.get("from_name") == "preference" or result.get("type") == "pairwise":
            chosen += _values(where, result.get("value"))
    if results and not chosen:
        names = ", ".join(sorted({str(result.get("from_name")) for result in results}))
        expected = "the choice of a control named preference, or a Pairwise control"
        fail(where, f"the controls are {names}", expected, "use label_studio_config.xml, or rename the control")
    preferences = {read_preference(where, value) for value in chosen}
    if len(preferences) > 1:
        fail(where, f"these are chosen: {', '.join(map(repr, chosen))}", "one choice", "correct the annotation")
    return preferences.pop() if preferences else None


def _values(where: str, value: Any) -> list[Any]:
    """What a control's value says is chosen: `{"choices": [...]}` or `{"selected": "left"}`."""
    if isinstance(value, dict) and isinstance(value.get("choices"), list):
        return list(value["choices"])
    if isinstance(value, dict) and "selected" in value:
        return [value["selected"]]
    expected = '{"choices": ["first"]} or {"selected": "left"}'
    got = repr(value) if isinstance(value, dict) else kind(value)
    fail(where, f"the value of the control is {got}", expected, "make the control a Choices or a Pairwise")


def _flat_row(record: dict[str, Any]) -> dict[str, Any]:
    """A row of JSON-MIN with the names of `pairs.jsonl`; a task that nobody has annotated has no preference."""
    row = {**record, "time": record.get("updated_at") or record.get("created_at")}
    if not record["annotation_id"]:
        row.setdefault("preference", None)
    match record.get("preference"):
        case [{"selected": side}]:
            row["preference"] = side
    return row
