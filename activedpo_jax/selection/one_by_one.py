"""Picks made one at a time, each changing what is known of all rows: strategies that `greedy`'s bounds do not fit.

The rows of the pool are cut over all devices, and every pick costs a pass over them.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from activedpo_jax.selection.greedy import Picks, divisible
from activedpo_jax.selection.held import NO_ROW, best_of
from activedpo_jax.selection.posterior import rows_of, widened

State = Any  # a pytree


class Pool(NamedTuple):
    """The rows of one device, or all of them."""

    vectors: jax.Array  # [n, D] float32 or bfloat16
    of_rows: Any  # a pytree of [n], what else is known of them
    available: jax.Array  # [n] bool
    numbers: jax.Array  # [n] int32, which rows of the pool these are


class Row(NamedTuple):
    """The row that was picked; zeros where none was left."""

    vector: jax.Array  # [D] float32
    of_row: Any  # a pytree of scalars


class Ranked(NamedTuple):
    """By what the next row is picked; rows closer to the best than the tolerance are tied, and the lowest is picked."""

    keys: jax.Array  # [n] float32
    tolerance: jax.Array | float  # [n] float32
    scores: jax.Array  # [n] float32, to be reported


class Rule(NamedTuple):
    """How picks are made; functions of one device's rows, which the axes of the mesh connect."""

    begin: Callable[[Pool, tuple[str, ...]], State]  # what is known before the first pick
    ranked: Callable[[Pool, State, jax.Array], Ranked]  # …, the number of picks made
    picked: Callable[[Pool, State, Row, tuple[str, ...]], State]  # after this row


def one_by_one(rule: Rule, vectors: jax.Array, of_rows: Any, available: jax.Array, num_picks: int, mesh: Mesh) -> Picks:
    """K rows.

    Args:
      vectors: [N, D] float32 or bfloat16; of_rows: a pytree of [N], what else is known of the rows.
      available, num_picks, mesh: as strategies see them.

    Returns:
      As a strategy does.
    """
    axes = mesh.axis_names
    finite = jnp.ones_like(available)
    for leaf in jax.tree.leaves(of_rows):
        finite &= jnp.isfinite(leaf)
    vectors, available, finite, *leaves = divisible(mesh, vectors, available, finite, *jax.tree.leaves(of_rows))
    of_rows = jax.tree.unflatten(jax.tree.structure(of_rows), leaves)
    local = functools.partial(_local, rule, num_picks, axes)
    cut = P(axes)
    # Unchecked: what begins the same on every device may differ afterwards, and picks are the same by construction.
    rows, scores = jax.shard_map(local, mesh=mesh, in_specs=(cut, cut, cut, cut), out_specs=P(), check_vma=False)(
        vectors, of_rows, available, finite
    )
    return Picks(rows, scores)


def _local(
    rule: Rule,
    num_picks: int,
    axes: tuple[str, ...],
    vectors: jax.Array,
    of_rows: Any,
    available: jax.Array,
    finite: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    count = len(vectors)
    first = jax.lax.axis_index(axes) * count
    pool = Pool(vectors, of_rows, available, first + jnp.arange(count, dtype=jnp.int32))
    # NaN and ∞ survive the sum of a row's sizes, and nothing else makes it infinite.
    finite &= jnp.isfinite(widened(lambda rows: jnp.sum(jnp.abs(rows), axis=1), vectors))
    broken = jax.lax.psum(jnp.sum(available & ~finite), axes) > 0

    def one(carry: tuple[State, jax.Array], made: jax.Array) -> tuple[tuple[State, jax.Array], Any]:
        state, left = carry
        found = rule.ranked(pool, state, made)
        keys = jnp.where(left, found.keys, -jnp.inf)
        tied = left & (keys + found.tolerance >= best_of(keys, axes))
        row = jax.lax.pmin(jnp.min(jnp.where(tied, pool.numbers, NO_ROW)), axes)
        mine = (row >= first) & (row < first + count)
        place = jnp.clip(row - first, 0, count - 1)
        here, place = jax.lax.optimization_barrier((vectors, place))  # else XLA copies all rows before the loop
        own = Row(rows_of(here, place), jax.tree.map(lambda x: x[place], of_rows))
        own, score = jax.tree.map(
            lambda x: jax.lax.psum(jnp.where(mine, x, jnp.zeros_like(x)), axes), (own, found.scores[place])
        )
        state, there = rule.picked(pool, state, own, axes), row < NO_ROW
        return (state, left & (pool.numbers != row)), (jnp.where(there, row, -1), jnp.where(there, score, 0.0))

    start = (rule.begin(pool, axes), available & ~broken)
    _, (rows, scores) = jax.lax.scan(one, start, jnp.arange(num_picks, dtype=jnp.int32))
    return rows, jnp.where(broken, jnp.nan, scores)
