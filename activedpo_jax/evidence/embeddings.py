"""Embeddings of response pairs: differences of last hidden states."""

import jax

from activedpo_jax.data.groups import Groups, group_pairs
from activedpo_jax.evidence.spec import EvidenceSpec
from activedpo_jax.models.lora import Lora
from activedpo_jax.models.policy import Policy


def embeddings(spec: EvidenceSpec, policy: Policy, lora: Lora, groups: Groups, seed: jax.Array) -> jax.Array:
    """ψ of every pair i < j in the frozen SFT model, whatever θ is (Das et al. 2024, arXiv 2402.10500).

    The adapter of π_θ and the seed are not used.
    """
    return pair_embeddings(policy, policy.reference, groups)


def pair_embeddings(policy: Policy, adapter: Lora, groups: Groups) -> jax.Array:
    """ψ = e(x,y_i) − e(x,y_j) of every pair i < j: [G, m(m−1)/2, d] float32.

    e is the hidden state at the response's last token, after the final norm; it is not scaled.
    """
    variables = {"params": policy.params, "lora": adapter}
    states: jax.Array = policy.decoder.apply(variables, groups, method="states")  # type: ignore[assignment]
    first, second = group_pairs(groups.response_ids.shape[1]).T
    return states[:, first] - states[:, second]
