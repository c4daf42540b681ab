"""The fields of a record, each checked; errors say where the record is and what was expected."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from activedpo_jax.data.sources import fail, kind

Message = Mapping[str, Any]  # at least "role" and "content", both strings
Prompt = str | Sequence[Message]

_LARGEST = float(np.finfo(np.float32).max)


# Columns of some data sets that belong to the prompt.  They are not read, so a value in one is an error: the model
# would learn from another text.
_CHANGES_THE_MEANING = ("system", "history", "image", "images", "audio", "video", "videos")


@dataclasses.dataclass(frozen=True)
class Extras:
    """What a record has besides its texts, for the chat template (as TRL passes it) and for the tokens."""

    tools: Sequence[Any] | None = None
    template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # the column `chat_template_kwargs`
    messages: tuple[Mapping[str, Any], ...] = ()  # per response: its message's fields besides role and content
    cut: tuple[bool, ...] = ()  # per response: whether it was cut short, and so has no end

    def message(self, index: int) -> Mapping[str, Any]:
        return self.messages[index] if self.messages else {}

    def is_cut(self, index: int) -> bool:
        return bool(self.cut) and self.cut[index]


def read_extras(row: Mapping[str, Any], responses: Sequence[Any], location: str) -> Extras:
    """The extras of a row with these responses, which are as in the data: strings, or lists of one message."""
    tools, kwargs = row.get("tools") or None, row.get("chat_template_kwargs") or {}
    if tools is not None and not isinstance(tools, list):
        fail(location, f"tools is {kind(tools)}", "a list of the tools' descriptions, as chat templates take it")
    if not isinstance(kwargs, dict):
        fail(location, f"chat_template_kwargs is {kind(kwargs)}", "an object of options for the chat template")
    messages = tuple(
        {k: v for k, v in r[0].items() if k not in ("role", "content") and v is not None} if isinstance(r, list) else {}
        for r in responses
    )
    for value in (tools, kwargs, *messages):
        check_encodable(value, "tools, chat_template_kwargs or a message", location)
    cut: tuple[bool, ...] = ()
    if "ended" in row:
        ended = row["ended"]
        if not isinstance(ended, list) or len(ended) != len(responses) or not all(type(e) is bool for e in ended):
            fail(location, f"ended is {str(ended)[:80]}", f"a list of {len(responses)} booleans, one for each response")
        cut = tuple(not e for e in ended)
    return Extras(tools, kwargs, messages if any(messages) else (), cut if any(cut) else ())


def refuse_unread(row: Mapping[str, Any], location: str) -> None:
    """Refuses a row with a column that changes the meaning of the prompt but is not read."""
    for name in _CHANGES_THE_MEANING:
        if row.get(name) not in (None, "", [], {}):
            problem = f"there is a column `{name}`, which is not read and would change what the prompt means"
            fail(location, problem, "the whole prompt in `prompt`", "write it into the prompt, or remove the column")


def check_encodable(value: Any, name: str, location: str) -> None:
    """Refuses strings that are not Unicode text, such as half of a surrogate pair, anywhere in a value."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            problem = (
                f"{name} has the lone surrogate {value[error.start]!r} at character {error.start}, which is no text"
            )
            fail(location, problem, "Unicode text", "write the whole character, or remove the half")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            check_encodable(key, name, location)
            check_encodable(item, name, location)
    elif isinstance(value, list | tuple):
        for item in value:
            check_encodable(item, name, location)


def require(row: Mapping[str, Any], name: str, location: str) -> Any:
    if name not in row:
        fail(location, f"the fields are {', '.join(sorted(row))}", f"`{name}` among them", f"add `{name}`")
    return row[name]


def check_prompt(value: Any, location: str) -> Prompt:
    check_encodable(value, "prompt", location)
    messages = [] if isinstance(value, str) else check_messages(value, "prompt", location)
    if not (value.strip() if isinstance(value, str) else any(m["content"].strip() for m in messages)):
        fail(location, "the prompt is empty", "some text in it", "write one, or delete the record")
    if messages and messages[-1]["role"] == "assistant":
        fail(location, "the prompt ends in a message of the assistant", "one of the user at its end")
    return messages or value


def check_response(value: Any, name: str, location: str) -> str:
    """The text of a response: a string, or the content of a single message of the assistant."""
    check_encodable(value, name, location)
    if not isinstance(value, str):
        messages = check_messages(value, name, location)
        roles = [m["role"] for m in messages]
        if roles != ["assistant"]:
            fail(location, f"{name} after the prompt has messages of {roles}", "one message, of the assistant")
        value = messages[0]["content"]
    if not value.strip():
        fail(location, f"{name} is an empty response", "some text in it", "write one, or delete the record")
    return str(value)


def check_messages(value: Any, name: str, location: str) -> list[dict[str, Any]]:
    expected = 'a string, or a list of chat messages {"role": string, "content": string}'
    if not isinstance(value, list) or not value:
        fail(location, f"{name} is {kind(value)}", expected)
    for message in value:
        fields = message if isinstance(message, dict) else {}
        if not isinstance(fields.get("role"), str) or not isinstance(fields.get("content"), str):
            fail(location, f"{name} has the message {str(message)[:80]}", expected)
    return [{k: v for k, v in message.items() if v is not None} for message in value]


def check_number(value: Any, name: str, location: str) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not abs(value) <= _LARGEST:
        fail(location, f"{name} is {value!r}", "a finite number", "correct it, or leave the scores out")
    return float(value)
