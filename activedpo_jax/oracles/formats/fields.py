"""What the fields of an answer may hold, whatever the file."""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

from activedpo_jax import files
from activedpo_jax.data.sources import fail, kind
from activedpo_jax.oracles.labels import PREFERENCES, Preference

Record = tuple[str, dict[str, Any]]  # where it stands, for error messages, and its fields

MAX_WEIGHT = 1e6
_EXPECTED = "first (or 1, a, left), second (or 2, b, right), tie, both_bad, skip, or nothing where there is no answer"
_SPELLINGS: dict[str, Preference] = {
    **{name: name for name in PREFERENCES},
    **dict.fromkeys(("1", "a", "left"), "first"),
    **dict.fromkeys(("2", "b", "right"), "second"),
}


def read_preference(where: str, value: Any) -> Preference | None:
    """A preference in any case, with or without space around it; None: there is no answer yet.

    `1`, `a` and `left` are `first`; `2`, `b` and `right` are `second`.

    Raises:
      ValueError: it is anything else.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        fail(where, f"preference is {kind(value)}", _EXPECTED)
    text = str(value).strip().lower()
    if not text:
        return None
    if text not in _SPELLINGS:
        fail(where, f"preference is {value!r}", _EXPECTED)
    return _SPELLINGS[text]


def read_pair_id(where: str, fields: Mapping[str, Any], name: str = "pair_id") -> str:
    """The id of the pair, to the character.

    Raises:
      ValueError: it is missing, empty or not a string.
    """
    value = fields.get(name)
    if not isinstance(value, str) or not value:
        problem = f"{name} is {kind(value)}" if name in fields else f"there is no {name}"
        fail(where, problem, "the pair's id, a non-empty string as in pairs.jsonl", "copy it from there")
    return value


def read_weight(where: str, fields: Mapping[str, Any]) -> float:
    """`weight`, or `confidence` where that is the name: a number above 0 and at most 1e6; 1 if neither is filled in.

    Raises:
      ValueError: it is anything else, or both are filled in.
    """
    given = {name: fields[name] for name in ("weight", "confidence") if not _is_blank(fields.get(name))}
    if len(given) == 2:
        fail(where, "both weight and confidence are filled in", "one of them", "empty the other")
    for name, value in given.items():
        number = _number(value)
        if number is None or not 0 < number <= MAX_WEIGHT:  # which NaN is not either
            fail(where, f"{name} is {value!r}", f"a number such as 0.5, above 0 and at most {MAX_WEIGHT:.0f}")
        return float(number)
    return 1.0


def read_annotator(where: str, value: Any) -> str:
    """The annotator's name, address or number as text; empty if there is none.

    Raises:
      ValueError: it is anything else.
    """
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int):
        fail(where, f"annotator is {kind(value)}", "a name")
    return str(value)


def read_time(where: str, value: Any) -> str:
    """An ISO 8601 time in UTC; one without an offset is UTC already; empty if there is none.

    Raises:
      ValueError: it is anything else.
    """
    if _is_blank(value):
        return ""
    try:
        time = datetime.datetime.fromisoformat(value)
        return (time if time.tzinfo else time.replace(tzinfo=datetime.UTC)).astimezone(datetime.UTC).isoformat()
    except (TypeError, ValueError, OverflowError):
        fail(where, f"time is {value!r}", "a time such as 2026-01-31T12:00:00Z")


def read_objects(where: str, name: str, value: Any) -> list[dict[str, Any]]:
    """A list of JSON objects; null is an empty list.

    Raises:
      ValueError: it is anything else.
    """
    if value is None:
        return []
    if not isinstance(value, list):
        fail(where, f"{name} is {kind(value)}", "a list of objects", "export the file again")
    for item in value:
        if not isinstance(item, dict):
            fail(where, f"{name} holds {kind(item)}", "a list of objects", "export the file again")
    return value


def prompt_text(prompt: str | Sequence[Any]) -> str:
    """A prompt as people read it: text as it is; of chat messages a block `role: content` each, a blank line between.

    Whatever else a message has, such as tool calls, follows its content on lines `name: value`.
    """
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(_message_text(message) for message in prompt)


def _message_text(message: Any) -> str:
    if not isinstance(message, Mapping):
        return _value_text(message)
    shown = [(message.get("role", ""), message.get("content"))]
    shown += [(name, value) for name, value in message.items() if name not in ("role", "content") and value]
    return "\n".join(f"{name}: {_value_text(value)}" for name, value in shown)


def _value_text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(files.plain(value), ensure_ascii=False)


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None
