"""Prompts to respond to: the different prompts of any data set that a run can read."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from activedpo_jax.data.fields import Extras, Prompt, check_encodable, check_prompt, read_extras, refuse_unread
from activedpo_jax.data.preferences import Record, parse_record, prompt_hash
from activedpo_jax.data.records import Records, check_ids, read_all, shared_rows
from activedpo_jax.data.sources import fail, kind, open_rows
from activedpo_jax.data.store import ALONE, Hosts


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


def read_prompts(source: str, split: str = "train", hosts: Hosts = ALONE) -> Records[PromptRecord]:
    """The different prompts of a data set, in order.

    A row is a `prompt` (a string, or a list of chat messages) with an optional `id`, or a preference in any of the
    forms in `preferences`.  The first of several rows with the same prompt counts.

    Args:
      source: a `.jsonl` or `.parquet` file, or a directory or name for `datasets`.
      split: of a `datasets` directory or name; a file is one split.
      hosts: each reads its share.

    Raises:
      ValueError: the source cannot be read, a row is malformed, or two prompts have the same id.
    """
    options = "config.generation.prompts and config.generation.split"
    rows = shared_rows(lambda: open_rows(source, split, options), source, hosts)
    if not len(rows):
        raise ValueError(f"{source}: there is no prompt in it; expected one at least: check config.generation.prompts")
    prompts = read_all(rows, parse_prompt, lambda record: prompt_hash(record.prompt), hosts).distinct()
    check_ids(prompts.ids, prompts.location)
    return prompts


def parse_prompt(row: Mapping[str, Any], location: str) -> PromptRecord:
    """The prompt in a row, with an empty id if the row gives none.

    Raises:
      ValueError: the row is malformed.
    """
    if row.get("chosen") is not None or row.get("rejected") is not None or row.get("responses") is not None:
        return _prompt_of(row, location)  # an `id` here is the pair's
    if row.get("prompt") is None:
        fail(location, f"the fields are {', '.join(sorted(row)) or 'none'}", "`prompt`, or those of a preference")
    refuse_unread(row, location)
    prompt, id_ = check_prompt(row["prompt"], location), row.get("id")
    if id_ is not None and (isinstance(id_, bool) or not isinstance(id_, str | int) or id_ == ""):
        fail(location, f"id is {kind(id_)}", "a non-empty string or an integer, or no id")
    check_encodable(id_, "id", location)
    return PromptRecord("" if id_ is None else str(id_), prompt, location, _extras(row, location))


def prompts_of(records: Records[Record]) -> Records[PromptRecord]:
    """The different prompts of preference records, in their order; each has a hash of its content as its id."""
    return records.distinct().seen_as(_prompt_of)


def _prompt_of(row: Mapping[str, Any], location: str) -> PromptRecord:
    record = parse_record(row, location)
    return PromptRecord("", record.prompt, location, _extras(row, location), record.implicit)


def _extras(row: Mapping[str, Any], location: str) -> Extras:
    fields = {name: row[name] for name in ("tools", "chat_template_kwargs") if name in row}
    return read_extras(fields, (), location)
