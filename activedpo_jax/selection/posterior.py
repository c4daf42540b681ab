"""The posterior over the reward: V = λI + Σ φφᵀ over labelled pairs (arXiv 2505.19241, section 3), as V⁻¹ = I/λ − WᵀW.

Neither V nor V⁻¹, which are D × D, is ever formed.  W has one row per labelled pair, so that everything here costs a
product with n rows instead of D.  All of it is float32 with full-precision products: V⁻¹ is a difference of nearly
equal terms, and the TF32 or bfloat16 passes that accelerators use by default would leave nothing of it.

Features may be stored in bfloat16.  The arithmetic is float32 all the same, of the rounded numbers, and rows are
widened a few at a time, where they are used.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

HIGHEST = jax.lax.Precision.HIGHEST

# Rows of W per product with many features, where many rows are due; and where few are.  A product with the pool is
# bound by memory up to about the lower number, by arithmetic from about the higher.
_WIDE, _NARROW = 64, 16

# Bytes of the rows that are widened to float32 at a time: they stay in a CPU's cache between two uses.
_WIDENED = 2**23

# A variance is known to ± TIE ‖φ‖²/λ.  Two rows whose scores differ by less are tied, and a row whose score is less
# is below what float32 resolves: it counts as explained already.
#
# Equal rows get unequal scores for two reasons.  First, s = ‖φ‖²/λ − Σ(φ·w)² is rounded in another order elsewhere (in
# the block or outside it, on another device or mesh): a few ulp *of ‖φ‖²/λ*, however small s has become; up to 4e-7
# after 50 picks, 1e-6 after 500.  Second, the same text in another batch position or bucket has another φ: 3e-7 of ‖φ‖
# were measured, 1e-7 in ‖φ‖².  2⁻²⁰, 8 ulp, covers both.  More would be wrong in the other direction: at 20,000
# rows, scores that differ by a few 1e-6 are no longer rare.  (bfloat16 models repeat a φ to 1e-2 only.  Equal texts
# are then not tied, which does no harm: once one is picked, the score of the others falls with it.)
TIE = 2.0**-20

# The least λ, as a share of the largest ‖φ‖², at which variances of pairs in the span of the labelled ones, which are
# about D/n, exceed that rounding: TIE / FLOOR = 1/64.
FLOOR = 2.0**-14


def condition(features: jax.Array, labelled_mask: jax.Array, lam: jax.Array | float) -> jax.Array:
    """W of the labelled pairs, with V⁻¹ = I/λ − WᵀW.

    By Woodbury, V⁻¹ = I/λ − Φᵀ(λI + ΦΦᵀ)⁻¹Φ/λ; with the Cholesky factor LLᵀ = λI + ΦΦᵀ that is W = L⁻¹Φ/√λ.  Rows
    added to Φ leave the rows above them in W unchanged, so that `greedy` can extend this W.

    Args:
      features: [n, D] float32 or bfloat16, φ of the labelled pairs; empty slots may hold anything.
      labelled_mask: [n] bool, false for an empty slot.
      lam: λ > 0, may be traced.  Where λ is too small for a Cholesky factorisation in float32, because the pairs
        exhaust the rank of their features, W is built row by row and pairs that add nothing get a row of zeros.

    Returns:
      [n, D] float32; rows of empty slots are zero.
    """
    phi = jnp.where(labelled_mask[:, None], features.astype(jnp.float32), 0.0)
    if phi.shape[0] == 0:
        return phi
    gram = jnp.matmul(phi, phi.T, precision=HIGHEST) + lam * jnp.eye(phi.shape[0], dtype=phi.dtype)
    factor = jnp.linalg.cholesky(gram)
    # A pivot L_jj² = λ(1 + s_j) carries a rounding error of about n ulp of its row's diagonal entry.
    pivots, diagonal = jnp.square(jnp.diagonal(factor)), jnp.diagonal(gram)
    resolved = jnp.all(pivots > phi.shape[0] * TIE * diagonal)  # false where the factor is NaN

    def by_cholesky() -> jax.Array:
        return jax.scipy.linalg.solve_triangular(factor, phi, lower=True) / jnp.sqrt(lam)

    def row_by_row() -> jax.Array:
        def append(k: jax.Array, rows: jax.Array) -> jax.Array:
            return rows.at[k].set(downdate(phi[k], rows, k, lam)[0])

        return jax.lax.fori_loop(0, phi.shape[0], append, with_room(phi[:0], phi.shape[0]))[: phi.shape[0]]

    return jax.lax.cond(resolved, by_cholesky, row_by_row)


def with_room(posterior: jax.Array, more: int) -> jax.Array:
    """W [n, D] followed by zeros: room for `more` rows, and for the products that run over the last of them."""
    room = -(-(posterior.shape[0] + more) // _WIDE) * _WIDE + _WIDE - posterior.shape[0]
    return jnp.pad(posterior, ((0, room), (0, 0)))


def downdate(
    phi: jax.Array, rows: jax.Array, count: jax.Array | int, lam: jax.Array | float
) -> tuple[jax.Array, jax.Array]:
    """The row w = V⁻¹φ / √(1 + φᵀV⁻¹φ) that φ appends to W (Sherman & Morrison 1950), and the variance φᵀV⁻¹φ.

    A variance below TIE ‖φ‖²/λ is rounding noise, and so is V⁻¹φ, which at its full size would make V⁻¹ indefinite;
    both are then zero.

    Args:
      phi: [D] float32; rows: W `with_room`; count: how many rows of W there are, the others being zero; lam: λ.
    """

    def tile(k: jax.Array, v: jax.Array) -> jax.Array:
        part = jax.lax.dynamic_slice_in_dim(rows, k * _WIDE, _WIDE)  # read once for both products
        return v - jnp.matmul(jnp.matmul(part, phi, precision=HIGHEST), part, precision=HIGHEST)

    v = jax.lax.fori_loop(0, -(-count // _WIDE), tile, phi / lam)
    score = jnp.dot(phi, v, precision=HIGHEST)
    resolved = score > TIE * prior_variances(phi, lam)
    score = jnp.where(resolved, score, 0.0)
    return jnp.where(resolved, v / jnp.sqrt(1.0 + score), 0.0), score


def resolved_lam(features: jax.Array, available: jax.Array, lam: jax.Array | float) -> jax.Array:
    """λ, or the least that float32 resolves for these features: max(λ, FLOOR · max ‖φ‖²), a scalar float32.

    Once the picks exhaust the rank of the features, their variances no longer depend on so small a λ, while the
    rounding of ‖φ‖²/λ would hide them.  The order of picks outside the span does not depend on λ either.

    Args:
      features: [N, D] float32 or bfloat16, or [N, 2, D] of the two responses of pairs, which φ is the difference of: it
        is taken to be as long as both together, since the difference of a whole pool would need memory for itself.
      available: [N] bool, the rows that count.
    """
    squares = prior_variances(features, 1.0)
    if features.ndim == 3:
        squares = jnp.square(jnp.sum(jnp.sqrt(squares), axis=-1))
    return raised_lam(jnp.max(jnp.where(available, squares, 0.0)), lam)


def raised_lam(largest: jax.Array | float, lam: jax.Array | float) -> jax.Array:
    """`resolved_lam` of features whose largest ‖φ‖² is known."""
    return jnp.maximum(jnp.float32(lam), FLOOR * jnp.where(jnp.isfinite(largest), largest, 0.0))


def prior_variances(features: jax.Array, lam: jax.Array | float) -> jax.Array:
    """‖φ‖²/λ, the variances before any label: [..., D] float32 or bfloat16 to [...] float32."""
    return jnp.sum(jnp.square(features.astype(jnp.float32)), axis=-1) / lam


def rows_of(features: jax.Array, rows: jax.Array) -> jax.Array:
    """Some rows of features [N, D] float32 or bfloat16, in float32."""
    return features[rows] if features.dtype == jnp.float32 else _from_bits(_bits(features)[rows])


def _bits(features: jax.Array) -> jax.Array:
    """bfloat16 as uint16.  Where XLA has no slice of bfloat16, as on CPUs, it widens all rows to cut out a few."""
    return jax.lax.bitcast_convert_type(features, jnp.uint16)


def _from_bits(bits: jax.Array) -> jax.Array:
    """The float32 numbers of bfloat16 bits, which are their upper halves."""
    return jax.lax.bitcast_convert_type(bits.astype(jnp.uint32) << 16, jnp.float32)


def widened(function: Callable[..., jax.Array], features: jax.Array, *of_rows: jax.Array) -> jax.Array:
    """`function` of features in float32 and of what belongs to their rows, [N] each; bfloat16 is widened in tiles.

    Args:
      function: (features [n, D] float32, *of_rows [n]) to [n] float32, row by row.
      features: [N, D] float32 or bfloat16, on one device or one device's part of them.
    """
    if features.dtype == jnp.float32:
        return function(features, *of_rows)
    count, dim = features.shape
    return _in_tiles(function, min(max(_WIDENED // (4 * dim), 1), -(-count // 32)), features, *of_rows)


def _in_tiles(function: Callable[..., jax.Array], size: int, features: jax.Array, *of_rows: jax.Array) -> jax.Array:
    """`function` as in `widened`, of `size` rows at a time."""
    count = features.shape[0]

    def tile(k: jax.Array, found: jax.Array) -> jax.Array:
        start = jnp.minimum(k * size, count - size)  # the last one overlaps
        rows, start = jax.lax.optimization_barrier((features, start))  # else XLA copies all rows before the loop
        stored = rows if rows.dtype == jnp.float32 else _bits(rows)
        part = jax.lax.dynamic_slice_in_dim(stored, start, size)
        part = part if rows.dtype == jnp.float32 else _from_bits(part)
        others = (jax.lax.dynamic_slice_in_dim(x, start, size) for x in of_rows)
        return jax.lax.dynamic_update_slice_in_dim(found, function(part, *others), start, 0)

    none = jnp.zeros_like(features[:, 0], jnp.float32)
    return jax.lax.fori_loop(0, -(-count // size), tile, none)


def explained(features: jax.Array, posterior: jax.Array) -> jax.Array:
    """‖Wφ‖², what the rows of W [n, D] take off the variances of features [N, D]: [N] float32."""

    def products(features: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(jnp.matmul(features, posterior.T, precision=HIGHEST)), axis=-1)

    return widened(products, features)


def explained_since(
    features: jax.Array, rows: jax.Array, first: jax.Array, end: jax.Array, parts: int = 1
) -> jax.Array:
    """‖Wφ‖² of the rows of W from `first` on, which every feature has its own number of.

    The products begin at the lowest `first` of a part of the features, so that parts pay where `first` rises.

    Args:
      features: [N, D] float32 or bfloat16; rows: W `with_room`; first: [N] int32; end: how many rows of W there are.
      parts: how many there are at least.

    Returns:
      [N] float32.
    """

    def of(features: jax.Array, first: jax.Array) -> jax.Array:
        def tile(width: int, start: jax.Array, total: jax.Array) -> tuple[jax.Array, jax.Array]:
            part = jax.lax.dynamic_slice_in_dim(rows, start, width)
            products = jnp.matmul(features, part[0] if width == 1 else part.T, precision=HIGHEST)
            counted = start + jnp.arange(width) >= first[:, None]
            squares = jnp.where(counted, jnp.square(products.reshape(-1, width)), 0.0)
            return start + width, total + jnp.sum(squares, axis=-1)

        def next_tile(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            left = end - carry[0]
            choice = (left > 1).astype(jnp.int32) + (left > 2 * _NARROW)
            return jax.lax.switch(choice, [functools.partial(tile, n) for n in (1, _NARROW, _WIDE)], *carry)

        none = jnp.zeros_like(features[:, 0])
        return jax.lax.while_loop(lambda carry: carry[0] < end, next_tile, (jnp.min(first), none))[1]

    if parts == 1:
        return widened(of, features, first)
    return _in_tiles(of, -(-features.shape[0] // parts), features, first)


def variances(features: jax.Array, posterior: jax.Array, lam: jax.Array | float) -> jax.Array:
    """φᵀV⁻¹φ = ‖φ‖²/λ − ‖Wφ‖² of every row.

    Args:
      features: [N, D] float32 or bfloat16; posterior: W, [n, D] float32, n may be 0; lam: λ.

    Returns:
      [N] float32, at least 0.  The rounding error is a few ulp of ‖φ‖²/λ, not of the result.
    """
    return jnp.maximum(prior_variances(features, lam) - explained(features, posterior), 0.0)


def information_gain(scores: jax.Array) -> jax.Array:
    """log det V after the picks − log det V before, from the variances they were picked at: Σ log(1 + s_j).

    Args:
      scores: [K] float32, of `greedy`; slots that were not filled have score 0 and add nothing.

    Returns:
      Scalar float32, in nats.
    """
    return jnp.sum(jnp.log1p(scores))
