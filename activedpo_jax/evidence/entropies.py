"""The entropy of the policy's responses to a prompt (Muldrew et al. 2024, arXiv 2402.08114)."""

import jax
import jax.numpy as jnp

from activedpo_jax.data.groups import Groups, group_pairs
from activedpo_jax.evidence.spec import EvidenceSpec
from activedpo_jax.generation.decoding import DecodingSpec, Requests, Responses, respond
from activedpo_jax.generation.sampling import Sampling
from activedpo_jax.models.decoder import unstack
from activedpo_jax.models.lora import Lora
from activedpo_jax.models.policy import Policy
from activedpo_jax.models.token_hash import prompt_hash

_STREAM = 0x656E7472  # keeps these samples apart from others of the same seed


def entropies(spec: EvidenceSpec, policy: Policy, lora: Lora, groups: Groups, seed: jax.Array) -> jax.Array:
    """H(x) = −(1/N) Σ_n log π_θ(y_n|x), y_n sampled from π_θ at temperature 1: [G, m(m−1)/2] float32, in nats.

    H depends on the prompt, and is the same for all its pairs.  A response ends with a stop token or after
    `spec.entropy_length` tokens, so that H is the entropy of what the policy writes up to there.
    """
    responses = sampled(spec, policy, lora, groups, seed)
    prompt_entropies = -jnp.mean(jnp.sum(responses.logps, axis=-1), axis=-1)
    pairs = len(group_pairs(groups.response_ids.shape[1]))
    return jnp.broadcast_to(prompt_entropies[:, None], (prompt_entropies.shape[0], pairs))


def sampled(spec: EvidenceSpec, policy: Policy, lora: Lora, groups: Groups, seed: jax.Array) -> Responses:
    """N responses to each prompt, which depend on θ, its tokens and the seed alone."""
    decoding = DecodingSpec(policy.decoder.clone(unrolled=True), Sampling(), spec.stop, spec.entropy_length, spec.mesh)
    seeds = prompt_hash(groups, jnp.uint32(seed) ^ jnp.uint32(_STREAM))
    samples = jnp.broadcast_to(
        jnp.arange(spec.entropy_samples, dtype=jnp.int32), (seeds.shape[0], spec.entropy_samples)
    )
    on_cpu = spec.mesh.devices.flat[0].platform == "cpu"
    requests = Requests(groups.prompt_ids, groups.prompt_len, seeds, samples)
    return respond(decoding, unstack(policy.params, on_cpu), unstack(lora), requests)
