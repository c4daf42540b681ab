"""Sums over the rows of a pool, a few of which are in float32 at a time."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from activedpo_jax.selection.posterior import rows_of

_TILE = 1024  # rows that are taken at a time


def sum_over_rows(
    function: Callable[..., jax.Array], vectors: jax.Array, counted: jax.Array, *of_rows: jax.Array
) -> jax.Array:
    """Σ `function` over tiles of the rows.

    Args:
      function: (rows [n, D] float32, zero where they do not count; *of_rows [n]) → what is added up, of one shape.
      vectors: [N, D] float32 or bfloat16, one device's; counted: [N] bool; of_rows: [N] each.
    """
    size = min(_TILE, len(vectors))

    def tile(number: jax.Array) -> jax.Array:
        start = jnp.minimum(number * size, len(vectors) - size)  # the last one overlaps
        places = start + jnp.arange(size)
        own = counted[places] & (places >= number * size)
        here, places = jax.lax.optimization_barrier((vectors, places))  # else XLA copies all rows before the loop
        rows = jnp.where(own[:, None], rows_of(here, places), 0.0)
        return function(rows, *(x[places] for x in of_rows))

    like = jax.eval_shape(tile, jnp.int32(0))
    nothing = jnp.zeros(like.shape, like.dtype)
    return jax.lax.fori_loop(0, -(-len(vectors) // size), lambda number, total: total + tile(number), nothing)
