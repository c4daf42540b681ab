"""`deltaquantile`: of every prompt the pair at quantile q = 0.05 of U_i − L_j, falling: nearly the most different.

Melikidze et al. 2026 (ActiveUltraFeedback, arXiv 2603.09692).  Of the n ordered pairs (i, j) it is the one at place
⌊q n⌋, counted from 0.  Their code takes the pair with the largest U_i in a window around q, which their settings make a
window of one pair, as here.  Up to 4 responses the place is 0, and the pair that of `deltaucb`; as there, U_i − L_j is
Δ_ij + c ‖φ‖.
"""

import jax
import jax.numpy as jnp

from activedpo_jax.selection.strategies.per_prompt import (
    DIFFERENCES,
    Differences,
    Duels,
    Proposals,
    both_ways,
    lowest_row,
    strategy,
)

QUANTILE = 0.05


def _propose(duels: Duels, known: Differences, key: jax.Array) -> Proposals:
    """Prompts come at random: the largest difference of all, by which they could be ranked, is what the rule avoids."""
    gaps, count = known.mean + known.width.values, duels.prompts.size
    prompts, places = both_ways(duels.prompts).reshape(-1), jnp.arange(2 * count, dtype=jnp.int32)
    operands = (~duels.open.reshape(-1), prompts, -gaps.reshape(-1), places)
    absent, sorted_prompts, _, order = jax.lax.sort(operands, num_keys=4)
    begin = jax.ops.segment_min(jnp.where(absent, 2 * count, places), sorted_prompts, count)
    ordered_pairs = jax.ops.segment_sum((~absent).astype(jnp.int32), sorted_prompts, count)
    # Exact for integers, where ⌊q n⌋ in float32 would be wrong for some n.
    wanted = begin + ordered_pairs * round(100 * QUANTILE) // 100
    found = ~absent & (places == wanted[sorted_prompts])
    return Proposals(lowest_row(duels, jnp.zeros(2 * count, bool).at[order].set(found).reshape(-1, 2)))


STRATEGY = strategy("deltaquantile", _propose, DIFFERENCES, ranks=False)
