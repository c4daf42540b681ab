"""`aplp`: the half of the prompts with the highest entropy, then the largest |Δ| among their pairs.

Muldrew et al. 2024 (arXiv 2402.08114); the baseline that arXiv 2505.19241 compares with.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from activedpo_jax.selection.greedy import Picks
from activedpo_jax.selection.ranking import first
from activedpo_jax.selection.strategies.base import Evidence, Strategy, required
from activedpo_jax.selection.strategies.random import draw_where_flat


def select(evidence: Evidence, available: jax.Array, key: jax.Array, num_picks: int, block: int, mesh: Mesh) -> Picks:
    """Scores are |Δ|.  Random where every Δ is 0, as in round 1; the key is used only there.

    Only prompts with a pair that may be picked count, and half of an odd number is rounded up.  If the half has fewer
    than K pairs, those of the other prompts follow, prompt by prompt as H falls, and within a prompt as |Δ| falls.
    Among prompts with equal H, the one with the lowest number comes first.
    """
    margins, entropies, groups = required("aplp", evidence, "margins", "entropies", "groups")
    # Where the entropy is not finite, the margin must not count either.
    sizes = jnp.where(jnp.isfinite(entropies), jnp.abs(margins), jnp.nan)
    rank, count = _prompt_ranks(entropies, groups, available)
    half = (count + 1) // 2
    keys = (jnp.where(rank < half, -1, rank), -sizes)
    return draw_where_flat(first(keys, sizes, available, num_picks), sizes, available, key)


def _prompt_ranks(entropies: jax.Array, groups: jax.Array, available: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The rank of each row's prompt as H falls, [N] int32, and the number of prompts."""
    rows = jnp.arange(groups.shape[0], dtype=jnp.int32)
    absent, _, prompts, order = jax.lax.sort((~available, -entropies, groups, rows), num_keys=3, is_stable=True)
    begins = ~absent & jnp.concatenate([jnp.ones(1, bool), prompts[1:] != prompts[:-1]])
    ranks = jnp.cumsum(begins, dtype=jnp.int32) - 1
    return jnp.zeros_like(rows).at[order].set(ranks), jnp.sum(begins, dtype=jnp.int32)


STRATEGY = Strategy("aplp", select, frozenset({"margins", "entropies"}))
