"""One token from logits: temperature, top-k, top-p, and randomness that depends on the request alone.

Temperature, then top-k, then top-p, each as in `transformers`.  The cut-off is found without sorting: its threshold is
determined bit by bit, in 32 passes over the vocabulary.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

_HIGHEST_BIT = np.uint32(0x80000000)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Raises:
      ValueError: a number is out of its range.
    """

    temperature: float = 1.0  # 0: always the likeliest token
    top_k: int = 0  # among the k likeliest tokens; 0: all
    top_p: float = 1.0  # among the fewest likeliest tokens whose probabilities reach p

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature}: expected 0 (greedy) or more")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}: expected 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: expected a number above 0, at most 1 (all tokens)")


def draw(sampling: Sampling, logits: jax.Array, seeds: jax.Array, samples: jax.Array, place: jax.Array) -> jax.Array:
    """The next token of every response.

    Args:
      logits: [G, m, V] float32.
      seeds: [G] uint32, of the requests; samples: [G, m], the number of each response among its request's samples;
        place: scalar, of the token in its response.  The noise depends on these alone.

    Returns:
      [G, m] int32; the first of equally likely tokens.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    scores = truncate(sampling, logits / sampling.temperature)

    def noise(seed: jax.Array, sample: jax.Array) -> jax.Array:
        # The generator is named, since a seed must mean the same on every platform.
        key = jax.random.wrap_key_data(jnp.stack([jnp.uint32(0), seed.astype(jnp.uint32)]), impl="threefry2x32")
        key = jax.random.fold_in(jax.random.fold_in(key, sample), place)
        return jax.random.gumbel(key, logits.shape[-1:], jnp.float32)

    # The argmax of log p + Gumbel noise has the distribution p.
    per_response = jax.vmap(jax.vmap(noise, in_axes=(None, 0)))
    return jnp.argmax(scores + per_response(seeds, samples), axis=-1).astype(jnp.int32)


def truncate(sampling: Sampling, logits: jax.Array) -> jax.Array:
    """[..., V] float32 with −∞ for what top-k and then top-p cut off.  Equal logits are kept or cut together: all that
    are as likely as the last one kept are kept."""
    vocabulary = logits.shape[-1]
    if 0 < sampling.top_k < vocabulary:
        keys = _ordered(logits)
        # The k-th largest: the largest key that k keys reach.
        kth = _largest(lambda t: jnp.sum(keys >= t, axis=-1, keepdims=True) >= sampling.top_k, keys)
        logits = jnp.where(keys >= kth, logits, -jnp.inf)
    if sampling.top_p < 1:
        keys, probs = _ordered(logits), jax.nn.softmax(logits, axis=-1)
        # The tail to cut: as many of the unlikeliest tokens as have 1 − p between them, but never all.
        tail = lambda t: jnp.sum(jnp.where(keys <= t, probs, 0.0), axis=-1, keepdims=True)  # noqa: E731
        last_out = _largest(lambda t: tail(t) <= 1 - sampling.top_p, keys)
        likeliest = jnp.max(keys, axis=-1, keepdims=True)
        logits = jnp.where((keys > last_out) | (keys == likeliest), logits, -jnp.inf)
    return logits


def _ordered(x: jax.Array) -> jax.Array:
    """uint32 in the order of the float32 numbers `x`: their bits, with those of negative ones inverted."""
    x = x + 0.0  # −0 becomes 0
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >= _HIGHEST_BIT, ~bits, bits | _HIGHEST_BIT)


def _largest(holds: Callable[[jax.Array], jax.Array], keys: jax.Array) -> jax.Array:
    """The largest uint32 [..., 1] for which `holds`, a property that holds up to some number, and not beyond."""

    def bit(i: jax.Array, found: jax.Array) -> jax.Array:
        higher = found | (_HIGHEST_BIT >> i.astype(jnp.uint32))
        return jnp.where(holds(higher), higher, found)

    return jax.lax.fori_loop(0, 32, bit, jnp.zeros((*keys.shape[:-1], 1), jnp.uint32))
