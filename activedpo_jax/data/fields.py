"""The fields of a record, each checked, with errors that say where it stands and what was expected."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from activedpo_jax.data.sources import fail, kind

Message = Mapping[str, Any]  # at least "role" and "content", both strings
Prompt = str | Sequence[Message]

_LARGEST = float(np.finfo(np.float32).max)


def require(row: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in row:
        fail(where, f"the fields are {', '.join(sorted(row))}", f"`{name}` among them", f"add `{name}`")
    return row[name]


def check_prompt(value: Any, where: str) -> Prompt:
    messages = [] if isinstance(value, str) else check_messages(value, "prompt", where)
    if not (value.strip() if isinstance(value, str) else any(m["content"].strip() for m in messages)):
        fail(where, "the prompt is empty", "some text in it", "write one, or delete the record")
    if messages and messages[-1]["role"] == "assistant":
        fail(where, "the prompt ends in a message of the assistant", "one of the user at its end")
    return messages or value


def check_response(value: Any, name: str, where: str) -> str:
    """The text of a response: a string, or the content of a single message of the assistant."""
    if not isinstance(value, str):
        messages = check_messages(value, name, where)
        roles = [m["role"] for m in messages]
        if roles != ["assistant"]:
            fail(where, f"{name} after the prompt has messages of {roles}", "one message, of the assistant")
        value = messages[0]["content"]
    if not value.strip():
        fail(where, f"{name} is an empty response", "some text in it", "write one, or delete the record")
    return str(value)


def check_messages(value: Any, name: str, where: str) -> list[dict[str, Any]]:
    expected = 'a string, or a list of chat messages {"role": string, "content": string}'
    if not isinstance(value, list) or not value:
        fail(where, f"{name} is {kind(value)}", expected)
    for message in value:
        fields = message if isinstance(message, dict) else {}
        if not isinstance(fields.get("role"), str) or not isinstance(fields.get("content"), str):
            fail(where, f"{name} has the message {str(message)[:80]}", expected)
    return [{k: v for k, v in message.items() if v is not None} for message in value]


def check_number(value: Any, name: str, where: str) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not abs(value) <= _LARGEST:
        fail(where, f"{name} is {value!r}", "a finite number", "correct it, or leave the scores out")
    return float(value)
