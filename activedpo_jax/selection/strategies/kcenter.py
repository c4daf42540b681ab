"""`kcenter`: farthest-first traversal on embeddings, a 2-approximation of the best k centres (Sener & Savarese 2018).

arXiv 1708.00489, algorithm 1: each pick is the pair that is farthest, in Euclidean distance, from all that are labelled
or picked.  Before the first label the origin, where two responses are alike, stands for them.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from activedpo_jax.selection.greedy import Picks
from activedpo_jax.selection.nearest import squared_distances
from activedpo_jax.selection.one_by_one import Pool, Ranked, Row, Rule, one_by_one
from activedpo_jax.selection.posterior import TIE
from activedpo_jax.selection.strategies.base import Evidence, Strategy, required


def select(evidence: Evidence, available: jax.Array, key: jax.Array, num_picks: int, block: int, mesh: Mesh) -> Picks:
    """Scores are distances.  Key and block are not used."""
    embeddings, known, counts = required("kcenter", evidence, "embeddings", "known", "counts")

    def nearer(pool: Pool, distances: jax.Array | float, centre: jax.Array) -> jax.Array:
        own = squared_distances(pool.vectors, jnp.ones(len(pool.numbers)), centre)
        return jnp.minimum(distances, own)

    def begin(pool: Pool, axes: tuple[str, ...]) -> jax.Array:
        start = jnp.where(jnp.any(counts), jnp.inf, nearer(pool, jnp.inf, jnp.zeros(known.shape[1])))

        def add(distances: jax.Array, labelled: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            centre, there = labelled
            return jnp.where(there, nearer(pool, distances, centre.astype(jnp.float32)), distances), None

        return jax.lax.scan(add, start, (known, counts))[0]

    def ranked(pool: Pool, distances: jax.Array, made: jax.Array) -> Ranked:
        return Ranked(distances, TIE * distances, jnp.sqrt(distances))

    def picked(pool: Pool, distances: jax.Array, row: Row, axes: tuple[str, ...]) -> jax.Array:
        return nearer(pool, distances, row.vector)

    return one_by_one(Rule(begin, ranked, picked), embeddings, (), available, num_picks, mesh)


STRATEGY = Strategy("kcenter", select, frozenset({"embeddings"}), design="embeddings")
