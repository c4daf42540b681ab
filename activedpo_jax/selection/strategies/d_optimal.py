"""Greedy D-optimal designs, which differ in the vectors that they are over; see `selection.greedy`."""

import jax
from jax.sharding import Mesh

from activedpo_jax.selection.greedy import Picks, greedy
from activedpo_jax.selection.strategies.base import Evidence, Strategy, required


def d_optimal(name: str, vectors: str) -> Strategy:
    """Greedy argmax vᵀV⁻¹v, V ← V + vvᵀ after each pick, from λI and the labelled pairs.

    Rows are tied where float32 cannot tell their variances apart; see `posterior.TIE`.

    Args:
      vectors: the kind of evidence that v is.
    """

    def select(
        evidence: Evidence, available: jax.Array, key: jax.Array, num_picks: int, block: int, mesh: Mesh
    ) -> Picks:
        rows, posterior, lam = required(name, evidence, vectors, "posterior", "lam")
        return greedy(rows, available, posterior, lam, num_picks=num_picks, block=block, mesh=mesh)

    return Strategy(name, select, frozenset({vectors}), design=vectors, gains=True)
