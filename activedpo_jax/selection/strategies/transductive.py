"""`transductive`: greedy in the fall of Σ φ_tᵀV⁻¹φ_t over the pairs t that the model will be asked about.

Transductive experimental design (Yu, Bi & Tresp 2006) on this project's features.  `activedpo` asks about what is least
known, though nothing else may depend on it; here a pick counts by what it says of others.  Adding φφᵀ to V lowers the
sum by Σ_t (φ_tᵀV⁻¹φ)²/(1 + φᵀV⁻¹φ).

The targets are the pairs that may be picked: a pool stands for the prompts that the model will serve.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from activedpo_jax.selection.greedy import Picks
from activedpo_jax.selection.held import best_of
from activedpo_jax.selection.one_by_one import Pool, Ranked, Row, Rule, one_by_one
from activedpo_jax.selection.posterior import HIGHEST, TIE, downdate, variances, widened, with_room
from activedpo_jax.selection.strategies.base import Evidence, Strategy, required
from activedpo_jax.selection.sums import sum_over_rows

_SHARE = 1 / 16  # of what it was: once the best fall is less, all are computed anew, since updates round by what was


class _State(NamedTuple):
    """What is known of the rows: [n] float32 each, and V⁻¹ = I/λ − WᵀW."""

    variances: jax.Array  # φᵀV⁻¹φ
    falls: jax.Array  # Σ_t (φ_tᵀV⁻¹φ)²
    first: jax.Array  # what the falls were before the first pick
    anew: jax.Array  # and when they were computed anew: their rounding is a share of both
    targets: jax.Array  # C = Σ_t φ_tφ_tᵀ, [D, D]
    w: jax.Array  # W `with_room`, whose rows to come are zero
    filled: jax.Array  # how many rows of W there are


def select(evidence: Evidence, available: jax.Array, key: jax.Array, num_picks: int, block: int, mesh: Mesh) -> Picks:
    """Scores are what each pick lowers the sum by.  Key and block are not used.

    Needs 3 D² numbers of memory beside the features on every device, and N·D² arithmetic at the start and each time the
    falls have become much smaller; a pick costs three passes over the features.
    """
    features, posterior, lam = required("transductive", evidence, "features", "posterior", "lam")

    def inverse(w: jax.Array, vectors: jax.Array) -> jax.Array:
        """V⁻¹v of vectors [..., D]."""
        return vectors / lam - _product(_product(vectors, w.T), w)

    def begin(pool: Pool, axes: tuple[str, ...]) -> _State:
        w = with_room(posterior, num_picks)
        targets = jax.lax.psum(sum_over_rows(lambda rows: _product(rows.T, rows), pool.vectors, pool.available), axes)
        falls = falls_of(pool, targets, w)
        known = variances(pool.vectors, posterior, lam)
        return _State(known, falls, falls, falls, targets, w, jnp.int32(len(posterior)))

    def falls_of(pool: Pool, targets: jax.Array, w: jax.Array) -> jax.Array:
        """φᵀV⁻¹CV⁻¹φ, with V⁻¹CV⁻¹ formed once."""
        both = inverse(w, inverse(w, targets).T)
        return jnp.maximum(widened(lambda rows: jnp.sum(_product(rows, both) * rows, axis=-1), pool.vectors), 0.0)

    def ranked(pool: Pool, state: _State, made: jax.Array) -> Ranked:
        gains = jnp.maximum(state.falls, 0.0) / (1 + state.variances)
        return Ranked(gains, 4 * TIE * jnp.sqrt(state.first * state.anew) / (1 + state.variances), gains)

    def picked(pool: Pool, state: _State, row: Row, axes: tuple[str, ...]) -> _State:
        w, _ = downdate(row.vector, state.w, state.filled, lam)  # V⁻¹ loses wwᵀ
        along = widened(lambda rows: _product(rows, w), pool.vectors)
        counted = jnp.where(pool.available, along, 0.0)
        sums = sum_over_rows(lambda rows, along: _product(along, rows), pool.vectors, pool.available, counted)
        moved = inverse(state.w, jax.lax.psum(sums, axes))  # V⁻¹C w
        back = widened(lambda rows: _product(rows, moved), pool.vectors)
        squares = jax.lax.psum(jnp.sum(jnp.square(counted)), axes)  # wᵀC w
        state = state._replace(
            variances=jnp.maximum(state.variances - jnp.square(along), 0.0),
            falls=state.falls - 2 * along * back + jnp.square(along) * squares,
            w=state.w.at[state.filled].set(w),
            filled=state.filled + 1,
        )
        best, was = (best_of(jnp.where(pool.available, x, 0.0), axes) for x in (state.falls, state.anew))
        falls = jax.lax.cond(best < _SHARE * was, lambda: falls_of(pool, state.targets, state.w), lambda: state.falls)
        return state._replace(falls=falls, anew=jnp.where(best < _SHARE * was, falls, state.anew))

    return one_by_one(Rule(begin, ranked, picked), features, (), available, num_picks, mesh)


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=HIGHEST)


STRATEGY = Strategy("transductive", select, frozenset({"features"}), design="features")
