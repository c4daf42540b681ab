"""Pools of responses that the model itself has written, as files that grow batch by batch.

    DIR/responses.jsonl    a line for each prompt: `id`, `prompt`, `responses`, as `preferences` reads them; `ended`,
                           whether each response ended before it was cut; `missing`, if not 0, how many were left out
                           because they were empty or equal to another
    DIR/too_few.jsonl      the same for prompts with fewer than two responses, from which no pair can be made

Lines are written whole or not at all, whatever kills the process: a line cut short does not count, and its prompt is
missing.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from activedpo_jax.data.prompts import PromptRecord
from activedpo_jax.data.records import ids_of
from activedpo_jax.data.tokenize import shown_texts
from activedpo_jax.files import append_lines, read_lines, write_atomic

if TYPE_CHECKING:
    from activedpo_jax.generation.responses import Generated


class PoolFiles:
    """The two files of a work directory, and the prompts that they lack.

    Args:
      records: the prompts of the data.

    Raises:
      ValueError: a line belongs to no prompt of the data.
    """

    def __init__(self, folder: pathlib.Path, records: Sequence[PromptRecord]) -> None:
        self._ids, (self._prompts, _) = ids_of(records), shown_texts(records)
        self.paths = {True: folder / "responses.jsonl", False: folder / "too_few.jsonl"}
        row_of = {name: i for i, name in enumerate(self._ids)}
        self.missing = set(range(len(records)))  # rows of the data that are in neither file
        for path in self.paths.values():
            for number, line in enumerate(read_lines(path), start=1):
                if (name := json.loads(line)["id"]) not in row_of:
                    raise ValueError(
                        f"{path}:{number}: no prompt of the data has the id {name!r}; expected the data that this work "
                        "directory began with: restore it, or take another --workdir"
                    )
                self.missing.discard(row_of[name])

    def add(self, results: Mapping[int, "Generated"]) -> None:
        """Appends the results of missing prompts, in order."""
        new = [row for row in results if row in self.missing]
        for usable, path in self.paths.items():
            lines = []
            for row in new:
                result = results[row]
                kept = [j for j in range(len(result.texts)) if j not in result.flawed]
                if (len(kept) >= 2) == usable:
                    fields: dict[str, Any] = {
                        "id": self._ids[row],
                        "prompt": self._prompts[row],
                        "responses": [result.texts[j] for j in kept],
                    }
                    fields |= {"ended": [result.ended[j] for j in kept]}
                    fields |= {"missing": len(result.texts) - len(kept)} if result.flawed else {}
                    lines.append(json.dumps(fields, ensure_ascii=False) + "\n")
            if lines:
                append_lines(path, lines)
        self.missing -= set(new)

    def finish(self, responses: int, max_new_tokens: int, resamples: int) -> str:
        """Puts the lines into the order of the data; returns a report."""
        place = {name: i for i, name in enumerate(self._ids)}
        rows: dict[bool, list[dict[str, Any]]] = {}
        for usable, path in self.paths.items():
            lines = sorted(read_lines(path), key=lambda line: place[json.loads(line)["id"]])
            rows[usable] = [json.loads(line) for line in lines]
            if lines:
                write_atomic(path, "".join(line + "\n" for line in lines))
        good, bad = rows[True], rows[False]
        ended = [end for row in good + bad for end in row["ended"]]
        report = [
            f"{self.paths[True]}: {len(good)} prompts; {ended.count(False)} of {len(ended)} responses were cut after "
            f"{max_new_tokens} tokens"
        ]
        after = f"empty or equal still after {resamples} more attempts"
        short = [row["id"] for row in good if "missing" in row]
        for path, names, description in (
            (self.paths[True], short, f"with fewer than {responses} responses, the others being {after}"),
            (self.paths[False], [row["id"] for row in bad], f"with fewer than two, the others being {after}"),
        ):
            if names:
                listed = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
                report.append(f"{path}: {len(names)} prompts {description}: {listed}")
        return "\n".join(report)
