"""The first K rows by keys or scores that do not change from pick to pick; the same on any mesh."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from activedpo_jax.selection.greedy import Picks


def first(keys: Sequence[jax.Array], scores: jax.Array, available: jax.Array, num_picks: int) -> Picks:
    """The K rows that come first, lowest keys first.

    Args:
      keys: [N] each; a later key orders rows that are equal in the earlier ones, and at last the row number does.
      scores: [N] float32, to be reported.
      available: [N] bool, rows that may be picked; the others may hold anything.
      num_picks: K, static.

    Returns:
      Picks with rows −1 and score 0 at the end if fewer than K rows are available.  If a key or the score of an
      available row is not finite, all rows are −1 and all scores NaN.
    """
    rows = jnp.arange(available.shape[0], dtype=jnp.int32)
    *_, order, sorted_scores = jax.lax.sort((~available, *keys, rows, scores), num_keys=2 + len(keys))
    missing = (0, max(0, num_picks - rows.size))
    filled = jnp.arange(num_picks) < jnp.sum(available)
    found = jnp.where(filled, jnp.pad(order[:num_picks], missing), -1)
    found_scores = jnp.where(filled, jnp.pad(sorted_scores[:num_picks], missing), 0.0)
    return unless_broken(Picks(found, found_scores), _broken(available, *keys, scores))


def largest(scores: jax.Array, tolerance: jax.Array, available: jax.Array, num_picks: int) -> Picks:
    """The K rows with the largest scores, one after the other, where scores are known to a tolerance.

    Args:
      scores: [N] float32.
      tolerance: [N] float32.  Each pick is the lowest of the rows whose scores are no further than this below the
        largest one left, as in `greedy`, so that equal rows are tied however their scores were rounded.
      available, num_picks: as in `first`.

    Returns:
      As in `first`.
    """

    def pick(rest: jax.Array, _: None) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        tied = rest & (scores + tolerance >= jnp.max(jnp.where(rest, scores, -jnp.inf)))
        row = jnp.argmax(tied)  # the first of the tied rows
        found = (jnp.where(tied[row], row, -1).astype(jnp.int32), jnp.where(tied[row], scores[row], 0.0))
        return rest.at[row].set(False), found

    _, picks = jax.lax.scan(pick, available, length=num_picks)
    return unless_broken(Picks(*picks), _broken(available, scores))


def draw(available: jax.Array, key: jax.Array, num_picks: int) -> Picks:
    """K rows in random order, with score 0.

    Every row draws a ticket from the key and its own number, and the lowest tickets win.  So the picks do not depend on
    how many rows follow: padding the pool to a multiple of the devices changes nothing.
    """
    count = available.shape[0]
    return first((tickets(key, count),), jnp.zeros(count, jnp.float32), available, num_picks)


def tickets(key: jax.Array, count: int) -> jax.Array:
    """A random number for each of N rows, which depends on the key and the row alone: [N] uint32."""
    rows = jnp.arange(count, dtype=jnp.int32)
    return jax.vmap(lambda row: jax.random.bits(jax.random.fold_in(key, row)))(rows)


def instead(fall_back: jax.Array, drawn: Picks, picks: Picks) -> Picks:
    """The picks, or those drawn, marked as a fallback."""
    rows = jnp.where(fall_back, drawn.rows, picks.rows)
    return Picks(rows, jnp.where(fall_back, drawn.scores, picks.scores), fall_back | picks.fallback)


def _broken(available: jax.Array, *evidence: jax.Array) -> jax.Array:
    return jnp.any(jnp.stack([jnp.any(available & ~jnp.isfinite(x)) for x in evidence]))


def unless_broken(picks: Picks, broken: jax.Array) -> Picks:
    """The picks; rows −1 and scores NaN where evidence is not finite."""
    return picks._replace(rows=jnp.where(broken, -1, picks.rows), scores=jnp.where(broken, jnp.nan, picks.scores))
