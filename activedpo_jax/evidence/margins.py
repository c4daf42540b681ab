"""Margins of the implicit reward: what it holds the one response of a pair to be better by than the other."""

import jax

from activedpo_jax.data.groups import Groups, group_pairs
from activedpo_jax.evidence.rewards import response_rewards
from activedpo_jax.evidence.spec import EvidenceSpec
from activedpo_jax.models.lora import Lora
from activedpo_jax.models.policy import Policy


def margins(spec: EvidenceSpec, policy: Policy, lora: Lora, groups: Groups, seed: jax.Array) -> jax.Array:
    """Δ = r̂(x,y_i) − r̂(x,y_j) of every pair i < j: [G, m(m−1)/2] float32.  The seed is not used.

    Where θ is the reference, as in a run's first round, Δ is exactly 0.
    """
    rewards = response_rewards(spec, policy, lora, groups)
    first, second = group_pairs(groups.response_ids.shape[1]).T
    return rewards[:, first] - rewards[:, second]
