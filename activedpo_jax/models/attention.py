"""Rotary positions, and attention on the shared-prefix layout of a group."""

import functools
import math
from typing import Any, NamedTuple

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
    window: jax.Array  # scalar int32: how many tokens a token sees, itself included
    limits: tuple[int | None, ...]  # the values of `window` in the model's layers; None: no limit


def make_rule(config: ModelConfig, window: jax.Array) -> Rule:
    scale = config.head_dim**-0.5 if config.query_scale is None else config.query_scale
    limits = tuple(sorted({config.window if local else None for local in config.is_local}, key=lambda n: n or 0))
    return Rule(scale, config.attention_softcap, window, limits)


def windows(config: ModelConfig) -> np.ndarray:
    """The number of tokens that a token sees in each layer, [L] int32: beyond all lengths where there is no limit."""
    return np.array([config.window if local else _NO_WINDOW for local in config.is_local], np.int32)


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """The radians per position of each layer, [L, Dh/2] float32; zeros in a layer without rotation."""
    everywhere = _frequencies(config.rope, config.head_dim)
    local = everywhere if config.local_rope is None else _frequencies(config.local_rope, config.head_dim)
    unrotated = config.unrotated or (False,) * config.num_layers
    rows = [
        0 * everywhere if is_unrotated else local if is_local else everywhere
        for is_local, is_unrotated in zip(config.is_local, unrotated, strict=True)
    ]
    return np.stack(rows).astype(np.float32)


def _frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """[Dh/2] radians per position (Su et al. 2021), with Llama 3's stretching of the long wavelengths."""
    frequency = rope.theta ** (-np.arange(0, head_dim, 2) / head_dim) / rope.factor
    scaling = rope.scaling
    if scaling is None:
        return frequency
    # Short wavelengths are kept, long ones stretched by `factor`, those in between interpolated.
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


def _scores(q: jax.Array, k: jax.Array, mask: jax.Array, rule: Rule) -> jax.Array:
    """[..., r, Q, S] float32 of queries [..., r, Q, Dh] and keys [..., S, Dh], masked."""
    *batch, r, length, dim = q.shape
    scores = _products(q.reshape(*batch, r * length, dim), jnp.swapaxes(k, -1, -2), rule)
    return jnp.where(mask, scores.reshape(*batch, r, length, -1), _MASKED)


def _products(q: jax.Array, k: jax.Array, rule: Rule) -> jax.Array:
    """Scores [..., Q, S] float32 of queries [..., Q, Dh] and keys [..., Dh, S], with the scale and the soft-cap."""
    scores = jnp.matmul(q, k, preferred_element_type=jnp.float32) * rule.scale
    return scores if rule.softcap is None else rule.softcap * jnp.tanh(scores / rule.softcap)


def _attend(parts: list[tuple[jax.Array, jax.Array]]) -> jax.Array:
    """Softmax over the keys of all parts together; parts are (scores [..., r, Q, S], values [..., S, Dh])."""
    largest = functools.reduce(jnp.maximum, [jnp.max(scores, axis=-1, keepdims=True) for scores, _ in parts])
    largest = jax.lax.stop_gradient(largest)
    total: Any = 0.0
    out: Any = 0.0
    for scores, values in parts:
        weights = jnp.exp(scores - largest)
        total += jnp.sum(weights, axis=-1, keepdims=True)
        *batch, r, length, keys = weights.shape
        weights = weights.astype(values.dtype).reshape(*batch, r * length, keys)
        out += jnp.matmul(weights, values, preferred_element_type=jnp.float32).reshape(*batch, r, length, -1)
    return (out / total).astype(parts[0][1].dtype)


# Below, heads come before tokens while scores are computed: [..., K, r, Q, Dh] with r = H/K query heads to a key head.
# The products are then plain batched matrix products, several times faster on CPU than with heads in between.


def heads_first(x: jax.Array) -> jax.Array:
    """[..., T, K, Dh] → [..., K, T, Dh]"""
    return jnp.swapaxes(x, -2, -3)


def _queries_first(q: jax.Array, kv_heads: int) -> jax.Array:
    """[..., Q, H, Dh] → [..., K, r, Q, Dh]"""
    q = heads_first(q)
    return q.reshape(*q.shape[:-3], kv_heads, -1, *q.shape[-2:])


def _tokens_first(out: jax.Array) -> jax.Array:
    """[..., K, r, Q, Dh] → [..., Q, H·Dh]"""
    out = jnp.moveaxis(out, -2, -4)
    return out.reshape(*out.shape[:-3], -1)


def prompt_attention(q: jax.Array, k: jax.Array, v: jax.Array, prompt_len: jax.Array, rule: Rule) -> jax.Array:
    """Causal attention within left-padded prompts.

    Args:
      q: [G, P, H, Dh]; k, v: [G, P, K, Dh] with H a multiple of K (grouped-query attention); prompt_len: [G].

    Returns:
      [G, P, H·Dh] in q's dtype.  Scores and softmax are float32.
    """
    length, kv_heads = k.shape[1:3]
    key = jnp.arange(length)
    distance = key[:, None] - key
    mask = (distance >= 0) & (distance < rule.window) & (key >= length - prompt_len[:, None, None])  # [G, P, P]
    scores = _scores(_queries_first(q, kv_heads), heads_first(k), mask[:, None, None], rule)
    return _tokens_first(_attend([(scores, heads_first(v))]))


