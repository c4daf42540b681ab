"""What happened to the data on the way to tokens: counts that add up over batches and hosts."""

import dataclasses
import json
import operator

from activedpo_jax.data.store import Hosts


@dataclasses.dataclass
class Tally:
    """Counts of texts and pairs."""

    records: int = 0
    responses: int = 0
    left_out: dict[str, tuple[int, str]] = dataclasses.field(default_factory=dict)  # by name: how often, where first
    begun: int = 0  # prompts with a beginning of sequence of their own
    ended: int = 0  # responses with an end of their own
    across: int = 0  # responses tokenised apart from their prompts
    long_prompts: int = 0
    long_responses: int = 0
    longest_prompt: int = 0  # tokens
    longest_response: int = 0
    same: int = 0  # pairs of two responses of the same tokens
    ties: int = 0  # pairs of equal rewards and no preference

    def add(self, other: "Tally") -> None:
        for name, (count, first) in other.left_out.items():
            before, place = self.left_out.get(name, (0, first))
            self.left_out[name] = before + count, place
        for field in dataclasses.fields(self):
            if field.name != "left_out":
                combine = max if field.name.startswith("longest") else operator.add
                setattr(self, field.name, combine(getattr(self, field.name), getattr(other, field.name)))

    def joined(self, hosts: Hosts) -> "Tally":
        """The counts of all hosts together."""
        total = Tally()
        for text in hosts.texts(json.dumps(dataclasses.asdict(self))):
            total.add(Tally(**json.loads(text)))
        return total
