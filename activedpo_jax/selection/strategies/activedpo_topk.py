"""`activedpo_topk`: the K largest φᵀV⁻¹φ with V from labelled pairs alone: ActiveDPO without the update in the batch.

An ablation.  Pairs that say the same thing are all picked, since none lowers the score of another.
"""

import jax
from jax.sharding import Mesh

from activedpo_jax.selection.greedy import Picks
from activedpo_jax.selection.ranking import largest
from activedpo_jax.selection.strategies.base import Evidence, Strategy, required
from activedpo_jax.selection.widths import row_variances


def select(evidence: Evidence, available: jax.Array, key: jax.Array, num_picks: int, block: int, mesh: Mesh) -> Picks:
    """Scores are variances, 0 where float32 resolves none; tied as in `activedpo`.  Key and block are not used."""
    features, posterior, lam = required("activedpo_topk", evidence, "features", "posterior", "lam")
    scores, tolerance = row_variances(features, posterior, lam, mesh)
    return largest(scores, tolerance, available, num_picks)


STRATEGY = Strategy("activedpo_topk", select, frozenset({"features"}), design="features")
