"""Hashes of tokens, on the device, which identify a prompt or a pair in whatever batch, bucket or padding it is.

Every token is mixed with its place, and the sum of the mixed words is mixed again with their number.  Places are
counted from the side without padding: in prompts from the end, in responses from the start.
"""

from typing import Any

import jax
import jax.numpy as jnp

from activedpo_jax.data.groups import Groups, group_pairs

_STEP = 0x9E3779B9  # 2³² / golden ratio
# One for each word of a digest: the first digits of π in hexadecimal.
_PROMPT_SALTS = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
_RESPONSE_SALTS = (0xA4093822, 0x299F31D0, 0x082EFA98, 0xEC4E6C89)


def mix(x: Any) -> jax.Array:
    """The finaliser of MurmurHash3, a bijection of uint32 in which every input bit moves every output bit."""
    x = jnp.asarray(x, jnp.uint32)
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def prompt_hash(groups: Groups, salt: Any) -> jax.Array:
    """A hash of each prompt's tokens: [G] uint32.

    Args:
      groups: the responses are not used.
      salt: scalar uint32, may be traced; each gives another hash.
    """
    width = groups.prompt_ids.shape[-1]
    return _hash(groups.prompt_ids, jnp.arange(width)[::-1], groups.prompt_len, salt)


def pair_digests(groups: Groups) -> jax.Array:
    """128 bits of every pair's prompt and two responses, the same in either order of the two.

    Returns:
      [G, m(m−1)/2, 4] uint32, in the order of `data.groups.group_pairs`.
    """
    places = jnp.arange(groups.response_ids.shape[-1])
    first, second = group_pairs(groups.response_ids.shape[1]).T
    words = []
    for prompt_salt, response_salt in zip(_PROMPT_SALTS, _RESPONSE_SALTS, strict=True):
        prompts = prompt_hash(groups, prompt_salt)
        responses = _hash(groups.response_ids, places, groups.response_len, response_salt)
        words.append(mix(prompts[:, None] + mix(responses[:, first] + responses[:, second])))
    return jnp.stack(words, axis=-1)


def _hash(ids: Any, places: jax.Array, lengths: Any, salt: Any) -> jax.Array:
    """The hash of tokens [..., T] at places [T], counting places below the lengths [...]: [...] uint32."""
    key, lengths = mix(salt), jnp.asarray(lengths)
    tokens = mix(jnp.asarray(ids).astype(jnp.uint32) + key)
    words = mix(tokens + (places.astype(jnp.uint32) + 1) * jnp.uint32(_STEP))
    total = jnp.sum(jnp.where(places < lengths[..., None], words, 0), axis=-1, dtype=jnp.uint32)
    return mix(total + mix(lengths.astype(jnp.uint32) ^ key))
