"""A Python function as an oracle: it rewards responses, and the pair's larger reward is preferred.

The function is called as TRL calls its reward functions: `function(prompts, completions)`, two lists of the same
length, of strings or lists of chat messages and of strings; it returns a number for each completion.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from activedpo_jax import user_code
from activedpo_jax.oracles.labels import Label, Question
from activedpo_jax.oracles.noise import Noise

RewardFunction = Callable[[list[Any], list[str]], Sequence[float]]


def load_function(name: str, option: str) -> Callable[..., Any]:
    """The function that `module:function` names.

    Raises:
      ValueError: there is no such module or function; says which option to change.
    """
    found: Callable[..., Any] = user_code.load(name, option)
    if not callable(found):
        raise ValueError(f"{option}: {name!r} is a {type(found).__name__}; expected a function")
    return found


class FunctionOracle:
    """Prefers the response that a function rewards more; of equal rewards it says `tie`."""

    answers_per_pair = 1
    asks_whole_rounds = False

    def __init__(self, function: RewardFunction, name: str, noise: Noise) -> None:
        self._function, self._name, self._noise = function, name, noise

    def ask(self, questions: Sequence[Question]) -> list[Label]:
        """The answers, in the order of the questions.

        Raises:
          ValueError: the function raises, or returns something else than a finite number for each response.
        """
        prompts = [q.prompt for q in questions]
        first = self._rewards(prompts, [q.first for q in questions])
        second = self._rewards(prompts, [q.second for q in questions])
        return self._noise.on_margins(questions, second - first, self._name)

    def _rewards(self, prompts: list[Any], responses: list[str]) -> np.ndarray:
        return rewards(self._function, self._name, prompts, responses)


def rewards(function: RewardFunction, name: str, prompts: list[Any], responses: list[str]) -> np.ndarray:
    """What the function makes of the responses, [n] float64.

    Raises:
      ValueError: the function raises, or returns something else than a finite number for each response.
    """
    try:
        found = list(function(prompts, responses))
    except Exception as error:  # of the user's own code
        raise ValueError(f"{name}: raised {type(error).__name__}: {error}; correct the function") from error
    if len(found) != len(responses):
        raise ValueError(f"{name}: returned {len(found)} rewards for {len(responses)} responses; expected one for each")
    for value, response in zip(found, responses, strict=True):
        if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not math.isfinite(value):
            raise ValueError(f"{name}: returned {value!r} for {response[:80]!r}; expected a finite number")
    return np.array(found, np.float64)
