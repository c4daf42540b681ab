"""What an oracle is asked, and what it answers."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np

from activedpo_jax.data.groups import Bucket, Groups, Texts, pad_groups

Preference = Literal["first", "second", "tie", "both_bad", "skip"]
PREFERENCES: tuple[Preference, ...] = get_args(Preference)


@dataclasses.dataclass(frozen=True)
class Question:
    """One picked pair, as it is shown."""

    pair_id: str
    prompt: str | Sequence[Any]  # as a person reads it: text, or chat messages
    first: str  # the response shown first
    second: str
    score: float | None  # what the strategy ranked it by; None: it ranks by nothing
    round: int
    prompt_tokens: Sequence[int] = ()  # as the model reads them and will learn them
    first_tokens: Sequence[int] = ()
    second_tokens: Sequence[int] = ()
    digest: Sequence[int] = ()  # four words of 32 bits; see `data.groups.Candidates`


@dataclasses.dataclass(frozen=True)
class Label:
    """One answer to one question.

    `tie`: the two are equally good, which DPO learns as such.  `both_bad` and `skip` say nothing of the order: such a
    pair is neither learnt nor asked again.
    """

    pair_id: str
    preference: Preference
    source: str  # which oracle, or which file
    annotator: str = ""
    weight: float = 1.0  # how much the label counts in the loss, above 0
    time: str = ""  # ISO 8601, UTC


@dataclasses.dataclass(frozen=True)
class Pending:
    """Not all answers are there yet."""

    message: str  # the line that says what to do
    labels: Sequence["Label"] = ()  # those that have come


class Oracle(Protocol):
    """Whoever can be asked which of two responses is better."""

    answers_per_pair: int  # of different annotators
    asks_whole_rounds: bool  # each time about all of a round's pairs, else about those without an answer on record

    def ask(self, questions: Sequence[Question]) -> Sequence[Label] | Pending:
        """The answers to a round's questions, in any order, or that they have not all come.

        It is asked about a round's picks and nothing else, and never again about a pair whose label is on record.

        Raises:
          ValueError: it cannot answer one of them; says which, and what to change.
        """
        ...


@runtime_checkable
class Checked(Protocol):
    """An oracle that can be found unfit before a round is picked for it: a model, or a server."""

    def check(self) -> None:
        """Asks something whose answer is known.

        Raises:
          ValueError: it cannot answer, or answers wrongly; says what to change.
          StoreError: a server cannot be reached, or fails.
        """
        ...


@runtime_checkable
class Metered(Protocol):
    """An oracle whose answers cost something."""

    def used(self, number: int) -> dict[str, float]:
        """What the answers of round `number` took, whichever process asked: requests, tokens, cost."""
        ...


def question_groups(questions: Sequence[Question], bucket: Bucket) -> Groups:
    """Groups with m = 2, in the order shown, padded to the bucket."""
    texts = Texts(
        prompt_tokens=[np.array(q.prompt_tokens, np.int32) for q in questions],
        response_tokens=[[np.array(q.first_tokens, np.int32), np.array(q.second_tokens, np.int32)] for q in questions],
    )
    return pad_groups(texts, np.arange(len(questions)), bucket)
