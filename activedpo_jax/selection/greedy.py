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

from activedpo_jax.selection.held import (
    Bar,
    Progress,
    Rows,
    append,
    begin,
    best_of,
    lowest_tied,
    pick_among,
    up_to_date,
)
from activedpo_jax.selection.posterior import TIE, prior_variances, variances

# Rows that are held are copied to float32: no more than this share of the features' bytes, but a few at least.
_HELD, _FEW = 1 / 32, 16

# A pass over the pool is cheaper than bringing this share of it up to date in blocks.
_DEAR = 8

# Passes, a pick each as in the naive loop, once holding rows has not paid.  Doubled each time in a row that it does not,
# so that pools where every pick changes every score cost no more than the naive loop.
_PATIENCE = 4


class Picks(NamedTuple):
    """K rows of the pool in the order they were picked."""

    rows: jax.Array  # [K] int32; −1 where no row was left
    scores: jax.Array  # [K] float32, what the strategy ranked them by; 0 where no row was left
    fallback: jax.Array | bool = False  # scalar bool: there was nothing to rank by, and they are random


class _Pool(NamedTuple):
    """What a round leaves to the next."""

    rows: Rows  # of this device's part of the pool
    futile: jax.Array  # rounds of holding since the last pick
    passes: jax.Array  # passes over the pool, a pick each, before rows are held again
    patience: jax.Array  # how many passes there will be the next time that holding does not pay


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
    few = int(_HELD * features.shape[0] // mesh.size * features.dtype.itemsize / 4)
    block = min(block, max(few, _FEW), features.shape[0] // mesh.size)
    local = functools.partial(_greedy, num_picks=num_picks, block=block, axes=axes)
    rows, scores = jax.shard_map(local, mesh=mesh, in_specs=(P(axes), P(axes), P(), P()), out_specs=P())(
        features, available, posterior, jnp.asarray(lam, jnp.float32)
    )
    return Picks(rows, scores)


def _check(features: Any, available: Any, posterior: Any, num_picks: int, block: int) -> None:
    if features.ndim != 2 or features.shape[0] < 1 or features.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(
            f"greedy: features must be [N, D] float32 or bfloat16, N ≥ 1; got {features.shape} {features.dtype}"
        )
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
    numbers = first_row + jnp.arange(num_local, dtype=jnp.int32)  # pool rows of the local ones
    scores = variances(features, posterior, lam)
    tolerance = jnp.where(available, TIE * prior_variances(features, lam), 0.0)

    # NaN compares as neither larger nor smaller, and only on some platforms, so no pick is made at all.
    broken = jax.lax.psum(jnp.sum(available & ~jnp.isfinite(scores)), axes) > 0
    limit = jnp.minimum(jax.lax.psum(jnp.sum(available), axes), num_picks)
    limit = jnp.where(broken, 0, limit)
    devices = jax.lax.axis_size(axes)

    def hold(progress: Progress, pool: _Pool) -> tuple[Progress, _Pool]:
        """Picks among the best rows, none or more."""
        rows = pool.rows
        _, held = jax.lax.top_k(rows.scores, block)
        outside = best_of((rows.scores + rows.tolerance).at[held].set(-jnp.inf), axes)
        made = progress.made
        progress, some = pick_among(
            features[held].astype(jnp.float32),
            jax.tree.map(lambda x: x[held], rows),
            numbers[held],
            progress,
            Bar(outside, limit, lam),
            axes,
        )
        rows = jax.tree.map(lambda x, new: x.at[held].set(new), rows, some)
        # Without a pick, every stale row within reach of the best one has to be brought up to date first, in more
        # rounds like this or in a pass.  If there is none such, ties are wider than the block.
        stale = rows.ages < progress.made
        best = best_of(jnp.where(stale, -jnp.inf, rows.scores), axes)
        due = jax.lax.psum(jnp.sum(stale & (rows.scores + rows.tolerance >= best)), axes)
        futile = jnp.where(progress.made > made, 0, pool.futile + 1)
        dear = (due == 0) | (due + futile * block * devices > num_local * devices // _DEAR)
        passes = jnp.where((futile > 0) & dear, pool.patience, 0)
        patience = jnp.where(passes > 0, 2 * pool.patience, jnp.where(futile > 0, pool.patience, _PATIENCE))
        return progress, _Pool(rows, futile, passes, patience)

    def one_pass(progress: Progress, pool: _Pool) -> tuple[Progress, _Pool]:
        """The naive loop's step: all scores exactly, and one pick."""
        rows = up_to_date(features, pool.rows, progress)
        row = lowest_tied(rows, numbers, best_of(rows.scores, axes), axes)
        index = row - first_row
        mine = (index >= 0) & (index < num_local)
        phi = features[jnp.clip(index, 0, num_local - 1)].astype(jnp.float32)
        progress, _ = append(progress, row, jax.lax.psum(jnp.where(mine, phi, 0.0), axes), lam)
        rows = rows._replace(scores=jnp.where(numbers == row, -jnp.inf, rows.scores))
        return progress, _Pool(rows, jnp.int32(0), pool.passes - 1, pool.patience)

    def one_round(carry: tuple[Progress, _Pool]) -> tuple[Progress, _Pool]:
        return jax.lax.cond(carry[1].passes > 0, one_pass, hold, *carry)

    rows = Rows(jnp.where(available, scores, -jnp.inf), tolerance, jnp.zeros_like(numbers))
    pool = _Pool(rows, jnp.int32(0), jnp.int32(0), jnp.int32(_PATIENCE))
    progress, _ = jax.lax.while_loop(
        lambda carry: carry[0].made < limit, one_round, (begin(posterior, num_picks), pool)
    )
    return progress.rows, jnp.where(broken, jnp.nan, progress.scores)
