"""`activedpo`: greedy argmax φᵀV⁻¹φ with V ← V + φφᵀ after each pick (arXiv 2505.19241, algorithm 1)."""

from activedpo_jax.selection.strategies.d_optimal import d_optimal

STRATEGY = d_optimal("activedpo", "features")
