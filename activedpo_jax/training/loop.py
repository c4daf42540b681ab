"""The one training loop: of the synthetic task's base model, of SFT and of DPO."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import optax

from activedpo_jax.progress import progress

# One optimiser step, from (its place, weights, their optimiser's state) to (weights, state, what it reports, whose
# first field or entry is the loss).
Advance = Callable[[int, Any, optax.OptState], tuple[Any, optax.OptState, Any]]


class Work(NamedTuple):
    """Which steps there are to do, and what they are called."""

    label: str  # in progress and errors
    first: int  # the steps before it are done
    total: int
    rate_option: str  # the option to lower if the loss diverges


class Step(NamedTuple):
    """What there is after one step.  Weights and state are used up by the next one."""

    number: int  # of steps that are done
    weights: Any
    opt_state: optax.OptState
    report: Any


def descend(work: Work, weights: Any, opt_state: optax.OptState, advance: Advance) -> Iterator[Step]:
    """Takes the steps one by one, with progress.

    Raises:
      FloatingPointError: a loss is not finite; names the step and the option to change.
    """
    with progress(total=work.total, initial=work.first, desc=work.label, unit="step") as bar:
        for step in range(work.first, work.total):
            weights, opt_state, report = advance(step, weights, opt_state)
            loss = float(report[0])
            if not np.isfinite(loss):
                raise FloatingPointError(
                    f"{work.label}, step {step + 1} of {work.total}: the loss is {loss}; lower {work.rate_option}.  "
                    "Nothing of this step was saved"
                )
            yield Step(step + 1, weights, opt_state, report)
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()
