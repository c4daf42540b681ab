"""The posterior over the reward: V = λI + Σ φφᵀ over labelled pairs (arXiv 2505.19241, section 3), as V⁻¹ = I/λ − WᵀW.

Neither V nor V⁻¹, which are D × D, is ever formed.  W has one row a labelled pair, so that everything here costs a
product with n rows instead of D.  All of it is float32 with full-precision products: V⁻¹ is a difference of nearly
equal things, and the TF32 or bfloat16 passes that accelerators use by default would leave nothing of it.
"""

import jax
import jax.numpy as jnp

HIGHEST = jax.lax.Precision.HIGHEST


def condition(features: jax.Array, labelled_mask: jax.Array, lam: jax.Array | float) -> jax.Array:
    """W of the labelled pairs, with V⁻¹ = I/λ − WᵀW.

    By Woodbury, V⁻¹ = I/λ − Φᵀ(λI + ΦΦᵀ)⁻¹Φ/λ; with the Cholesky factor LLᵀ = λI + ΦΦᵀ that is W = L⁻¹Φ/√λ.  Rows
    added to Φ leave those above them in W as they are, so this W goes on as `greedy` extends it.

    Args:
      features: [n, D] float32, φ of the labelled pairs; empty slots may hold anything.
      labelled_mask: [n] bool, false for an empty slot.
      lam: λ > 0, may be traced.  float32 wants λ ≥ 1e-6 of the largest eigenvalue of ΦΦᵀ; W is NaN if the
        factorisation fails.

    Returns:
      [n, D] float32; rows of empty slots are zero.
    """
    phi = jnp.where(labelled_mask[:, None], features, 0.0)
    if phi.shape[0] == 0:
        return phi
    gram = jnp.matmul(phi, phi.T, precision=HIGHEST) + lam * jnp.eye(phi.shape[0], dtype=phi.dtype)
    factor = jnp.linalg.cholesky(gram)
    return jax.scipy.linalg.solve_triangular(factor, phi, lower=True) / jnp.sqrt(lam)


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
