"""A JAX function as an oracle: a reward of tokens, which a round's compiled program can ask.

The function takes `data.groups.Groups` of G prompts with m responses and returns their rewards, [G, m] float32; it can
be traced.  A `jax.tree_util.Partial` may carry arrays, such as the weights of a reward model.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from activedpo_jax.data.groups import Bucket, Groups
from activedpo_jax.oracles.labels import Label, Question, question_groups
from activedpo_jax.oracles.noise import NO_NOISE, Noise

Reward = Callable[[Groups], jax.Array]


def preferences(reward: Reward, groups: Groups) -> jax.Array:
    """Of pairs (groups with m = 2): 0 the first has the larger reward, 1 the second, ½ they are equal; [G] float32.

    NaN where a reward is not finite: nothing is known of that pair.
    """
    first, second = reward(groups).T
    known = jnp.isfinite(first) & jnp.isfinite(second)
    return jnp.where(known, jnp.where(first == second, 0.5, second > first), jnp.nan).astype(jnp.float32)


class RewardOracle:
    """Prefers the response of the larger reward; of equal rewards it says `tie`.

    Args:
      name: of the function, for the record.
      bucket: which holds every pair.
    """

    answers_per_pair = 1
    asks_whole_rounds = False

    def __init__(self, reward: Reward, name: str, bucket: Bucket, noise: Noise = NO_NOISE) -> None:
        self._reward, self._name, self._bucket, self._noise = reward, name, bucket, noise

    def ask(self, questions: Sequence[Question]) -> list[Label]:
        """The answers, in the order of the questions.

        Raises:
          ValueError: a reward is not finite, or the rewards have another shape.
        """
        groups = question_groups(questions, self._bucket)
        found = np.asarray(jax.jit(self._reward)(groups))
        if found.shape != (len(questions), 2) or not np.all(np.isfinite(found)):
            raise ValueError(
                f"{self._name}: returned rewards of shape {found.shape}, {int(np.sum(~np.isfinite(found)))} of them "
                f"not finite; expected {(len(questions), 2)}, finite: correct the function"
            )
        margins = np.diff(found.astype(np.float64), axis=1)[:, 0]
        return self._noise.on_margins(questions, margins, self._name)
