"""The data's own labels as an oracle, with optional noise."""

import dataclasses

import numpy as np
from scipy.special import expit

from activedpo_jax.data.groups import PairPool
from activedpo_jax.data.preferences import uniform

NOISES = ("none", "flip", "bradley_terry")


@dataclasses.dataclass(frozen=True)
class DatasetOracle:
    """Answers with the labels of the data, which depend on the seed and a pair's id alone.

    none: the preference in the data; where it has none, the response with the larger reward, and of equal
      rewards either, by a coin (which is what Bradley–Terry says at any temperature).
    flip: that, and then the other one with `flip_probability`.
    bradley_terry: drawn with p(first preferred) = σ((r₁ − r₂) / temperature) from the rewards in the data.
    """

    noise: str
    flip_probability: float
    temperature: float
    seed: int

    def ask(self, pool: PairPool, rows: np.ndarray) -> np.ndarray:
        """The preferences of pairs `rows` [K]: [K] int8, 0 the first shown is preferred, 1 the second.

        Raises:
          ValueError: the data lacks the preference, or the rewards, of a pair; or `noise` is none of these.
        """
        if self.noise not in NOISES:
            raise ValueError(f"config.oracle.noise is {self.noise!r}; expected one of {', '.join(NOISES)}")
        rows = np.asarray(rows)
        rewards = np.full((pool.num_pairs, 2), np.nan, np.float32) if pool.rewards is None else pool.rewards
        margin = np.diff(rewards[rows].astype(np.float64), axis=1)[:, 0]  # of the second over the first
        if self.noise == "bradley_terry":
            self._check(pool, rows, np.isnan(margin), "rewards", "config.oracle.noise=bradley_terry draws from them")
            return (self._draws(pool, rows, "bradley_terry") < expit(margin / self.temperature)).astype(np.int8)

        given = np.asarray(pool.preferences)[rows]
        self._check(pool, rows, (given < 0) & np.isnan(margin), "a preference or rewards", "nobody else can label it")
        coin = self._draws(pool, rows, "tie") < 0.5
        by_reward = np.where(margin == 0, coin, margin > 0)
        preferences = np.where(given < 0, by_reward, given).astype(np.int8)
        if self.noise == "flip":
            preferences ^= self._draws(pool, rows, "flip") < self.flip_probability
        return preferences

    def _draws(self, pool: PairPool, rows: np.ndarray, purpose: str) -> np.ndarray:
        return np.array([uniform(self.seed, purpose, pool.pair_ids[row]) for row in rows])

    def _check(self, pool: PairPool, rows: np.ndarray, missing: np.ndarray, expected: str, why: str) -> None:
        if missing.any():
            name = pool.pair_ids[rows[missing.argmax()]]
            raise ValueError(
                f"pair {name!r} (and {missing.sum() - 1} others) has no label; expected {expected} in the "
                f"data, since {why}: add `chosen` and `rejected`, or `rewards`, or change config.oracle.noise"
            )


def answers(pool: PairPool, noise: str, flip_probability: float, temperature: float, seed: int) -> np.ndarray:
    """What `DatasetOracle` says of all pairs of a pool, [N] int8: a fused round has them on the device."""
    return DatasetOracle(noise, flip_probability, temperature, seed).ask(pool, np.arange(pool.num_pairs))
