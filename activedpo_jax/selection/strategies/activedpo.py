"""`activedpo`: greedy argmax φᵀV⁻¹φ with V ← V + φφᵀ after each pick (arXiv 2505.19241, algorithm 1)."""

import jax
from jax.sharding import Mesh

from activedpo_jax.selection.greedy import Picks, greedy
from activedpo_jax.selection.strategies.base import Evidence, Strategy, required


def select(evidence: Evidence, available: jax.Array, key: jax.Array, num_picks: int, block: int, mesh: Mesh) -> Picks:
    """The key is not used.  Rows are tied where float32 cannot tell their variances apart; see `posterior.TIE`."""
    features, posterior, lam = required("activedpo", evidence, "features", "posterior", "lam")
    return greedy(features, available, posterior, lam, num_picks=num_picks, block=block, mesh=mesh)


STRATEGY = Strategy("activedpo", select, frozenset({"features"}), design="features", gains=True)
