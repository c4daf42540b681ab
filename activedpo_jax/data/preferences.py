"""Preference data: records of a prompt and its responses, checked one by one.

A record has one of TRL's preference formats, or comes from a pool that is not labelled yet:

    prompt, chosen, rejected      strings, or lists of chat messages {"role", "content"}
    chosen, rejected              likewise; the prompt is what both begin with
    prompt, responses             two or more responses; the data does not say which is better

It may also have `id`; `score_chosen` and `score_rejected`, or `rewards` (one for each of `responses`).  Other
fields are ignored.  https://huggingface.co/docs/trl/dataset_formats
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from activedpo_jax.data.fields import (
    Extras,
    Prompt,
    check_encodable,
    check_number,
    check_prompt,
    check_response,
    read_extras,
    refuse_unread,
    require,
)
from activedpo_jax.data.sources import fail, kind


@dataclasses.dataclass(frozen=True)
class Record:
    """One prompt with m ≥ 2 different, non-empty responses."""

    id: str  # unique; a hash of the content where the data gives none
    prompt: Prompt
    responses: tuple[str, ...]  # chosen and rejected in alphabetical order, which reveals nothing of the label
    preferred: int | None  # index of the chosen response
    rewards: tuple[float, ...] | None  # one a response, finite
    location: str  # file and line, for error messages
    extras: Extras = Extras()
    implicit: bool = False  # the prompt is the common beginning of two strings

    @property
    def num_pairs(self) -> int:
        return math.comb(len(self.responses), 2)


def uniform(seed: int, *names: str) -> float:
    """A number in [0, 1) that depends on the seed and the names alone, not on other draws or their order."""
    digest = hashlib.blake2b(json.dumps([seed, *names]).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) * 2.0**-53


_SCORES = ("score_chosen", "score_rejected")


def parse_record(row: Mapping[str, Any], location: str) -> Record:
    """The record in a row, with an empty id if the row gives none.

    Raises:
      ValueError: the record is malformed.
    """
    # Parquet has every column in every row: null counts as missing.
    row = {name: value for name, value in row.items() if value is not None}
    refuse_unread(row, location)
    id_ = row.get("id", "")
    if "id" in row and (isinstance(id_, bool) or not isinstance(id_, str | int) or id_ == ""):
        fail(location, f"id is {kind(id_)}", "a non-empty string or an integer, or no id")
    check_encodable(id_, "id", location)
    labelled, unlabelled = "chosen" in row or "rejected" in row, "responses" in row
    if labelled == unlabelled:
        problem = f"the fields are {', '.join(sorted(row)) or 'none'}"
        fail(location, problem, "`chosen` and `rejected`, or `responses`, and not both")
    if unlabelled:
        prompt = check_prompt(require(row, "prompt", location), location)
        responses = _responses(row["responses"], location)
        rewards = _rewards(row["rewards"], len(responses), location) if "rewards" in row else None
        return Record(
            str(id_), prompt, responses, None, rewards, location, read_extras(row, row["responses"], location)
        )

    value, chosen, rejected = _explicit_prompt(row, location)
    prompt = check_prompt(value, location)
    pair = (check_response(chosen, "chosen", location), check_response(rejected, "rejected", location))
    _check_different(pair, ("chosen", "rejected"), location)
    scores = None
    if any(name in row for name in _SCORES):
        scores = tuple(check_number(require(row, name, location), name, location) for name in _SCORES)
    implicit = isinstance(prompt, str) and value is not row.get("prompt")
    if pair[0] < pair[1]:
        extras = read_extras(row, (chosen, rejected), location)
        return Record(str(id_), prompt, pair, 0, scores, location, extras, implicit)
    extras = read_extras(row, (rejected, chosen), location)
    return Record(str(id_), prompt, pair[::-1], 1, scores and scores[::-1], location, extras, implicit)


def _explicit_prompt(row: Mapping[str, Any], location: str) -> tuple[Any, Any, Any]:
    """(prompt, chosen, rejected), with the prompt removed from responses that contain it.

    As in TRL's `maybe_extract_prompt`, a `prompt` string next to whole conversations only repeats their
    beginning; as in its `extract_prompt`, the space between prompt and response goes to the response.
    """
    chosen, rejected = require(row, "chosen", location), require(row, "rejected", location)
    if type(chosen) is not type(rejected) or not isinstance(chosen, str | list):
        problem = f"chosen is {kind(chosen)} and rejected {kind(rejected)}"
        fail(location, problem, "two strings, or two lists of chat messages")
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if "prompt" in row and (isinstance(chosen, str) or not isinstance(row["prompt"], str) or not shared):
        return row["prompt"], chosen, rejected
    if chosen == rejected:
        fail(location, "chosen and rejected are identical", "different responses", "delete the record")
    if shared in (len(chosen), len(rejected)):
        problem = "there is no `prompt`, and one of chosen and rejected is the beginning of the other"
        fail(location, problem, "a response after the prompt in both", "add `prompt`")
    if shared and chosen[shared - 1] == " ":
        shared -= 1
    if not shared:
        problem = "there is no `prompt`, and chosen and rejected begin differently"
        fail(location, problem, "the same prompt at the beginning of both", "add `prompt`")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _responses(value: Any, location: str) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) < 2:
        problem = f"responses is {kind(value)}" + (f" of {len(value)}" if isinstance(value, list) else "")
        fail(location, problem, "a list of two responses or more")
    names = [f"responses[{i}]" for i in range(len(value))]
    responses = tuple(check_response(r, name, location) for r, name in zip(value, names, strict=True))
    _check_different(responses, names, location)
    return responses


def _check_different(responses: Sequence[str], names: Sequence[str], location: str) -> None:
    first: dict[str, str] = {}
    for response, name in zip(responses, names, strict=True):
        twin = first.setdefault(response.strip(), name)  # most chat templates strip them
        if twin != name:
            fail(location, f"{twin} and {name} are identical", "different responses", "delete one of the two")


def _rewards(value: Any, count: int, location: str) -> tuple[float, ...]:
    if not isinstance(value, list) or len(value) != count:
        problem = f"rewards is {kind(value)}" + (f" of {len(value)}" if isinstance(value, list) else "")
        fail(location, problem, f"a list of {count} numbers, one for each of `responses`")
    return tuple(check_number(v, f"rewards[{i}]", location) for i, v in enumerate(value))


def prompt_key(prompt: Prompt) -> str:
    """A key that ignores surrounding space, and whether the prompt is a string or a user's message."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return json.dumps([{**m, "content": m["content"].strip()} for m in messages], sort_keys=True)


def content_hash(record: Record) -> int:
    """64 bits of prompt and responses, not of the label: an id survives a new annotation, and reveals nothing."""
    content = json.dumps([record.prompt, sorted(record.responses)], sort_keys=True)
    return _hash(content)


def prompt_hash(prompt: Prompt) -> int:
    """64 bits of `prompt_key`."""
    return _hash(prompt_key(prompt))


def copy_hash(record: Record, pair: tuple[int, int]) -> tuple[int, int]:
    """64 bits of a prompt and two of its responses, in either order, and which of the two texts in alphabetical order
    the data prefers, −1 if it does not say."""
    texts = [record.responses[j].strip() for j in pair]
    better = texts[pair.index(record.preferred)] if record.preferred in pair else None
    texts.sort()
    content = _hash(json.dumps([prompt_key(record.prompt), *texts]))
    return content, -1 if better is None else texts.index(better)


def _hash(content: str) -> int:
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "big")
