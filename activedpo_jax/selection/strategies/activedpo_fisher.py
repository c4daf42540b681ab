"""`activedpo_fisher`: `activedpo` with every φφᵀ weighted by p(1−p), the Fisher information of Bradley–Terry.

A pair whose answer the implicit reward foresees, p near 0 or 1, says little, however new its φ is.  That is D-optimal
design for logistic regression at the current estimate.
"""

import jax
from jax.sharding import Mesh

from activedpo_jax.selection.greedy import Picks, greedy
from activedpo_jax.selection.strategies.base import Evidence, Strategy, required


def select(evidence: Evidence, available: jax.Array, key: jax.Array, num_picks: int, block: int, mesh: Mesh) -> Picks:
    """As `activedpo`, on √(p(1−p)) φ.  The key is not used."""
    features, posterior, lam = required("activedpo_fisher", evidence, "fisher_features", "posterior", "lam")
    return greedy(features, available, posterior, lam, num_picks=num_picks, block=block, mesh=mesh)


STRATEGY = Strategy("activedpo_fisher", select, frozenset({"fisher_features"}), design="fisher_features", gains=True)
