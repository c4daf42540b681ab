"""`apl_certainty`: largest |Δ|, the pairs whose order the implicit reward is surest of (Muldrew et al. 2024).

arXiv 2402.08114, section 3: where the policy is sure and wrong, a label changes it most.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from activedpo_jax.selection.greedy import Picks
from activedpo_jax.selection.ranking import first
from activedpo_jax.selection.strategies.base import Evidence, Strategy, required
from activedpo_jax.selection.strategies.random import draw_where_flat


def select(evidence: Evidence, available: jax.Array, key: jax.Array, num_picks: int, block: int, mesh: Mesh) -> Picks:
    """Scores are |Δ|.  Random where every Δ is 0, as in round 1; the key is used only there."""
    (margins,) = required("apl_certainty", evidence, "margins")
    sizes = jnp.abs(margins)
    return draw_where_flat(first((-sizes,), sizes, available, num_picks), sizes, available, key)


STRATEGY = Strategy("apl_certainty", select, frozenset({"margins"}))
