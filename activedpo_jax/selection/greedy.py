"""Greedy D-optimal selection: K times, pick argmax φᵀV⁻¹φ and set V ← V + φφᵀ (arXiv 2505.19241, section 4).

That is greedy maximisation of log det V, which is pivoted Cholesky and the greedy MAP of a determinantal point process
(Chen, Zhang & Zhou 2018, arXiv 1709.05135).  The naive loop updates all N scores after every pick: K passes over the
pool.  But scores only fall, so stale ones are upper bounds (Minoux 1978).  Each device holds its `block` best rows by
what is known, brings them up to date, and the loop goes on among these alone, as long as their best beats every bound
outside; then the best rows by what is known now are held.  A row is looked at again only when its bound comes into
reach, and takes all the picks since the last time in one matrix product.  Where too many come into reach at once, all
are brought up to date in one pass, as in the naive loop.  The picks are those of the naive loop.

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
    Pace,
    Progress,
    Rows,
    append,
    begin,
    best_of,
    in_reach,
    lowest_tied,
    paced,
    pick_among,
    up_to_date,
)
from activedpo_jax.selection.posterior import TIE, prior_variances, rows_of, variances

# Rows that are held are copied to float32: no more than this share of the features' bytes, but a few at least.
_HELD, _FEW = 1 / 32, 16


class Picks(NamedTuple):
    """K rows of the pool in the order they were picked."""

    rows: jax.Array  # [K] int32; −1 where no row was left
    scores: jax.Array  # [K] float32, what the strategy ranked them by; 0 where no row was left
    fallback: jax.Array | bool = False  # scalar bool: there was nothing to rank by, and they are random


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
      features: [N, D] float32 or bfloat16, φ of the pool's pairs.  The arithmetic is float32.  If the devices do not
        divide N, a padded copy is made.
      available: [N] bool, rows that may be picked; the others may hold anything.
      posterior: W [n, D] float32 of the pairs labelled so far, from `posterior.condition`; n may be 0.
      lam: λ > 0, may be traced.
      num_picks: K.
      block: candidate rows that each device holds at most; changes the time taken, and the picks only where float32
        cannot tell scores apart.
      mesh: the rows are cut over all of its axes.

    Returns:
      Picks with rows −1 and score 0 at the end if fewer than K rows are available.  A score is φᵀV⁻¹φ at the time of
      the pick, 0 where float32 resolves none.  If a number that goes into the scores is not finite, all rows are −1 and
      all scores NaN.

    Raises:
      ValueError: shapes or dtypes do not fit, or K or the block is less than 1.
    """
    check(features, available, posterior, num_picks, block)
    axes = mesh.axis_names
    features, available = divisible(mesh, features, available)
    few = int(_HELD * features.shape[0] // mesh.size * features.dtype.itemsize / 4)
    block = min(block, max(few, _FEW), features.shape[0] // mesh.size)
    local = functools.partial(_greedy, num_picks=num_picks, block=block, axes=axes)
    rows, scores = jax.shard_map(local, mesh=mesh, in_specs=(P(axes), P(axes), P(), P()), out_specs=P())(
        features, available, posterior, jnp.asarray(lam, jnp.float32)
    )
    return Picks(rows, scores)


def divisible(mesh: Mesh, *arrays: jax.Array) -> list[jax.Array]:
    """The arrays, with rows of zeros at the end if the devices do not divide their rows: a copy then."""
    padding = -arrays[0].shape[0] % mesh.size
    return [jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)) if padding else x for x in arrays]


def check(features: Any, available: Any, posterior: Any, num_picks: int, block: int) -> None:
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

    def hold(progress: Progress, rows: Rows, pace: Pace) -> tuple[Progress, Rows, Pace]:
        """Picks among the best rows, none or more."""
        _, held = jax.lax.top_k(rows.scores, block)
        held = held[jnp.argsort(rows.ages[held])]
        outside = best_of((rows.scores + rows.tolerance).at[held].set(-jnp.inf), axes)
        some = jax.tree.map(lambda x: x[held], rows)
        made, bar = progress.made, Bar(outside, limit, lam)
        progress, some = pick_among(rows_of(features, held), some, numbers[held], progress, bar, axes)
        rows = jax.tree.map(lambda x, new: x.at[held].set(new), rows, some)
        due = jax.lax.psum(jnp.sum(in_reach(rows, progress.made, axes)), axes)
        return progress, rows, paced(pace, progress.made > made, due, block * devices, num_local * devices)

    def one_pass(progress: Progress, rows: Rows, pace: Pace) -> tuple[Progress, Rows, Pace]:
        """The naive loop's step: all scores exactly, and one pick."""
        rows = up_to_date(features, rows, progress)
        row = lowest_tied(rows, numbers, best_of(rows.scores, axes), axes)
        index = row - first_row
        mine = (index >= 0) & (index < num_local)
        phi = jnp.where(mine, rows_of(features, jnp.clip(index, 0, num_local - 1)), 0.0)
        progress, _ = append(progress, row, jax.lax.psum(phi, axes), lam)
        rows = rows._replace(scores=jnp.where(numbers == row, -jnp.inf, rows.scores))
        return progress, rows, pace._replace(futile=jnp.int32(0), passes=pace.passes - 1)

    def one_round(carry: tuple[Progress, Rows, Pace]) -> tuple[Progress, Rows, Pace]:
        return jax.lax.cond(carry[2].passes > 0, one_pass, hold, *carry)

    rows = Rows(jnp.where(available, scores, -jnp.inf), tolerance, jnp.zeros_like(numbers))
    start = (begin(posterior, num_picks), rows, jax.tree.map(jnp.int32, Pace()))
    progress, *_ = jax.lax.while_loop(lambda carry: carry[0].made < limit, one_round, start)
    return progress.rows, jnp.where(broken, jnp.nan, progress.scores)
