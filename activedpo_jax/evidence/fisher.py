"""Vectors of pairs, weighted by what an answer about the pair would say: the Fisher information of Bradley–Terry.

The answer about a pair with reward difference Δ is a coin of probability p = σ(Δ); about w in Δ = vᵀw it has the Fisher
information p(1−p) vvᵀ.  Vectors scaled by √(p(1−p)) make any design in vvᵀ one in that information.  Where θ is the
reference, as in a run's first round, p is ½ for all.
"""

import jax
import jax.numpy as jnp

from activedpo_jax.data.groups import Groups
from activedpo_jax.evidence.embeddings import pair_embeddings
from activedpo_jax.evidence.gradients import pair_features
from activedpo_jax.evidence.margins import margins
from activedpo_jax.evidence.spec import EvidenceSpec
from activedpo_jax.models.lora import Lora
from activedpo_jax.models.policy import Policy


def fisher_features(spec: EvidenceSpec, policy: Policy, lora: Lora, groups: Groups, seed: jax.Array) -> jax.Array:
    """√(p(1−p)) φ of every pair: [G, m(m−1)/2, D] of the dtype in which features are stored."""
    found = pair_features(policy.decoder, policy.params, lora, groups, spec.features, seed)
    return (deviations(spec, policy, lora, groups, seed) * found).astype(spec.features.dtype)


def fisher_embeddings(spec: EvidenceSpec, policy: Policy, lora: Lora, groups: Groups, seed: jax.Array) -> jax.Array:
    """β √(p(1−p)) ψ of every pair, ψ of the current π_θ: [G, m(m−1)/2, d] float32 (Kveton et al. 2025)."""
    return spec.beta * deviations(spec, policy, lora, groups, seed) * pair_embeddings(policy, lora, groups)


def deviations(spec: EvidenceSpec, policy: Policy, lora: Lora, groups: Groups, seed: jax.Array) -> jax.Array:
    """√(p(1−p)), the standard deviation of the answer about each pair: [G, m(m−1)/2, 1] float32, at most ½."""
    p = jax.nn.sigmoid(margins(spec, policy, lora, groups, seed))
    return jnp.sqrt(p * (1 - p))[..., None]
