"""`adpo`: greedy argmax vᵀH⁻¹v, v = β √(p(1−p)) ψ, H ← H + vvᵀ after each pick (Kveton et al. 2025, arXiv 2503.01076).

A D-optimal design for DPO's loss as a function of the last layer: ψ and p are those of the current π_θ.
"""

import jax
from jax.sharding import Mesh

from activedpo_jax.selection.greedy import Picks, greedy
from activedpo_jax.selection.strategies.base import Evidence, Strategy, required


def select(evidence: Evidence, available: jax.Array, key: jax.Array, num_picks: int, block: int, mesh: Mesh) -> Picks:
    """As `activedpo`, on weighted embeddings; H starts from λI and the labelled pairs.  The key is not used."""
    vectors, posterior, lam = required("adpo", evidence, "fisher_embeddings", "posterior", "lam")
    return greedy(vectors, available, posterior, lam, num_picks=num_picks, block=block, mesh=mesh)


STRATEGY = Strategy("adpo", select, frozenset({"fisher_embeddings"}), design="fisher_embeddings", gains=True)
