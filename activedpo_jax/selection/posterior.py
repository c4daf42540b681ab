"""The posterior over the reward: V = λI + Σ φφᵀ over labelled pairs (arXiv 2505.19241, section 3), as V⁻¹ = I/λ − WᵀW.

Neither V nor V⁻¹, which are D × D, is ever formed.  W has one row per labelled pair, so that everything here costs a
product with n rows instead of D.  All of it is float32 with full-precision products: V⁻¹ is a difference of nearly
equal terms, and the TF32 or bfloat16 passes that accelerators use by default would leave nothing of it.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

HIGHEST = jax.lax.Precision.HIGHEST

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
      features: [n, D] float32, φ of the labelled pairs; empty slots may hold anything.
      labelled_mask: [n] bool, false for an empty slot.
      lam: λ > 0, may be traced.  Where λ is too small for a Cholesky factorisation in float32, because the pairs
        exhaust the rank of their features, W is built row by row and pairs that add nothing get a row of zeros.

    Returns:
      [n, D] float32; rows of empty slots are zero.
    """
    phi = jnp.where(labelled_mask[:, None], features, 0.0)
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
            return rows.at[k].set(downdate(phi[k], (rows,), lam)[0])

        return jax.lax.fori_loop(0, phi.shape[0], append, jnp.zeros_like(phi))

    return jax.lax.cond(resolved, by_cholesky, row_by_row)


def downdate(phi: jax.Array, rows: Sequence[jax.Array], lam: jax.Array | float) -> tuple[jax.Array, jax.Array]:
    """The row w = V⁻¹φ / √(1 + φᵀV⁻¹φ) that φ appends to W (Sherman & Morrison 1950), and the variance φᵀV⁻¹φ.

    A variance below TIE ‖φ‖²/λ is rounding noise, and so is V⁻¹φ, which at its full size would make V⁻¹ indefinite;
    both are then zero.

    Args:
      phi: [D] float32; rows: W in parts of [n, D] float32 each; lam: λ.
    """
    v = phi / lam
    for part in rows:
        v -= jnp.matmul(jnp.matmul(part, phi, precision=HIGHEST), part, precision=HIGHEST)
    score = jnp.dot(phi, v, precision=HIGHEST)
    resolved = score > TIE * prior_variances(phi, lam)
    score = jnp.where(resolved, score, 0.0)
    return jnp.where(resolved, v / jnp.sqrt(1.0 + score), 0.0), score


def resolved_lam(features: jax.Array, available: jax.Array, lam: jax.Array | float) -> jax.Array:
    """λ, or the least that float32 resolves for these features: max(λ, FLOOR · max ‖φ‖²), a scalar float32.

    Once the picks exhaust the rank of the features, their variances no longer depend on so small a λ, while the
    rounding of ‖φ‖²/λ would hide them.  The order of picks outside the span does not depend on λ either.

    Args:
      features: [N, D] float32; available: [N] bool, the rows that count.
    """
    largest = jnp.max(jnp.where(available, jnp.sum(jnp.square(features), axis=-1), 0.0))
    return jnp.maximum(jnp.float32(lam), FLOOR * jnp.where(jnp.isfinite(largest), largest, 0.0))


def prior_variances(features: jax.Array, lam: jax.Array | float) -> jax.Array:
    """‖φ‖²/λ, the variances before any label: [N, D] float32 to [N] float32."""
    return jnp.sum(jnp.square(features), axis=-1) / lam


def explained(features: jax.Array, posterior: jax.Array) -> jax.Array:
    """‖Wφ‖², what the rows of W [n, D] take off the variances of features [N, D]: [N] float32."""
    return jnp.sum(jnp.square(jnp.matmul(features, posterior.T, precision=HIGHEST)), axis=-1)


def variances(features: jax.Array, posterior: jax.Array, lam: jax.Array | float) -> jax.Array:
    """φᵀV⁻¹φ = ‖φ‖²/λ − ‖Wφ‖² of every row.

    Args:
      features: [N, D] float32; posterior: W, [n, D] float32, n may be 0; lam: λ.

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
