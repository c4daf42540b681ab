"""`activedpo_norm`: the K largest ‖φ‖², which is ActiveDPO with V = I: no labels, and no update in the batch.

An ablation.
"""

import jax
from jax.sharding import Mesh

from activedpo_jax.selection.greedy import Picks
from activedpo_jax.selection.posterior import TIE, prior_variances
from activedpo_jax.selection.ranking import largest
from activedpo_jax.selection.strategies.base import Evidence, Strategy, required


def select(evidence: Evidence, available: jax.Array, key: jax.Array, num_picks: int, block: int, mesh: Mesh) -> Picks:
    """Scores are ‖φ‖², tied as in `activedpo`.  Key and block are not used."""
    (features,) = required("activedpo_norm", evidence, "features")
    scores = prior_variances(features, 1.0)
    return largest(scores, TIE * scores, available, num_picks)


STRATEGY = Strategy("activedpo_norm", select, frozenset({"features"}))
