"""Prompts to respond to: of a data set of any of the kinds that a run reads, the different prompts."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

from activedpo_jax.data.fields import Extras, Prompt, check_prompt, read_extras, refuse_unread
from activedpo_jax.data.preferences import Record, parse_record, prompt_key
from activedpo_jax.data.sources import fail, kind, read_rows


@dataclasses.dataclass(frozen=True)
class PromptRecord:
    """One prompt, not empty."""

    id: str  # unique; a hash of the prompt where the data gives none
    prompt: Prompt
    where: str  # file and line, for error messages
    extras: Extras = Extras()
    implicit: bool = False  # the prompt is what two strings begin with

    @property
    def responses(self) -> tuple[str, ...]:
        """None yet: with them it is what `templates` writes."""
        return ()


def read_prompts(source: str, split: str = "train") -> list[PromptRecord]:
    """The different prompts of a data set, in its order.

    A row is a `prompt` (a string, or a list of chat messages) with an `id` or none, or a preference in any of the forms
    of `preferences`.  Of rows with the same prompt the first counts.

    Args:
      source: a `.jsonl` or `.parquet` file, else a directory or name for `datasets`.
      split: of a `datasets` directory or name; a file is one split.

    Raises:
      ValueError: the source cannot be read, a row is not in order, or two prompts have the same id.
    """
    found: dict[str, PromptRecord] = {}
    ids: dict[str, str] = {}
    for where, row in read_rows(source, split, "config.generation.prompts and config.generation.split"):
        id_: Any = None
        if row.get("chosen") is not None or row.get("rejected") is not None or row.get("responses") is not None:
            record = parse_record(row, where)
            prompt, implicit = record.prompt, record.implicit  # an id there is that of the pair
        elif row.get("prompt") is not None:
            refuse_unread(row, where)
            prompt, id_, implicit = check_prompt(row["prompt"], where), row.get("id"), False
            if id_ is not None and (isinstance(id_, bool) or not isinstance(id_, str | int) or id_ == ""):
                fail(where, f"id is {kind(id_)}", "a non-empty string or an integer, or no id")
        else:
            fail(where, f"the fields are {', '.join(sorted(row)) or 'none'}", "`prompt`, or those of a preference")
        key = prompt_key(prompt)
        if key in found:
            continue
        name = hashlib.blake2b(key.encode(), digest_size=8).hexdigest() if id_ is None else str(id_)
        if name in ids:
            fail(where, f"id {name!r} was given to {ids[name]} already", "every id once")
        ids[name] = where
        extras = read_extras({n: row[n] for n in ("tools", "chat_template_kwargs") if n in row}, (), where)
        found[key] = PromptRecord(name, prompt, where, extras, implicit)
    if not found:
        raise ValueError(f"{source}: there is no prompt in it; expected one at least: check config.generation.prompts")
    return list(found.values())


def prompts_of(records: Sequence[Record]) -> list[PromptRecord]:
    """The different prompts of preference records, in their order; each has a hash of its content as its id."""
    found: dict[str, PromptRecord] = {}
    for record in records:
        key = prompt_key(record.prompt)
        extras = Extras(tools=record.extras.tools, template_kwargs=record.extras.template_kwargs)
        name = hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
        found.setdefault(key, PromptRecord(name, record.prompt, record.where, extras, record.implicit))
    return list(found.values())
