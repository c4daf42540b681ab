"""Rotary positions, and attention on the shared-prefix layout of a group."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from activedpo_jax.models.config import ModelConfig, Rope

_MASKED = -1e30  # finite, so that the rows of padding, masked everywhere, stay finite and vanish from the gradient
_NO_WINDOW = np.iinfo(np.int32).max // 2


class Rule(NamedTuple):
    """How scores become attention, the same for both blocks of a layer."""

    scale: float  # of the queries
    softcap: float | None
    window: jax.Array  # scalar int32: a token sees so many, itself included


def rule(config: ModelConfig, window: jax.Array) -> Rule:
    scale = config.head_dim**-0.5 if config.query_scale is None else config.query_scale
    return Rule(scale, config.attention_softcap, window)


def windows(config: ModelConfig) -> np.ndarray:
    """Of every layer the number of tokens that one sees, [L] int32: beyond all lengths where there is no limit."""
    return np.array([config.window if local else _NO_WINDOW for local in config.is_local], np.int32)


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """Of every layer the radians per position, [L, Dh/2] float32; a layer without rotation has zeros."""
    everywhere = _frequencies(config.rope, config.head_dim)
    local = everywhere if config.local_rope is None else _frequencies(config.local_rope, config.head_dim)
    unrotated = config.unrotated or (False,) * config.num_layers
    rows = [
        0 * everywhere if none else local if here else everywhere
        for here, none in zip(config.is_local, unrotated, strict=True)
    ]
    return np.stack(rows).astype(np.float32)


def _frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """[Dh/2] radians per position (Su et al. 2021), with Llama 3's stretching of the long wavelengths."""
    frequency = rope.theta ** (-np.arange(0, head_dim, 2) / head_dim) / rope.factor
    scaling = rope.scaling
    if scaling is None:
        return frequency
    # Short wavelengths stay, long ones are stretched by `factor`, those between are interpolated.
    turns = scaling.original_max_position * frequency / (2 * math.pi)  # over the original context
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = np.clip(kept, 0.0, 1.0)
    return kept * frequency + (1 - kept) * frequency / scaling.factor


def rotate(x: jax.Array, positions: jax.Array, frequencies: jax.Array) -> jax.Array:
    """Rotates [..., T, heads, Dh] by the positions [..., T]; the two halves of a head are the pairs, as in Llama."""
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _attention_weights(scores: jax.Array, mask: jax.Array, how: Rule, dtype: jnp.dtype) -> jax.Array:
    if how.softcap is not None:
        scores = how.softcap * jnp.tanh(scores / how.softcap)
    return jax.nn.softmax(jnp.where(mask, scores, _MASKED), axis=-1).astype(dtype)


def prompt_attention(q: jax.Array, k: jax.Array, v: jax.Array, prompt_len: jax.Array, how: Rule) -> jax.Array:
    """Causal attention within left-padded prompts.

    Args:
      q: [G, P, H, Dh]; k, v: [G, P, K, Dh] with H a multiple of K (grouped-query attention); prompt_len: [G].

    Returns:
      [G, P, H·Dh] in q's dtype.  Scores and softmax are float32.
    """
    groups, length, heads, dim = q.shape
    q = q.reshape(groups, length, k.shape[2], -1, dim)
    scores = jnp.einsum("gpkqd,gskd->gkqps", q, k, preferred_element_type=jnp.float32) * how.scale
    key = jnp.arange(length)
    distance = key[:, None] - key
    mask = (distance >= 0) & (distance < how.window) & (key >= length - prompt_len[:, None, None])  # [G, P, P]
    weights = _attention_weights(scores, mask[:, None, None], how, v.dtype)
    return jnp.einsum("gkqps,gskd->gpkqd", weights, v).reshape(groups, length, heads * dim)


def response_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    prompt_k: jax.Array,
    prompt_v: jax.Array,
    prompt_len: jax.Array,
    how: Rule,
    start: jax.Array | int = 0,
) -> jax.Array:
    """Attention of each response to its prompt and, causally, to itself; responses do not see each other.

    Args:
      q: [G, m, Q, H, Dh], of the response's tokens from the `start`-th on; k, v: [G, m, R, K, Dh], of its tokens
        from the first on (those after the last query may be anything); prompt_k, prompt_v: [G, P, K, Dh];
        prompt_len: [G].

    Returns:
      [G, m, Q, H·Dh] in q's dtype.
    """
    groups, m, length, heads, dim = q.shape
    prompt_length = prompt_k.shape[1]
    q = q.reshape(groups, m, length, k.shape[3], -1, dim) * how.scale
    to_prompt = jnp.einsum("gmrkqd,gskd->gmkqrs", q, prompt_k, preferred_element_type=jnp.float32)
    to_self = jnp.einsum("gmrkqd,gmskd->gmkqrs", q, k, preferred_element_type=jnp.float32)
    query = start + jnp.arange(length)[:, None]
    key = jnp.arange(prompt_length)
    in_prompt = (key >= prompt_length - prompt_len[:, None])[:, None, None, None, None]
    in_prompt &= prompt_length + query - key < how.window
    distance = query - jnp.arange(k.shape[2])
    causal = (distance >= 0) & (distance < how.window)
    mask = jnp.concatenate(
        [jnp.broadcast_to(in_prompt, to_prompt.shape), jnp.broadcast_to(causal, to_self.shape)], axis=-1
    )
    weights = _attention_weights(jnp.concatenate([to_prompt, to_self], axis=-1), mask, how, v.dtype)
    out = jnp.einsum("gmkqrs,gskd->gmrkqd", weights[..., :prompt_length], prompt_v)
    out += jnp.einsum("gmkqrs,gmskd->gmrkqd", weights[..., prompt_length:], v)
    return out.reshape(groups, m, length, heads * dim)
