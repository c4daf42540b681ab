"""How far rows are from the nearest of some centres: k-center's and k-means++'s measure."""

import jax
import jax.numpy as jnp

from activedpo_jax.selection.posterior import widened


def squared_distances(vectors: jax.Array, factors: jax.Array, centre: jax.Array) -> jax.Array:
    """‖f v − c‖² of every row: [n] float32, exactly 0 for the centre's own copies.

    Args:
      vectors: [n, D] float32 or bfloat16; factors: [n] float32; centre: [D] float32.
    """

    def of(rows: jax.Array, factors: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(factors[:, None] * rows - centre), axis=-1)

    return widened(of, vectors, factors)
