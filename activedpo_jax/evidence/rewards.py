"""The implicit reward r̂(x,y) = β [log π_θ(y|x) − log π_ref(y|x)] (Rafailov et al. 2023, eq. 5)."""

import jax
import jax.numpy as jnp

from activedpo_jax.data.groups import Groups, group_pairs
from activedpo_jax.evidence.spec import EvidenceSpec
from activedpo_jax.models.lora import Lora
from activedpo_jax.models.policy import Policy, response_logps


def response_rewards(spec: EvidenceSpec, policy: Policy, lora: Lora, groups: Groups) -> jax.Array:
    """r̂ of every response: [G, m] float32.

    Where θ is the reference, as in a run's first round, it is exactly 0: one program scores both adapters, one after
    the other, whereas two programs would round differently.
    """
    adapters = jax.tree.map(lambda *x: jnp.stack(x), lora, policy.reference)
    logps, ref_logps = jax.lax.map(
        lambda adapter: response_logps(policy.decoder, policy.params, adapter, groups), adapters
    )
    return spec.beta * (logps - ref_logps)


def rewards(spec: EvidenceSpec, policy: Policy, lora: Lora, groups: Groups, seed: jax.Array) -> jax.Array:
    """r̂ of both responses of every pair i < j: [G, m(m−1)/2, 2] float32.  The seed is not used."""
    return response_rewards(spec, policy, lora, groups)[:, group_pairs(groups.response_ids.shape[1])]
