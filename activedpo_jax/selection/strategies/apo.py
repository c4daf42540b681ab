"""`apo`: greedy argmax ψᵀV⁻¹ψ, V ← V + ψψᵀ after each pick, V₀ = λI (Das et al. 2024, arXiv 2402.10500).

ψ is the difference of two embeddings in the frozen SFT model, so that what is picked depends on no label.
"""

import jax
from jax.sharding import Mesh

from activedpo_jax.selection.greedy import Picks, greedy
from activedpo_jax.selection.strategies.base import Evidence, Strategy, required


def select(evidence: Evidence, available: jax.Array, key: jax.Array, num_picks: int, block: int, mesh: Mesh) -> Picks:
    """As `activedpo`, on embeddings.  The key is not used."""
    embeddings, posterior, lam = required("apo", evidence, "embeddings", "posterior", "lam")
    return greedy(embeddings, available, posterior, lam, num_picks=num_picks, block=block, mesh=mesh)


STRATEGY = Strategy("apo", select, frozenset({"embeddings"}), design="embeddings", gains=True)
