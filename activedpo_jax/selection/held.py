"""The loop of greedy selection among a few rows: shared by `greedy` and `streamed`.

Both hold the rows that are best by what is known of the pool, bring them up to date, and pick among these alone while
their best beats everything else.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from activedpo_jax.selection.posterior import downdate, explained, explained_since, with_room

NO_ROW = jnp.iinfo(jnp.int32).max

# A pass over the pool is cheaper than bringing this share of it up to date a block at a time.
_DEAR = 1 / 8

# Parts of the held rows that are brought up to date one after the other, each from its oldest on.
_PARTS = 4

# Passes, with a pick each as in the naive loop, once holding rows has not paid; twice as many each further time.  So a
# pool where every pick changes every score costs no more than the naive loop.
_PATIENCE = 8


class Progress(NamedTuple):
    """What has been picked, the same on every device."""

    made: jax.Array  # number of picks so far
    rows: jax.Array  # [K] int32, −1 for those to come
    scores: jax.Array  # [K] float32, 0 for those to come
    known: jax.Array  # n, the number of labelled pairs
    w: jax.Array  # W `with_room`: the n rows of the labelled pairs, then one of each pick


class Rows(NamedTuple):
    """What is known of rows of the pool, [n] each: `jax.Array`, or `np.ndarray` where `streamed` keeps them."""

    scores: Any  # float32, variances after `ages` picks, so upper bounds now; −∞: not to be picked
    tolerance: Any  # float32, how well the scores are known
    ages: Any  # int32


class Bar(NamedTuple):
    """What a pick among held rows has to pass."""

    outside: jax.Array  # float32, the most that a row which is not held can have
    limit: jax.Array  # int32, picks to be made in all
    lam: jax.Array  # λ


class Pace(NamedTuple):
    """Whether rows are held, or the next pick is made after a pass over the pool."""

    futile: jax.Array | int = 0  # times that rows were held since the last pick
    passes: jax.Array | int = 0  # picks to be made with a pass each, before rows are held again
    patience: jax.Array | int = _PATIENCE  # how many there will be the next time that holding does not pay


def begin(posterior: jax.Array, num_picks: int) -> Progress:
    """Nothing picked, after the labelled pairs of W [n, D]."""
    rows, scores = jnp.full(num_picks, -1, jnp.int32), jnp.zeros(num_picks, jnp.float32)
    return Progress(jnp.int32(0), rows, scores, jnp.int32(posterior.shape[0]), with_room(posterior, num_picks))


def append(progress: Progress, row: jax.Array, phi: jax.Array, lam: jax.Array) -> tuple[Progress, jax.Array]:
    """Records a pick, φ [D] float32; returns its row of W too."""
    made, rows, scores, known, w = progress
    new, score = downdate(phi, w, known + made, lam)  # the same numbers on every device and every mesh
    w = w.at[known + made].set(new)
    return Progress(made + 1, rows.at[made].set(row), scores.at[made].set(score), known, w), new


def lowered(scores: jax.Array, reduction: jax.Array) -> jax.Array:
    return jnp.where(scores < 0, -jnp.inf, jnp.maximum(scores - reduction, 0.0))  # −∞ stays, whatever the row holds


def up_to_date(features: jax.Array, rows: Rows, progress: Progress, parts: int = 1) -> Rows:
    """The rows, of these features [n, D] float32 or bfloat16, with scores that have seen all picks."""
    end = progress.known + progress.made
    first = jnp.where(rows.scores < 0, end, progress.known + rows.ages)
    scores = lowered(rows.scores, explained_since(features, progress.w, first, end, parts))
    return Rows(scores, rows.tolerance, jnp.full_like(rows.ages, progress.made))


def best_of(scores: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return jax.lax.pmax(jnp.max(scores), axes)


def lowest_tied(rows: Rows, numbers: jax.Array, best: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """The lowest of the numbers of the rows that are no further below the best than their scores are known."""
    tied = rows.scores + rows.tolerance >= best
    return jax.lax.pmin(jnp.min(jnp.where(tied, numbers, NO_ROW)), axes)


def pick_among(
    features: jax.Array, rows: Rows, numbers: jax.Array, progress: Progress, bar: Bar, axes: tuple[str, ...]
) -> tuple[Progress, Rows]:
    """Picks among the rows of all devices for as long as their best is above the bar.

    Args:
      features: [b, D] float32, those of the rows that this device holds, in rising order of their ages: then a part
        that has seen most picks is not computed from the first one on for the sake of another.
      numbers: [b] int32, which rows of the pool they are.

    Returns:
      The progress, and the rows as of now; those picked have score −∞.
    """

    def unfinished(carry: tuple[Progress, jax.Array, jax.Array]) -> jax.Array:
        progress, _, best = carry
        return (progress.made < bar.limit) & (best > bar.outside)

    def one_pick(carry: tuple[Progress, jax.Array, jax.Array]) -> tuple[Progress, jax.Array, jax.Array]:
        progress, scores, best = carry
        row = lowest_tied(rows._replace(scores=scores), numbers, best, axes)
        mine = numbers == row
        phi = jax.lax.psum(jnp.where(jnp.any(mine), features[jnp.argmax(mine)], 0.0), axes)
        progress, w = append(progress, row, phi, bar.lam)
        scores = jnp.where(mine, -jnp.inf, lowered(scores, explained(features, w[None])))
        return progress, scores, best_of(scores, axes)

    rows = up_to_date(features, rows, progress, _PARTS)
    progress, scores, _ = jax.lax.while_loop(unfinished, one_pick, (progress, rows.scores, best_of(rows.scores, axes)))
    return progress, Rows(scores, rows.tolerance, jnp.full_like(rows.ages, progress.made))


def in_reach(rows: Rows, made: jax.Array | int, axes: tuple[str, ...] = ()) -> jax.Array:
    """The stale rows [n] that may be as good as the best of those up to date, so that no pick is sure before."""
    stale = rows.ages < made
    best = jnp.max(jnp.where(stale, -jnp.inf, rows.scores))
    return stale & (rows.scores + rows.tolerance >= (jax.lax.pmax(best, axes) if axes else best))


def paced(pace: Pace, picked: jax.Array | bool, due: jax.Array | int, held: int, count: int) -> Pace:
    """What to do after rows were held.

    Args:
      picked: a pick was made.
      due: how many rows are `in_reach`.  Without a pick these come next, and if there is none, ties are wider than
        the block.
      held: the number of rows held, of `count` in the pool, on all devices.
    """
    futile = jnp.where(picked, 0, pace.futile + 1)
    dear = (futile > 0) & ((due == 0) | (due + futile * held > _DEAR * count))
    passes = jnp.where(dear, pace.patience, 0)
    return Pace(futile, passes, jnp.where(dear, 2 * pace.patience, jnp.where(picked, _PATIENCE, pace.patience)))
