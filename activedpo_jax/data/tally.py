"""What happened to the data on the way to tokens: counts that add up over batches and hosts, and notes on them."""

import dataclasses
import json

import numpy as np

from activedpo_jax.data.store import Hosts
from activedpo_jax.data.templates import Exchange, Template


@dataclasses.dataclass
class Tally:
    """Counts of texts and pairs."""

    max_prompt: int  # tokens
    max_response: int
    records: int = 0
    responses: int = 0
    left_out: dict[str, tuple[int, str]] = dataclasses.field(default_factory=dict)  # by name: how often, where first
    begun: int = 0  # prompts with a beginning of sequence of their own
    ended: int = 0  # responses with an end of their own
    markers: tuple[str, str] = ("", "")  # those beginnings and ends
    across: int = 0  # responses tokenised apart from their prompts
    long_prompts: int = 0
    longest_prompt: int = 0  # tokens
    long_responses: int = 0
    longest_response: int = 0
    same: int = 0  # pairs of two responses of the same tokens
    ties: int = 0  # pairs of equal rewards and no preference

    def record(self, record: Exchange, unwritten: list[str], template: Template) -> None:
        """Counts a record, of which the template leaves out what is `unwritten`."""
        self.records += 1
        self.responses += len(record.responses)
        for name in unwritten:
            count, first = self.left_out.get(name, (0, record.location))
            self.left_out[name] = count + 1, first
        bos, eos = (str(token or "") for token in (template.tokenizer.bos_token, template.tokenizer.eos_token))
        ends = tuple({eos: None, template.end.strip(): None}.keys() - {""})
        self.markers = bos, " or ".join(ends)
        self.begun += isinstance(record.prompt, str) and bool(bos) and record.prompt.startswith(bos)
        self.ended += sum(bool(ends) and text.rstrip().endswith(ends) for text in record.responses)

    def lengths(self, prompts: list[int], responses: list[int]) -> None:
        """Counts what is too long, in tokens."""
        self.long_prompts += sum(n > self.max_prompt for n in prompts)
        self.longest_prompt = max([self.longest_prompt, *prompts])
        self.long_responses += sum(n > self.max_response for n in responses)
        self.longest_response = max([self.longest_response, *responses])

    @staticmethod
    def joined(mine: "Tally", hosts: Hosts) -> "Tally":
        """The counts of all hosts together."""
        total = Tally(mine.max_prompt, mine.max_response)
        for text in hosts.texts(json.dumps(dataclasses.asdict(mine))):
            part = Tally(**json.loads(text))
            for name, (count, first) in part.left_out.items():
                before, place = total.left_out.get(name, (0, first))
                total.left_out[name] = before + count, place
            if part.records:
                total.markers = part.markers[0], part.markers[1]
            for name in ("longest_prompt", "longest_response"):
                setattr(total, name, max(getattr(total, name), getattr(part, name)))
            for name in _SUMS:
                setattr(total, name, getattr(total, name) + getattr(part, name))
        return total

    def notes(self, pairs: int = 0, copies: str = "") -> list[str]:
        """One line for everything that is worth a word; nothing is dropped in silence.

        Args:
          pairs: how many there are.
          copies: see `copies_note`.
        """
        bos, ends = self.markers
        notes = [
            f"{count} of {self.records} records have {name}, which the chat template leaves out (first: {first})"
            for name, (count, first) in self.left_out.items()
        ]
        if self.begun:
            notes.append(f"{self.begun} of {self.records} prompts begin with {bos!r} themselves: it is not added again")
        if self.ended:
            notes.append(f"{self.ended} of {self.responses} responses end in {ends} themselves: it is not added again")
        if self.across:
            notes.append(
                f"{self.across} of {self.responses} responses were tokenised apart from their prompts, since a token "
                "would have lain across the border"
            )
        for kind, lost, longer, total, longest, size in (
            ("prompts", "beginning", self.long_prompts, self.records, self.longest_prompt, self.max_prompt),
            (
                "responses",
                "end, EOS included",
                self.long_responses,
                self.responses,
                self.longest_response,
                self.max_response,
            ),
        ):
            if longer:
                notes.append(
                    f"{longer} of {total} {kind} ({longer / total:.1%}) are longer than {size} tokens "
                    f"(up to {longest}) and lost their {lost}: see config.data.buckets"
                )
        if copies:
            notes.append(copies)
        if self.same:
            notes.append(
                f"{self.same} of {pairs} pairs have two responses of the same tokens: nothing can be learnt there"
            )
        if self.ties:
            notes.append(
                f"{self.ties} of {pairs} pairs have equal rewards and no preference: a coin decides, by their id"
            )
        return notes


_SUMS = (
    "records",
    "responses",
    "begun",
    "ended",
    "across",
    "long_prompts",
    "long_responses",
    "same",
    "ties",
)


def copies_note(contents: np.ndarray, sides: np.ndarray) -> str:
    """Counts pairs of texts that occur again, in either order, and those of them with another label.

    Args:
      contents, sides: [N] uint64 and [N] int8, as of `preferences.copy_hash`.
    """
    _, first, place = np.unique(contents, return_index=True, return_inverse=True)
    again = len(contents) - len(first)
    if not again:
        return ""
    before = sides[first][place]
    opposite = int(np.sum((sides >= 0) & (before >= 0) & (sides != before)))
    return (
        f"{again} of {len(contents)} pairs are there a second time, {opposite} with the opposite label: each costs a "
        "label"
    )
