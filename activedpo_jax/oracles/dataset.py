"""The labels of the data as an oracle, with optional noise."""

from collections.abc import Sequence

import numpy as np

from activedpo_jax.data.digests import rows_of
from activedpo_jax.data.groups import PairPool
from activedpo_jax.oracles.labels import Label, Question
from activedpo_jax.oracles.noise import Noise


class DatasetOracle:
    """Answers with the labels of the data, which depend on the seed and a pair's id alone.

    Noise `none`: the preference in the data; where it has none, the response with the larger reward, and of equal
      rewards either, by a coin (which is what Bradley–Terry says at any temperature).
    `flip`: that, and then the other one with some probability.
    `bradley_terry`: drawn with p(first preferred) = σ((r₁ − r₂) / temperature) from the rewards in the data.
    """

    answers_per_pair = 1
    asks_whole_rounds = False

    def __init__(self, pool: PairPool, noise: Noise) -> None:
        self._pool, self._noise = pool, noise

    def ask(self, questions: Sequence[Question]) -> list[Label]:
        """The answers, in the order of the questions.

        Raises:
          ValueError: the data lacks the preference, or the rewards, of a pair.
        """
        rows = rows_of([q.pair_id for q in questions], self._pool.digests)
        preferences = answers(self._pool, self._noise, rows)
        source = f"dataset ({self._noise.kind} noise)"
        return [
            Label(q.pair_id, "second" if preference else "first", source)
            for q, preference in zip(questions, preferences, strict=True)
        ]


def answers(pool: PairPool, noise: Noise, rows: np.ndarray | None = None) -> np.ndarray:
    """What the data says of pairs `rows` [K], of all if None: [K] int8, 0 the first shown is preferred, 1 the second.

    Raises:
      ValueError: the data lacks the preference, or the rewards, of a pair.
    """
    rows = np.arange(pool.num_pairs) if rows is None else rows
    names = [pool.pair_ids[row] for row in rows.tolist()]
    rewards = np.full((pool.num_pairs, 2), np.nan, np.float32) if pool.rewards is None else pool.rewards
    margins = np.diff(rewards[rows].astype(np.float64), axis=1)[:, 0]  # of the second over the first
    if noise.kind == "bradley_terry":
        why = "config.oracle.noise=bradley_terry draws from them"
        _check(names, np.isnan(margins), "rewards", why)
        return noise.from_margins(names, margins)

    given = np.asarray(pool.preferences)[rows]
    _check(names, (given < 0) & np.isnan(margins), "a preference or rewards", "nobody else can label it")
    return noise.flipped(names, np.where(given < 0, noise.larger(names, margins), given))


def _check(names: list[str], missing: np.ndarray, expected: str, why: str) -> None:
    if missing.any():
        raise ValueError(
            f"pair {names[missing.argmax()]!r} (and {missing.sum() - 1} others) has no label; expected {expected} in "
            f"the data, since {why}: add `chosen` and `rejected`, or `rewards`, or change config.oracle"
        )
