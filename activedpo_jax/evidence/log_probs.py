"""Log-probabilities of the two responses of a pair under the policy."""

import jax

from activedpo_jax.data.groups import Groups, group_pairs
from activedpo_jax.evidence.spec import EvidenceSpec
from activedpo_jax.models.lora import Lora
from activedpo_jax.models.policy import Policy, response_logps


def log_probs(spec: EvidenceSpec, policy: Policy, lora: Lora, groups: Groups, seed: jax.Array) -> jax.Array:
    """log π_θ(y|x) of both responses, summed over tokens: [G, m(m−1)/2, 2] float32.  The seed is not used."""
    return response_logps(policy.decoder, policy.params, lora, groups)[:, group_pairs(groups.response_ids.shape[1])]
