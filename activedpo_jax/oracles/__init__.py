"""Oracles: who says which response of a pair is better."""

from typing import Protocol

import numpy as np

from activedpo_jax.data.groups import PairPool


class Oracle(Protocol):
    """Whoever can be asked for preferences."""

    def ask(self, pool: PairPool, rows: np.ndarray) -> np.ndarray:
        """The preferences of pairs `rows` [K] of a pool: [K] int8, 0 for the first shown, 1 for the second."""
        ...
