"""`adpo`: greedy argmax vᵀH⁻¹v, v = β √(p(1−p)) ψ, H ← H + vvᵀ after each pick (Kveton et al. 2025, arXiv 2503.01076).

A D-optimal design for DPO's loss as a function of the last layer: ψ and p are those of the current π_θ.
"""

from activedpo_jax.selection.strategies.d_optimal import d_optimal

STRATEGY = d_optimal("adpo", "fisher_embeddings")
