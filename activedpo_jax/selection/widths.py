"""What the posterior says of rewards: of one response, and of the difference of two.

The mean is the implicit reward, μ_j = r̂(x,y_j); the width is a standard deviation, s_j = ‖ĝ(x,y_j)‖ in V⁻¹, with V of
the labelled pairs (arXiv 2505.19241, section 3).  What bandits that take a width for each response bound by s_i + s_j
is known exactly here: the width of r̂(x,y_i) − r̂(x,y_j) is ‖φ‖ in V⁻¹, φ = ĝ_i − ĝ_j.  It matters: with features of unit
length all s_j are equal before the first label, so that no pair could be told from another by their sum.

All of it is float32, as in `posterior`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from activedpo_jax.selection.greedy import divisible
from activedpo_jax.selection.posterior import TIE, prior_variances, variances


class Known(NamedTuple):
    """Numbers, and how well float32 knows them."""

    values: jax.Array  # float32
    tolerance: jax.Array  # float32, of the same shape: those closer than this to the best are tied with it


def pair_vectors(vectors: jax.Array) -> jax.Array:
    """φ of pairs: [N, D] itself, or the difference of the vectors of their two responses, [N, 2, D], in float32."""
    if vectors.ndim == 2:
        return vectors
    first, second = vectors[:, 0].astype(jnp.float32), vectors[:, 1].astype(jnp.float32)
    return first - second


def row_variances(vectors: jax.Array, posterior: jax.Array, lam: jax.Array | float, mesh: Mesh) -> Known:
    """vᵀV⁻¹v of every vector, 0 where float32 resolves none.

    Args:
      vectors: [N, ..., D] float32 or bfloat16, rows cut over all axes of the mesh; a padded copy is made of rows that
        the devices do not divide.
      posterior: W [n, D] float32; lam: λ.

    Returns:
      [N, ...].
    """

    def local(vectors: jax.Array, posterior: jax.Array, lam: jax.Array) -> Known:
        flat = vectors.reshape(-1, vectors.shape[-1])
        found, tolerance = variances(flat, posterior, lam), TIE * prior_variances(flat, lam)
        found = jnp.where((found <= tolerance) & jnp.isfinite(tolerance), 0.0, found)
        return Known(found.reshape(vectors.shape[:-1]), tolerance.reshape(vectors.shape[:-1]))

    rows = P(mesh.axis_names)
    by_rows = jax.shard_map(local, mesh=mesh, in_specs=(rows, P(), P()), out_specs=rows)
    (whole,) = divisible(mesh, vectors)
    found = by_rows(whole, posterior, jnp.asarray(lam, jnp.float32))
    return Known(*(x[: vectors.shape[0]] for x in found))


def widths(vectors: jax.Array, posterior: jax.Array, lam: jax.Array | float, mesh: Mesh) -> Known:
    """‖v‖ in V⁻¹: s_j of responses, or the joint width of pairs.  Arguments and shapes as in `row_variances`."""
    squares, tolerance = row_variances(vectors, posterior, lam, mesh)
    found = jnp.sqrt(squares)
    return Known(found, jnp.sqrt(squares + tolerance) - found)


def bounds(mean: jax.Array, width: jax.Array, scale: jax.Array | float) -> tuple[jax.Array, jax.Array]:
    """[μ − c s, μ + c s], c the scale."""
    return mean - scale * width, mean + scale * width
