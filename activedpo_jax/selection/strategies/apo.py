"""`apo`: greedy argmax ψᵀV⁻¹ψ, V ← V + ψψᵀ after each pick, V₀ = λI (Das et al. 2024, arXiv 2402.10500).

ψ is the difference of two embeddings in the frozen SFT model, so that what is picked depends on no label.
"""

from activedpo_jax.selection.strategies.d_optimal import d_optimal

STRATEGY = d_optimal("apo", "embeddings")