def response_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    prompt_k: jax.Array,
    prompt_v: jax.Array,
    prompt_len: jax.Array,
    rule: Rule,
) -> jax.Array:
    """Attention of each response to its prompt and, causally, to itself; responses do not see each other.

    Args:
      q: [G, m, R, H, Dh]; k, v: [G, m, R, K, Dh]; prompt_k, prompt_v: [G, P, K, Dh]; prompt_len: [G].

    Returns:
      [G, m, R, H·Dh] in q's dtype.
    """
    m, length = q.shape[1:3]
    prompt_length, kv_heads = prompt_k.shape[1:3]
    q = _queries_first(q, kv_heads)
    query = jnp.arange(length)[:, None]
    key = jnp.arange(prompt_length)
    in_prompt = (key >= prompt_length - prompt_len[:, None])[:, None, None, None, None]
    in_prompt &= prompt_length + query - key < rule.window
    distance = query - jnp.arange(length)
    causal = (distance >= 0) & (distance < rule.window)

    shared = [jnp.repeat(heads_first(x)[:, None], m, axis=1) for x in (prompt_k, prompt_v)]  # small next to the scores
    return _tokens_first(
        _attend(
            [
                (_scores(q, shared[0], in_prompt, rule), shared[1]),
                (_scores(q, heads_first(k), causal, rule), heads_first(v)),
            ]
        )
    )


# For decoding, keys are stored as [..., Dh, T] and values as [..., T, Dh] after the heads, and the heads of a prompt's
# responses share an axis, as the products need them.  In other layouts, XLA on CPU copies the cache for every token.


def kept(k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values [G, P, K, Dh] of prompts as [G, K, Dh, P] and [G, K, P, Dh]."""
    return jnp.moveaxis(k, 1, 3), heads_first(v)


def extended(cache: tuple[jax.Array, jax.Array], k: jax.Array, v: jax.Array, place: Any) -> tuple[jax.Array, jax.Array]:
    """The cache [G, K·m, Dh, R], [G, K·m, R, Dh] with keys and values [G, m, 1, K, Dh] of the tokens at `place`."""
    k, v = (jnp.moveaxis(x[:, :, 0], 1, 2).reshape(x.shape[0], -1, x.shape[-1]) for x in (k, v))
    return (
        jax.lax.dynamic_update_slice(cache[0], k[:, :, :, None], (0, 0, 0, place)),
        jax.lax.dynamic_update_slice(cache[1], v[:, :, None], (0, 0, place, 0)),
    )


def cached_attention(
    q: jax.Array,
    prompt: tuple[jax.Array, jax.Array],
    response: tuple[jax.Array, jax.Array],
    prompt_len: jax.Array,
    rule: Rule,
    place: Any,
) -> jax.Array:
    """`response_attention` of one token of each response, at `place`, with keys and values from a cache.

    The queries of all responses go through their prompt's keys together, which are read once, whatever m is.

    Args:
      q: [G, m, 1, H, Dh]; prompt: keys and values [G, K, Dh, P], [G, K, P, Dh]; response: likewise [G, K·m, Dh, R],
        [G, K·m, R, Dh], up to `place` (what follows may be anything finite); prompt_len: [G]; place: scalar.

    Returns:
      [G, m, 1, H·Dh] in q's dtype.
    """
    groups, m, _, heads, dim = q.shape
    kv_heads, prompt_length = prompt[1].shape[1:3]
    length = response[1].shape[2]
    q = jnp.moveaxis(q.reshape(groups, m, kv_heads, -1, dim), 1, 2)  # [G, K, m, r, Dh]
    apart, together = q.reshape(groups, kv_heads * m, -1, dim), q.reshape(groups, kv_heads, -1, dim)
    key, response_key = jnp.arange(prompt_length), jnp.arange(length)
    in_prompt = (key >= prompt_length - prompt_len[:, None]) & (prompt_length + place - key < rule.window)
    in_response = (response_key <= place) & (place - response_key < rule.window)

    prompt_scores = _products(together, prompt[0], rule).reshape(*apart.shape[:-1], prompt_length)
    prompt_scores = jnp.where(in_prompt[:, None, None], prompt_scores, _MASKED)
    response_scores = jnp.where(in_response, _products(apart, response[0], rule), _MASKED)
    largest = jnp.maximum(*(jnp.max(s, axis=-1, keepdims=True) for s in (prompt_scores, response_scores)))
    prompt_weights, response_weights = jnp.exp(prompt_scores - largest), jnp.exp(response_scores - largest)
    total = jnp.sum(prompt_weights, axis=-1, keepdims=True) + jnp.sum(response_weights, axis=-1, keepdims=True)

    weights = prompt_weights.astype(q.dtype).reshape(*together.shape[:-1], prompt_length)
    out = jnp.matmul(weights, prompt[1], preferred_element_type=jnp.float32).reshape(apart.shape)
    out += jnp.matmul(response_weights.astype(q.dtype), response[1], preferred_element_type=jnp.float32)
    out = (out / total).astype(q.dtype).reshape(q.shape)
    return jnp.moveaxis(out, 2, 1).reshape(groups, m, 1, heads * dim)
