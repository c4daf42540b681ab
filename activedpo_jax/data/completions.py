"""Supervised data: prompts with the completion that is to be learnt, checked one by one.

A record is any of TRL's formats for SFT, or a preference, whose chosen response is learnt, as is usual before DPO:

    prompt, completion           strings, or lists of chat messages {"role", "content"}
    messages                     a conversation; the assistant's last message is the completion, the rest the prompt
    prompt, chosen, rejected     in all forms of `preferences`

`messages` beside the same `chosen` are read once.  Other fields are ignored; so is a `prompt` beside `messages`, which
repeats their beginning.  https://huggingface.co/docs/trl/dataset_formats
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
    """One prompt with the response that is to be learnt, neither of them empty."""

    prompt: Prompt
    completion: str
    where: str  # file and line, for error messages
    extras: Extras = Extras()
    implicit: bool = False  # the prompt is what two strings begin with

    @property
    def responses(self) -> tuple[str]:
        return (self.completion,)


def read_completions(source: str, split: str = "train") -> list[Completion]:
    """All records of a data set, in its order.

    Args:
      source: a `.jsonl` or `.parquet` file, else a directory or name for `datasets`.
      split: of a `datasets` directory or name; a file is one split.

    Raises:
      ValueError: the source cannot be read, or a record is not in order; says which line (from 1) or row
        (from 0), what was expected, and what to change.  Nothing is dropped or repaired.
    """
    rows = read_rows(source, split, "config.sft.data and config.sft.split")
    completions = [_parse(row, where) for where, row in rows]
    if not completions:
        raise ValueError(f"{source}: there is no record in it; expected one at least: check config.sft.data")
    return completions


def limit(completions: Sequence[Completion], count: int, seed: int) -> list[Completion]:
    """At most so many, drawn by the seed, in the given order; a lower limit draws part of what a higher one draws."""
    drawn = np.random.default_rng(seed).permutation(len(completions))[:count]
    return [completions[i] for i in np.sort(drawn)]


def _parse(row: Mapping[str, Any], where: str) -> Completion:
    # Parquet has every column in every row: null is as good as missing.
    row = {name: value for name, value in row.items() if value is not None}
    refuse_unread(row, where)
    if row.get("label") is False and "completion" in row:
        fail(where, "label is false: a completion that people did not like", "completions to be learnt", "leave it out")
    kinds = [name for name in _KINDS if name in row]
    if kinds == ["messages", "chosen"] and row["messages"] == row["chosen"]:
        kinds = ["messages"]
    if len(kinds) != 1:
        problem = f"the fields are {', '.join(sorted(row)) or 'none'}"
        fail(where, problem, "`completion`, `messages`, or `chosen` and `rejected`, and one of these only")
    if kinds == ["completion"]:
        prompt = check_prompt(require(row, "prompt", where), where)
        completion = check_response(row["completion"], "completion", where)
        return Completion(prompt, completion, where, read_extras(row, [row["completion"]], where))
    if kinds == ["messages"]:
        return _last_message(row, where)
    record = parse_record(row, where)
    assert record.preferred is not None  # `chosen` says it
    chosen, extras = record.preferred, record.extras
    extras = dataclasses.replace(
        extras, messages=extras.messages[chosen : chosen + 1], cut=extras.cut[chosen : chosen + 1]
    )
    return Completion(record.prompt, record.responses[chosen], where, extras, record.implicit)


def _last_message(row: Mapping[str, Any], where: str) -> Completion:
    value = row["messages"]
    if isinstance(value, str):
        fail(where, "messages is a string", "a list of chat messages")
    messages = check_messages(value, "messages", where)
    roles = [m["role"] for m in messages]
    if roles[-1] != "assistant":
        fail(where, f"messages end in one of the {roles[-1]}", "one of the assistant at the end, which is learnt")
    if "user" not in roles:
        fail(where, f"messages are of {', '.join(roles)}", "one of the user at least, before the assistant's")
    prompt, completion = check_prompt(messages[:-1], where), check_response(messages[-1:], "messages", where)
    return Completion(prompt, completion, where, read_extras(row, [messages[-1:]], where))
