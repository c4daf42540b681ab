"""`activedpo_topk`: the K largest φᵀV⁻¹φ with V from labelled pairs alone: ActiveDPO without the update in the batch.

An ablation.  Pairs that say the same thing are all picked, since none lowers the score of another.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from activedpo_jax.selection.greedy import Picks, divisible
from activedpo_jax.selection.posterior import TIE, prior_variances, variances
from activedpo_jax.selection.ranking import largest
from activedpo_jax.selection.strategies.base import Evidence, Strategy, required


def select(evidence: Evidence, available: jax.Array, key: jax.Array, num_picks: int, block: int, mesh: Mesh) -> Picks:
    """Scores are variances, 0 where float32 resolves none; tied as in `activedpo`.  Key and block are not used."""
    features, posterior, lam = required("activedpo_topk", evidence, "features", "posterior", "lam")
    tolerance = TIE * prior_variances(features, lam)
    by_rows = jax.shard_map(variances, mesh=mesh, in_specs=(P(mesh.axis_names), P(), P()), out_specs=P(mesh.axis_names))
    (whole,) = divisible(mesh, features)
    scores = by_rows(whole, posterior, jnp.asarray(lam, jnp.float32))[: features.shape[0]]
    scores = jnp.where(scores <= tolerance, 0.0, scores)
    return largest(scores, tolerance, available, num_picks)


STRATEGY = Strategy("activedpo_topk", select, frozenset({"features"}), design="features")
