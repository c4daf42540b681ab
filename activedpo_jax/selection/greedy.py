"""Greedy D-optimal selection: K times, pick argmax φᵀV⁻¹φ and set V ← V + φφᵀ (arXiv 2505.19241, section 4).

That is greedy maximisation of log det V, which is pivoted Cholesky and the greedy MAP of a determinantal point process
(Chen, Zhang & Zhou 2018, arXiv 1709.05135).  The naive loop updates all N scores after every pick: K passes over the
pool.  But scores only fall, so stale ones are upper bounds (Minoux 1978), and the loop can be run in blocks.  One
refresh of all scores gives each device its `block` best rows; the loop continues among these alone, with exact scores,
as long as their best beats every stale score outside; then one matrix product brings all scores up to date.  The
picks are those of the naive loop.

The rows of the pool are cut over all devices.  Each keeps its own block, W is replicated, and a pick exchanges two
numbers and the picked row.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from activedpo_jax.selection.posterior import TIE, downdate, explained, prior_variances, variances

# Rows of W per matrix product in a refresh.  A refresh is memory-bound up to about this number.  Where one is due
# after every pick, as in a pool of ties only, this keeps its cost close to the naive loop's.
_REFRESH_TILE = 16

_NO_ROW = jnp.iinfo(jnp.int32).max


class Picks(NamedTuple):
    """K rows of the pool in the order they were picked."""

    rows: jax.Array  # [K] int32; −1 where no row was left
    scores: jax.Array  # [K] float32, what the strategy ranked them by; 0 where no row was left
    fallback: jax.Array | bool = False  # scalar bool: there was nothing to rank by, and they are random


class _State(NamedTuple):
    made: jax.Array  # number of picks so far
    rows: jax.Array  # [K] int32
    scores: jax.Array  # [K] float32
    new: jax.Array  # [K rounded up, D]: the rows that the picks append to W; zero for those still to come


@functools.partial(jax.jit, static_argnames=("num_picks", "block", "mesh"))
def greedy(
    features: jax.Array,
    available: jax.Array,
    posterior: jax.Array,
    lam: jax.Array | float,
    *,
    num_picks: int,
    block: int,
    mesh: Mesh,
) -> Picks:
    """Picks `num_picks` rows; ties go to the lowest row.  The same on any mesh.

    Args:
      features: [N, D] float32, φ of the pool's pairs.  If the devices do not divide N, a padded copy is made.
      available: [N] bool, rows that may be picked; the others may hold anything.
      posterior: W [n, D] float32 of the pairs labelled so far, from `posterior.condition`; n may be 0.
      lam: λ > 0, may be traced.
      num_picks: K.
      block: candidate rows that each device holds; changes the time taken, never the picks.
      mesh: the rows are cut over all of its axes.

    Returns:
      Picks with rows −1 and score 0 at the end if fewer than K rows are available.  A score is φᵀV⁻¹φ at the time of
      the pick, 0 where float32 resolves none.  If a number that goes into the scores is not finite, all rows are −1 and
      all scores NaN.

    Raises:
      ValueError: shapes or dtypes do not fit, or K or the block is less than 1.
    """
    _check(features, available, posterior, num_picks, block)
    axes = mesh.axis_names
    padding = -features.shape[0] % mesh.size
    if padding:
        features = jnp.pad(features, ((0, padding), (0, 0)))
        available = jnp.pad(available, (0, padding))
    block = min(block, features.shape[0] // mesh.size)
    local = functools.partial(_greedy, num_picks=num_picks, block=block, axes=axes)
    rows, scores = jax.shard_map(local, mesh=mesh, in_specs=(P(axes), P(axes), P(), P()), out_specs=P())(
        features, available, posterior, jnp.asarray(lam, jnp.float32)
    )
    return Picks(rows, scores)


def _check(features: Any, available: Any, posterior: Any, num_picks: int, block: int) -> None:
    if features.ndim != 2 or features.shape[0] < 1 or features.dtype != jnp.float32:
        raise ValueError(f"greedy: features must be [N, D] float32, N ≥ 1; got {features.shape} {features.dtype}")
    if available.shape != features.shape[:1] or available.dtype != jnp.bool_:
        raise ValueError(
            f"greedy: available must be [{features.shape[0]}] bool, one per row of features; "
            f"got {available.shape} {available.dtype}"
        )
    if posterior.shape[1:] != features.shape[1:] or posterior.dtype != jnp.float32:
        raise ValueError(
            f"greedy: posterior must be [n, {features.shape[1]}] float32, of the same D as features; "
            f"got {posterior.shape} {posterior.dtype}"
        )
    if num_picks < 1 or block < 1:
        raise ValueError(f"greedy: num_picks and block must be at least 1; got {num_picks} and {block}")


def _greedy(
    features: jax.Array,
    available: jax.Array,
    posterior: jax.Array,
    lam: jax.Array,
    *,
    num_picks: int,
    block: int,
    axes: tuple[str, ...],
) -> tuple[jax.Array, jax.Array]:
    """One device's part, with its rows of features [N/devices, D] and available [N/devices]: rows and scores of the
    picks, [K] each."""
    num_local = features.shape[0]
    first_row = jax.lax.axis_index(axes) * num_local
    rows = first_row + jnp.arange(num_local, dtype=jnp.int32)  # pool rows of the local ones
    scores = variances(features, posterior, lam)
    tolerance = jnp.where(available, TIE * prior_variances(features, lam), 0.0)

    # NaN compares as neither larger nor smaller, and only on some platforms, so no pick is made at all.
    broken = jax.lax.psum(jnp.sum(available & ~jnp.isfinite(scores)), axes) > 0
    limit = jnp.minimum(jax.lax.psum(jnp.sum(available), axes), num_picks)
    limit = jnp.where(broken, 0, limit)
    scores = jnp.where(available, scores, -jnp.inf)

    def best_of(scores: jax.Array) -> jax.Array:
        return jax.lax.pmax(jnp.max(scores), axes)

    def lowest_tied(best: jax.Array, scores: jax.Array, tolerance: jax.Array, rows: jax.Array) -> jax.Array:
        tied = scores + tolerance >= best
        return jax.lax.pmin(jnp.min(jnp.where(tied, rows, _NO_ROW)), axes)

    def append(state: _State, row: jax.Array) -> tuple[_State, jax.Array]:
        """Records a pick; returns its row of W."""
        index = row - first_row
        mine = (index >= 0) & (index < num_local)
        phi = jax.lax.psum(jnp.where(mine, features[jnp.clip(index, 0, num_local - 1)], 0.0), axes)
        # From φ and W, which are the same numbers on every device and every mesh.
        w, score = downdate(phi, (posterior, state.new), lam)
        k = state.made
        return _State(k + 1, state.rows.at[k].set(row), state.scores.at[k].set(score), state.new.at[k].set(w)), w

    def lowered(scores: jax.Array, reduction: jax.Array) -> jax.Array:
        return jnp.where(scores < 0, -jnp.inf, jnp.maximum(scores - reduction, 0.0))  # −∞: not available, and stays so

    def one_block(carry: tuple[_State, jax.Array]) -> tuple[_State, jax.Array]:
        state, scores = carry
        start = state.made
        # The first pick is made among all rows, whose scores are exact now: there is always progress, and ties that
        # spread beyond the blocks are seen.
        row = lowest_tied(best_of(scores), scores, tolerance, rows)
        state, w = append(state, row)

        _, held = jax.lax.top_k(scores, block)
        held_features, held_rows, held_tolerance = features[held], rows[held], tolerance[held]
        outside = best_of((scores + tolerance).at[held].set(-jnp.inf))

        def after(held_scores: jax.Array, row: jax.Array, w: jax.Array) -> jax.Array:
            return jnp.where(held_rows == row, -jnp.inf, lowered(held_scores, explained(held_features, w[None])))

        def unfinished(carry: tuple[_State, jax.Array, jax.Array]) -> jax.Array:
            state, _, best = carry
            return (state.made < limit) & (best > outside)

        def one_pick(carry: tuple[_State, jax.Array, jax.Array]) -> tuple[_State, jax.Array, jax.Array]:
            state, held_scores, best = carry
            row = lowest_tied(best, held_scores, held_tolerance, held_rows)
            state, w = append(state, row)
            held_scores = after(held_scores, row, w)
            return state, held_scores, best_of(held_scores)

        held_scores = after(scores[held], row, w)
        state, _, _ = jax.lax.while_loop(unfinished, one_pick, (state, held_scores, best_of(held_scores)))

        def refresh() -> jax.Array:
            fresh = jnp.where((jnp.arange(capacity) >= start)[:, None], state.new, 0.0)

            def tile(k: jax.Array, reduction: jax.Array) -> jax.Array:
                part = jax.lax.dynamic_slice_in_dim(fresh, k * _REFRESH_TILE, _REFRESH_TILE)
                return reduction + explained(features, part)

            first, end = start // _REFRESH_TILE, -(-state.made // _REFRESH_TILE)
            reduction = jax.lax.fori_loop(first, end, tile, jnp.zeros_like(scores))
            picked = state.rows - first_row
            picked = jnp.where((picked >= 0) & (picked < num_local), picked, num_local)
            return lowered(scores, reduction).at[picked].set(-jnp.inf, mode="drop")

        return state, jax.lax.cond(state.made < limit, refresh, lambda: scores)

    no_scores = jnp.where(broken, jnp.nan, jnp.zeros(num_picks, jnp.float32))
    capacity = -(-num_picks // _REFRESH_TILE) * _REFRESH_TILE
    no_new = jnp.zeros((capacity, features.shape[1]), jnp.float32)
    state = _State(jnp.int32(0), jnp.full(num_picks, -1, jnp.int32), no_scores, no_new)
    state, _ = jax.lax.while_loop(lambda carry: carry[0].made < limit, one_block, (state, scores))
    return state.rows, state.scores
