"""Prompts to respond to: the different prompts of any data set that a run can read."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from activedpo_jax.data.fields import Extras, Prompt, check_prompt, read_extras, refuse_unread
from activedpo_jax.data.preferences import Record, parse_record, prompt_hash, prompt_key
from activedpo_jax.data.records import prompt_hashes_of, taken
from activedpo_jax.data.sources import fail, kind, read_rows


@dataclasses.dataclass(frozen=True)
class PromptRecord:
    """One prompt, not empty."""

    id: str  # unique; a hash of the prompt where the data gives none
    prompt: Prompt
    location: str  # file and line, for error messages
    extras: Extras = Extras()
    implicit: bool = False  # the prompt is the common beginning of two strings

    @property
    def responses(self) -> tuple[str, ...]:
        """None yet; with them, a prompt is what `templates` writes."""
        return ()


def read_prompts(source: str, split: str = "train") -> list[PromptRecord]:
    """The different prompts of a data set, in order.

    A row is a `prompt` (a string, or a list of chat messages) with an optional `id`, or a preference in any of the
    forms in `preferences`.  The first of several rows with the same prompt counts.

    Args:
      source: a `.jsonl` or `.parquet` file, or a directory or name for `datasets`.
      split: of a `datasets` directory or name; a file is one split.

    Raises:
      ValueError: the source cannot be read, a row is malformed, or two prompts have the same id.
    """
    found: dict[str, PromptRecord] = {}
    ids: dict[str, str] = {}
    for location, row in read_rows(source, split, "config.generation.prompts and config.generation.split"):
        id_: Any = None
        if row.get("chosen") is not None or row.get("rejected") is not None or row.get("responses") is not None:
            record = parse_record(row, location)
            prompt, implicit = record.prompt, record.implicit  # an `id` here is the pair's
        elif row.get("prompt") is not None:
            refuse_unread(row, location)
            prompt, id_, implicit = check_prompt(row["prompt"], location), row.get("id"), False
            if id_ is not None and (isinstance(id_, bool) or not isinstance(id_, str | int) or id_ == ""):
                fail(location, f"id is {kind(id_)}", "a non-empty string or an integer, or no id")
        else:
            fail(location, f"the fields are {', '.join(sorted(row)) or 'none'}", "`prompt`, or those of a preference")
        key = prompt_key(prompt)
        if key in found:
            continue
        name = f"{prompt_hash(prompt):016x}" if id_ is None else str(id_)
        if name in ids:
            fail(location, f"id {name!r} was given to {ids[name]} already", "every id once")
        ids[name] = location
        extras = read_extras({n: row[n] for n in ("tools", "chat_template_kwargs") if n in row}, (), location)
        found[key] = PromptRecord(name, prompt, location, extras, implicit)
    if not found:
        raise ValueError(f"{source}: there is no prompt in it; expected one at least: check config.generation.prompts")
    return list(found.values())


def prompts_of(records: Sequence[Record]) -> list[PromptRecord]:
    """The different prompts of preference records, in their order; each has a hash of its content as its id."""
    hashes, first = np.unique(prompt_hashes_of(records), return_index=True)
    order = np.argsort(first)
    found = []
    for hash_, record in zip(hashes[order].tolist(), taken(records, first[order]), strict=True):
        extras = Extras(tools=record.extras.tools, template_kwargs=record.extras.template_kwargs)
        found.append(PromptRecord(f"{hash_:016x}", record.prompt, record.location, extras, record.implicit))
    return found
