"""The one training loop, for the synthetic task's base model, SFT and DPO."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import optax

from activedpo_jax import profiling
from activedpo_jax.progress import progress

# One optimiser step, from (its number from 0, weights, optimiser state) to (weights, state, report); the first entry of
# a report is the loss.
Advance = Callable[[int, Any, optax.OptState], tuple[Any, optax.OptState, Any]]


class Work(NamedTuple):
    """The steps to take, and what they are called."""

    label: str  # in progress and errors
    first: int  # the first step to take, from 0
    total: int
    rate_option: str  # the option to lower if the loss diverges
    examples: Callable[[int], list[int]] = lambda step: []  # of a step, places among those that are learnt


class Step(NamedTuple):
    """The result of one step.  The next step consumes weights and state."""

    number: int  # of steps taken
    weights: Any
    opt_state: optax.OptState
    report: Any


class Diverged(FloatingPointError):
    """The loss of a step, counted from 0, is not finite."""

    def __init__(self, work: Work, step: int, loss: float) -> None:
        super().__init__(
            f"{work.label}, step {step + 1} of {work.total}: the loss is {loss}; lower {work.rate_option}.  Nothing "
            "of this step was saved"
        )
        self.examples = work.examples(step)


def descend(work: Work, weights: Any, opt_state: optax.OptState, advance: Advance) -> Iterator[Step]:
    """Takes the steps one by one, with progress.

    Raises:
      Diverged: a loss is not finite; names the step and the option to change.
    """
    with progress(total=work.total, initial=work.first, desc=work.label, unit="step") as bar:
        for step in range(work.first, work.total):
            weights, opt_state, report = profiling.piece(
                work.label, functools.partial(advance, step, weights, opt_state)
            )
            loss = float(report[0])
            if not np.isfinite(loss):
                raise Diverged(work, step, loss)
            yield Step(step + 1, weights, opt_state, report)
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()
