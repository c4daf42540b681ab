"""Greedy selection from features that the devices cannot hold: they stay on the host, in memory or on disk.

These are the rounds of `greedy`, and its picks.  The host keeps what is known of the rows, three numbers each.  After
one pass over the features, only rows whose bounds come into reach are read again, a block at a time.
"""

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from activedpo_jax import layout
from activedpo_jax.selection.greedy import Picks, check
from activedpo_jax.selection.held import (
    Bar,
    Pace,
    Progress,
    Rows,
    append,
    begin,
    in_reach,
    paced,
    pick_among,
    up_to_date,
)
from activedpo_jax.selection.posterior import TIE, prior_variances, variances


def streamed(
    features: np.ndarray,
    available: np.ndarray,
    posterior: jax.Array | np.ndarray,
    lam: jax.Array | float,
    *,
    num_picks: int,
    block: int,
    mesh: Mesh,
) -> Picks:
    """Picks `num_picks` rows, those of `greedy`.

    Args:
      features: [N, D] float32 or bfloat16 (of `ml_dtypes`), φ of the pool's pairs; may be a `np.memmap`.
      available: [N] bool, rows that may be picked; the others may hold anything.
      posterior: W [n, D] float32 of the pairs labelled so far, from `posterior.condition`; n may be 0.
      lam: λ > 0.
      num_picks: K.
      block: rows that each device holds at a time; two blocks of features, and one in float32, have to fit.
      mesh: the rows of a block are cut over all of its axes.

    Returns:
      As `greedy`.

    Raises:
      ValueError: shapes or dtypes do not fit, or K or the block is less than 1.
    """
    check(features, available, posterior, num_picks, block)
    placed: tuple[jax.Array, jax.Array] = layout.put((posterior, np.float32(lam)), layout.replicated(mesh))
    posterior, lam = placed
    pool = _Pool(features, mesh, min(block, -(-len(features) // mesh.size)) * mesh.size)
    rows = pool.first_pass(available, posterior, lam)
    if not np.all(np.isfinite(rows.scores[available])):
        return Picks(jnp.full(num_picks, -1, jnp.int32), jnp.full(num_picks, jnp.nan, jnp.float32))
    limit = min(int(np.sum(available)), num_picks)
    progress, pace, made = begin(posterior, num_picks), Pace(), 0
    while made < limit:
        if pace.passes > 0:
            progress = pool.one_pass(progress, rows, lam)
            pace = pace._replace(futile=0, passes=pace.passes - 1)
        else:
            progress = pool.hold(progress, rows, limit, lam)
            due = np.sum(in_reach(rows, int(progress.made)))
            pace = jax.device_get(paced(pace, int(progress.made) > made, due, pool.held, len(features)))
        made = int(progress.made)
    return Picks(progress.rows, progress.scores)


class _Pool:
    """Features on the host, read a block for all devices at a time.  Rows are on the host, and changed in place."""

    def __init__(self, features: np.ndarray, mesh: Mesh, held: int) -> None:
        self.features, self.mesh, self.held = features, mesh, held

    def place(self, numbers: np.ndarray, *of_rows: np.ndarray) -> tuple[jax.Array, ...]:
        """These rows of the features, and of what belongs to the rows, on the devices; −1 makes up a block."""
        missing = self.held - len(numbers)

        def padded(x: np.ndarray) -> np.ndarray:
            return np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1), constant_values=-1) if missing else x

        sharding = NamedSharding(self.mesh, P(self.mesh.axis_names))
        return layout.put(tuple(padded(x[numbers]) for x in (self.features, *of_rows)), sharding)

    def blocks(self, values: np.ndarray) -> Iterator[np.ndarray]:
        """Row numbers, block by block; those blocks first that hold the largest values."""
        blocks = np.split(np.arange(len(values)), range(self.held, len(values), self.held))
        return iter(sorted(blocks, key=lambda numbers: -float(values[numbers].max())))

    def first_pass(self, available: np.ndarray, posterior: jax.Array, lam: jax.Array) -> Rows:
        scores, prior = np.zeros((2, len(self.features)), np.float32)
        work = (
            (n, variances_program(self.mesh, *self.place(n), posterior, lam))
            for n in self.blocks(available)
            if np.any(available[n])
        )
        for numbers, found in _one_ahead(work):
            scores[numbers], prior[numbers] = (x[: len(numbers)] for x in found)
        tolerance = np.where(available, np.float32(TIE) * prior, np.float32(0))
        return Rows(np.where(available, scores, np.float32(-np.inf)), tolerance, np.zeros(len(scores), np.int32))

    def hold(self, progress: Progress, rows: Rows, limit: int, lam: jax.Array) -> Progress:
        """Picks among the best rows, none or more."""
        best = np.argpartition(-rows.scores, min(self.held, len(rows.scores)) - 1)
        held = np.sort(best[: self.held])
        held = held[np.argsort(rows.ages[held], kind="stable")]
        bounds = rows.scores + rows.tolerance
        bounds[held] = -np.inf
        bar = Bar(jnp.float32(bounds.max()), jnp.int32(limit), lam)
        features, *some, numbers = self.place(held, *rows, np.arange(len(bounds), dtype=np.int32))
        progress, found = hold_program(self.mesh, features, Rows(*some), numbers, progress, bar)
        _store(rows, held, found)
        return progress

    def one_pass(self, progress: Progress, rows: Rows, lam: jax.Array) -> Progress:
        """Brings the blocks up to date that have a row within reach, and makes one pick."""
        made = int(progress.made)
        due = (n for n in self.blocks(rows.scores) if np.any(in_reach(rows, made)[n]))  # by what is known when asked
        work = ((n, refresh_program(self.mesh, *self.place(n, *rows), progress)) for n in due)
        for numbers, found in _one_ahead(work):
            _store(rows, numbers, found)
        scores = np.where(rows.ages == made, rows.scores, -np.inf)
        row = int(np.argmax(scores + rows.tolerance >= scores.max()))  # the first of the tied rows
        rows.scores[row] = -np.inf
        return _append(progress, jnp.int32(row), layout.put(np.asarray(self.features[row], np.float32)), lam)


def _store(rows: Rows, numbers: np.ndarray, found: Any) -> None:
    rows.scores[numbers], _, rows.ages[numbers] = (x[: len(numbers)] for x in layout.get(found))


def _one_ahead(work: Iterable[tuple[np.ndarray, Any]]) -> Iterator[tuple[np.ndarray, Any]]:
    """Each piece of work on the host, once the next has been started."""
    last = None
    for piece in work:
        if last is not None:
            yield last[0], layout.get(last[1])
        last = piece
    if last is not None:
        yield last[0], layout.get(last[1])


@functools.partial(jax.jit, static_argnums=0)
def variances_program(
    mesh: Mesh, features: jax.Array, posterior: jax.Array, lam: jax.Array
) -> tuple[jax.Array, jax.Array]:
    def local(features: jax.Array, posterior: jax.Array, lam: jax.Array) -> tuple[jax.Array, jax.Array]:
        return variances(features, posterior, lam), prior_variances(features, lam)

    rows = P(mesh.axis_names)
    return jax.shard_map(local, mesh=mesh, in_specs=(rows, P(), P()), out_specs=rows)(features, posterior, lam)


@functools.partial(jax.jit, static_argnums=0)
def refresh_program(
    mesh: Mesh, features: jax.Array, scores: jax.Array, tolerance: jax.Array, ages: jax.Array, progress: Progress
) -> Rows:
    rows = P(mesh.axis_names)
    local = jax.shard_map(up_to_date, mesh=mesh, in_specs=(rows, rows, P()), out_specs=rows)
    return local(features, Rows(scores, tolerance, ages), progress)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def hold_program(
    mesh: Mesh, features: jax.Array, some: Rows, numbers: jax.Array, progress: Progress, bar: Bar
) -> tuple[Progress, Rows]:
    def local(
        features: jax.Array, some: Rows, numbers: jax.Array, progress: Progress, bar: Bar
    ) -> tuple[Progress, Rows]:
        return pick_among(features.astype(jnp.float32), some, numbers, progress, bar, mesh.axis_names)

    rows = P(mesh.axis_names)
    in_specs, out_specs = (rows, rows, rows, P(), P()), (P(), rows)
    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs)(
        features, some, numbers, progress, bar
    )


_append = jax.jit(lambda *args: append(*args)[0], donate_argnums=0)
