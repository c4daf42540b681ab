"""`random`: uniform without replacement, the baseline that all must beat."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from activedpo_jax.selection.greedy import Picks
from activedpo_jax.selection.ranking import first
from activedpo_jax.selection.strategies.base import Evidence, Strategy


def draw(available: jax.Array, key: jax.Array, num_picks: int) -> Picks:
    """K rows in random order, with score 0.

    Every row draws a ticket from the key and its own number, and the lowest tickets win.  So the picks do not depend on
    how many rows follow: padding the pool to a multiple of the devices changes nothing.
    """
    rows = jnp.arange(available.shape[0], dtype=jnp.int32)
    tickets = jax.vmap(lambda row: jax.random.bits(jax.random.fold_in(key, row)))(rows)
    return first((tickets,), jnp.zeros(rows.size, jnp.float32), available, num_picks)


def draw_where_flat(picks: Picks, values: jax.Array, available: jax.Array, key: jax.Array) -> Picks:
    """The picks; random ones, marked as a fallback, if the values [N] of all available rows are 0, as in round 1."""
    flat = jnp.any(available) & jnp.all(~available | (values == 0))
    drawn = draw(available, key, picks.rows.size)
    return Picks(jnp.where(flat, drawn.rows, picks.rows), jnp.where(flat, drawn.scores, picks.scores), flat)


def select(evidence: Evidence, available: jax.Array, key: jax.Array, num_picks: int, block: int, mesh: Mesh) -> Picks:
    return draw(available, key, num_picks)


STRATEGY = Strategy("random", select, ranks=False)
