"""Rotary positions, and attention on the shared-prefix layout of a group."""

import math

import jax
import jax.numpy as jnp

from activedpo_jax.models.config import ModelConfig

_MASKED = -1e30  # finite, so that the rows of padding, masked everywhere, stay finite and vanish from the gradient


def rope_frequencies(config: ModelConfig) -> jax.Array:
    """[Dh/2] float32 radians per position (Su et al. 2021), with Llama 3's stretching of the long wavelengths."""
    frequency = config.rope_theta ** (-jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    # Short wavelengths stay, long ones are stretched by `factor`, those between are interpolated.
    turns = scaling.original_max_position * frequency / (2 * math.pi)  # over the original context
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = jnp.clip(kept, 0.0, 1.0)
    return kept * frequency + (1 - kept) * frequency / scaling.factor


def rotate(x: jax.Array, positions: jax.Array, frequencies: jax.Array) -> jax.Array:
    """Rotates [..., T, heads, Dh] by the positions [..., T]; the two halves of a head are the pairs, as in Llama."""
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _softmax(scores: jax.Array, mask: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return jax.nn.softmax(jnp.where(mask, scores, _MASKED), axis=-1).astype(dtype)


def prompt_attention(q: jax.Array, k: jax.Array, v: jax.Array, prompt_len: jax.Array) -> jax.Array:
    """Causal attention within left-padded prompts.

    Args:
      q: [G, P, H, Dh]; k, v: [G, P, K, Dh] with H a multiple of K (grouped-query attention); prompt_len: [G].

    Returns:
      [G, P, H·Dh] in q's dtype.  Scores and softmax are float32.
    """
    groups, length, heads, dim = q.shape
    q = q.reshape(groups, length, k.shape[2], -1, dim)
    scores = jnp.einsum("gpkqd,gskd->gkqps", q, k, preferred_element_type=jnp.float32) * dim**-0.5
    key = jnp.arange(length)
    mask = (key <= key[:, None]) & (key >= length - prompt_len[:, None, None])  # [G, P, P]
    probs = _softmax(scores, mask[:, None, None], v.dtype)
    return jnp.einsum("gkqps,gskd->gpkqd", probs, v).reshape(groups, length, heads * dim)


def response_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, prompt_k: jax.Array, prompt_v: jax.Array, prompt_len: jax.Array
) -> jax.Array:
    """Attention of each response to its prompt and, causally, to itself; responses do not see each other.

    Args:
      q: [G, m, R, H, Dh]; k, v: [G, m, R, K, Dh]; prompt_k, prompt_v: [G, P, K, Dh]; prompt_len: [G].

    Returns:
      [G, m, R, H·Dh] in q's dtype.
    """
    groups, m, length, heads, dim = q.shape
    prompt_length = prompt_k.shape[1]
    q = q.reshape(groups, m, length, k.shape[3], -1, dim) * dim**-0.5
    to_prompt = jnp.einsum("gmrkqd,gskd->gmkqrs", q, prompt_k, preferred_element_type=jnp.float32)
    to_self = jnp.einsum("gmrkqd,gmskd->gmkqrs", q, k, preferred_element_type=jnp.float32)
    key = jnp.arange(prompt_length)
    in_prompt = (key >= prompt_length - prompt_len[:, None])[:, None, None, None, None]
    causal = jnp.tril(jnp.ones((length, length), bool))
    mask = jnp.concatenate(
        [jnp.broadcast_to(in_prompt, to_prompt.shape), jnp.broadcast_to(causal, to_self.shape)], axis=-1
    )
    probs = _softmax(jnp.concatenate([to_prompt, to_self], axis=-1), mask, v.dtype)
    out = jnp.einsum("gmkqrs,gskd->gmrkqd", probs[..., :prompt_length], prompt_v)
    out += jnp.einsum("gmkqrs,gmskd->gmrkqd", probs[..., prompt_length:], v)
    return out.reshape(groups, m, length, heads * dim)
