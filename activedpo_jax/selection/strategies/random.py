"""`random`: uniform without replacement, the baseline that all must beat."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from activedpo_jax.selection.greedy import Picks
from activedpo_jax.selection.ranking import draw, instead
from activedpo_jax.selection.strategies.base import Evidence, Strategy


def draw_where_flat(picks: Picks, values: jax.Array, available: jax.Array, key: jax.Array) -> Picks:
    """The picks; random ones, marked as a fallback, if the values [N] of all available rows are 0, as in round 1."""
    flat = jnp.any(available) & jnp.all(~available | (values == 0))
    return instead(flat, draw(available, key, picks.rows.size), picks)


def select(evidence: Evidence, available: jax.Array, key: jax.Array, num_picks: int, block: int, mesh: Mesh) -> Picks:
    return draw(available, key, num_picks)


STRATEGY = Strategy("random", select, ranks=False)
