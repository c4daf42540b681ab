"""Supervised data: prompts with the completion to be learnt, checked one by one.

A record has one of TRL's formats for SFT, or is a preference, whose chosen response is learnt, as is usual before DPO:

    prompt, completion           strings, or lists of chat messages {"role", "content"}
    messages                     a conversation; the assistant's last message is the completion, the rest the prompt
    prompt, chosen, rejected     in any of the forms in `preferences`

`messages` next to an identical `chosen` are read once.  Other fields are ignored, including a `prompt` next to
`messages`, which repeats their beginning.  https://huggingface.co/docs/trl/dataset_formats
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from activedpo_jax.data.fields import (
    Extras,
    Prompt,
    check_messages,
    check_prompt,
    check_response,
    read_extras,
    refuse_unread,
    require,
)
from activedpo_jax.data.preferences import parse_record
from activedpo_jax.data.sources import fail, read_rows

_KINDS = ("completion", "messages", "chosen")  # fields that say what the completion is


@dataclasses.dataclass(frozen=True)
class Completion:
    """One prompt with the response to be learnt, neither of them empty."""

    prompt: Prompt
    completion: str
    location: str  # file and line, for error messages
    extras: Extras = Extras()
    implicit: bool = False  # the prompt is the common beginning of two strings

    @property
    def responses(self) -> tuple[str]:
        return (self.completion,)


def read_completions(source: str, split: str = "train") -> list[Completion]:
    """All records of a data set, in order.

    Args:
      source: a `.jsonl` or `.parquet` file, or a directory or name for `datasets`.
      split: of a `datasets` directory or name; a file is one split.

    Raises:
      ValueError: the source cannot be read, or a record is malformed; says which line (from 1) or row
        (from 0), what was expected, and what to change.  Nothing is dropped or repaired.
    """
    rows = read_rows(source, split, "config.sft.data and config.sft.split")
    completions = [_parse(row, location) for location, row in rows]
    if not completions:
        raise ValueError(f"{source}: there is no record in it; expected one at least: check config.sft.data")
    return completions


def limit(completions: Sequence[Completion], count: int, seed: int) -> list[Completion]:
    """At most `count` of them, drawn by the seed, in the given order; a lower limit draws a part of them."""
    drawn = np.random.default_rng(seed).permutation(len(completions))[:count]
    return [completions[i] for i in np.sort(drawn)]


def _parse(row: Mapping[str, Any], location: str) -> Completion:
    # Parquet has every column in every row: null counts as missing.
    row = {name: value for name, value in row.items() if value is not None}
    refuse_unread(row, location)
    if row.get("label") is False and "completion" in row:
        fail(
            location,
            "label is false: a completion that people did not like",
            "completions to be learnt",
            "leave it out",
        )
    kinds = [name for name in _KINDS if name in row]
    if kinds == ["messages", "chosen"] and row["messages"] == row["chosen"]:
        kinds = ["messages"]
    if len(kinds) != 1:
        problem = f"the fields are {', '.join(sorted(row)) or 'none'}"
        fail(location, problem, "`completion`, `messages`, or `chosen` and `rejected`, and one of these only")
    if kinds == ["completion"]:
        prompt = check_prompt(require(row, "prompt", location), location)
        completion = check_response(row["completion"], "completion", location)
        return Completion(prompt, completion, location, read_extras(row, [row["completion"]], location))
    if kinds == ["messages"]:
        return _last_message(row, location)
    record = parse_record(row, location)
    assert record.preferred is not None  # `chosen` says it
    chosen, extras = record.preferred, record.extras
    extras = dataclasses.replace(
        extras, messages=extras.messages[chosen : chosen + 1], cut=extras.cut[chosen : chosen + 1]
    )
    return Completion(record.prompt, record.responses[chosen], location, extras, record.implicit)


def _last_message(row: Mapping[str, Any], location: str) -> Completion:
    value = row["messages"]
    if isinstance(value, str):
        fail(location, "messages is a string", "a list of chat messages")
    messages = check_messages(value, "messages", location)
    roles = [m["role"] for m in messages]
    if roles[-1] != "assistant":
        fail(location, f"messages end in one of the {roles[-1]}", "one of the assistant at the end, which is learnt")
    if "user" not in roles:
        fail(location, f"messages are of {', '.join(roles)}", "one of the user at least, before the assistant's")
    prompt, completion = check_prompt(messages[:-1], location), check_response(messages[-1:], "messages", location)
    return Completion(prompt, completion, location, read_extras(row, [messages[-1:]], location))
