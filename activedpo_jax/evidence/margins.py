"""Margins of the implicit reward r̂(x,y) = β [log π_θ(y|x) − log π_ref(y|x)] (Rafailov et al. 2023, eq. 5)."""

import jax
import jax.numpy as jnp

from activedpo_jax.data.groups import Groups, group_pairs
from activedpo_jax.evidence.spec import EvidenceSpec
from activedpo_jax.models.lora import Lora
from activedpo_jax.models.policy import Policy, response_logps


def margins(spec: EvidenceSpec, policy: Policy, lora: Lora, groups: Groups, seed: jax.Array) -> jax.Array:
    """Δ = r̂(x,y_i) − r̂(x,y_j) of every pair i < j: [G, m(m−1)/2] float32.  The seed is not used.

    Where θ is the reference, as in a run's first round, Δ is exactly 0: one program scores both adapters, one after the
    other, whereas two programs would round differently.
    """
    adapters = jax.tree.map(lambda *x: jnp.stack(x), lora, policy.reference)
    logps, ref_logps = jax.lax.map(
        lambda adapter: response_logps(policy.decoder, policy.params, adapter, groups), adapters
    )
    rewards = spec.beta * (logps - ref_logps)
    first, second = group_pairs(groups.response_ids.shape[1]).T
    return rewards[:, first] - rewards[:, second]
