"""`badge`: k-means++ seeding on the gradients that the pairs would give, if answered as π_θ expects (Ash et al. 2020).

arXiv 1906.03671.  A pair's gradient under DPO's loss is −β(1 − p) φ if the first response is preferred, p = σ(Δ), and
βp φ if the second is; β scales all alike.  The answer is drawn from p, where the paper takes the likelier one, which
before the first training is neither.  Large gradients are far from the others and so more likely picked, and a pick
makes those like it less likely: uncertainty and diversity without a weight between them.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from activedpo_jax.selection.greedy import Picks
from activedpo_jax.selection.nearest import squared_distances
from activedpo_jax.selection.one_by_one import Pool, Ranked, Row, Rule, one_by_one
from activedpo_jax.selection.strategies.base import Evidence, Strategy, required


def select(evidence: Evidence, available: jax.Array, key: jax.Array, num_picks: int, block: int, mesh: Mesh) -> Picks:
    """The first pick is uniform, each later one likely in proportion to its squared distance from the nearest before.

    Scores are these squared distances, of the first pick 0.  Labelled pairs are no centres, as in the paper.  Where all
    that is left has been picked already, in copies, the lowest rows come.
    """
    features, margins = required("badge", evidence, "features", "margins")
    rows = jnp.arange(available.shape[0], dtype=jnp.int32)
    answers, draws = jax.random.split(key)
    coins = jax.vmap(lambda row: jax.random.uniform(jax.random.fold_in(answers, row)))(rows)
    p = jnp.where(jnp.isfinite(margins), jax.nn.sigmoid(margins), jnp.nan)
    factors = jnp.where(coins < p, p - 1, p)

    def begin(pool: Pool, axes: tuple[str, ...]) -> jax.Array:
        return jnp.full(len(pool.numbers), jnp.inf)

    def ranked(pool: Pool, distances: jax.Array, made: jax.Array) -> Ranked:
        # The row with the largest log d² + Gumbel noise is drawn in proportion to d²; noise is each row's own.
        step = jax.random.fold_in(draws, made)
        noise = jax.vmap(lambda row: jax.random.gumbel(jax.random.fold_in(step, row)))(pool.numbers)
        sizes = jnp.where(made == 0, 1.0, distances)
        return Ranked(jnp.log(sizes) + noise, 0.0, jnp.where(made == 0, 0.0, distances))

    def picked(pool: Pool, distances: jax.Array, row: Row, axes: tuple[str, ...]) -> jax.Array:
        return jnp.minimum(distances, squared_distances(pool.vectors, pool.of_rows, row.of_row * row.vector))

    return one_by_one(Rule(begin, ranked, picked), features, factors, available, num_picks, mesh)


STRATEGY = Strategy("badge", select, frozenset({"features", "margins"}))
