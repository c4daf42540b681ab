"""One program of a run, on abstract arguments, and how programs are counted."""

import dataclasses
from collections.abc import Iterable
from typing import Any

# The stages whose costs are added up: the first two are done once in a run, the others in every round.
ONCE = ("base model", "SFT")
OF_A_ROUND = ("round", "generation", "features", "selection", "training", "evaluation")


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program of a run, and its place in it."""

    name: str
    function: Any  # jitted
    arguments: tuple[Any, ...]
    weights: Any  # every weight on the devices while it runs, optimiser and gradients included, argument or not
    data: Any  # everything else on them: tokens, evidence, labels
    stage: str
    runs: float = 0.0  # in a round, the mean over all rounds; of `ONCE`: in the run
    pairs: int = 0  # of responses, that it works on
    iterations: int = 0  # of a loop whose length only a run can tell, at most; 0: there is none, or it is short
    reread: float = 0.0  # bytes of a device that each of these iterations reads


def chunks(count: int, size: int) -> int:
    return -(-count // size)


def parts(examples: int, batch: int, microbatch: int) -> int:
    """The microbatches of an epoch, of a single bucket."""
    whole, rest = divmod(examples, batch)
    return whole * chunks(batch, microbatch) + chunks(rest, microbatch)


def mean(counts: Iterable[int]) -> float:
    several = list(counts)
    return sum(several) / len(several)
