"""`ids`: information-directed sampling on every prompt (Russo & Van Roy 2014, arXiv 1403.5556).

The action is a pair, drawn from the distribution π that minimises (Σ π Δ)²/Σ π g, the squared expected regret over the
information.  Both are those of duels, with p_ij = σ(μ_i − μ_j) within its bounds [l_ij, u_ij] = σ(Δ_ij ± c ‖φ‖):

    regret of i    ρ_i = max_j u_ji − ½, at least 0: how surely i may lose to some response
    of a pair      Δ = (ρ_i + ρ_j)/2, as in dueling bandits (Yue et al. 2012)
    information    g = (u_ij − l_ij)²/4, the largest variance of p_ij that its bounds allow (Popoviciu 1935)

The paper's g, the mutual information of the best action and the answer, would need samples of all rewards together.  In
its place the paper puts how much of the variance of p_ij the best action explains, which g here bounds; Δ, too, is a
bound.
"""

import jax
import jax.numpy as jnp

from activedpo_jax.selection.strategies.infomax import spread
from activedpo_jax.selection.strategies.per_prompt import (
    DIFFERENCES,
    Differences,
    Duels,
    Proposals,
    both_ways,
    drawn,
    highest,
    kept,
    lowest_row,
    of_response,
    strategy,
)

# Halvings of the interval that t is in.
_HALVINGS = 30


def _propose(duels: Duels, known: Differences, key: jax.Array) -> Proposals:
    """Prompts come at random.  Before any training regret and information are those of widths."""
    width, numbers = known.width.values, of_response(duels)
    # Of a duel of i with j, u_ji is reached from −Δ_ij.
    losing = highest(jax.nn.sigmoid(width - known.mean), duels.open, numbers)
    rho = jnp.where(duels.open, jnp.maximum(losing - 0.5, 0.0), 0.0)
    regret = jnp.mean(rho, axis=1)
    information = jnp.square(spread(known.mean, width)[:, 0]) / 4
    low, high, chance = _mixture(duels, regret, information)
    return Proposals(jnp.where(drawn(key, duels.groups) < chance, low, high))


def _mixture(duels: Duels, regret: jax.Array, information: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The best distribution over the pairs of each prompt, of which it needs two at most, as the paper shows.

    x²/y = max_t 2tx − t²y, so that min_π (Σ π Δ)²/Σ π g = max_t min_a 2tΔ_a − t²g_a: a concave function of one number
    for each prompt, whose maximum lies between the two pairs that attain it where it rises and where it falls.

    Returns:
      the pair where it rises and where it falls, [N] bool each, and the probability of the first, [N].
    """
    values, count = (both_ways(regret), both_ways(information)), regret.size

    def of_rows(value: jax.Array, rows: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(jnp.where(rows, value, 0.0), duels.prompts, count)[duels.prompts]

    def attains(t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The pair of each prompt with the smallest 2tΔ − t²g, and half the slope there."""
        terms = t[:, None] * values[1] - 2 * values[0]
        rows = lowest_row(duels, kept(duels, duels.open, terms))
        return rows, of_rows(regret, rows) - t * of_rows(information, rows)

    def halve(_: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        bottom, top, low, high = carry
        middle = (bottom + top) / 2
        rows, slope = attains(middle)
        rises = slope > 0
        return (
            jnp.where(rises, middle, bottom),
            jnp.where(rises, top, middle),
            jnp.where(rises, rows, low),
            jnp.where(rises, high, rows),
        )

    # At 0 it rises, or is flat; at 2Δ_a/g_a it has come down to 0 or below.
    ratios = jnp.where(values[1] > 0, -2 * values[0] / jnp.where(values[1] > 0, values[1], 1.0), -jnp.inf)
    best = highest(ratios, duels.open, both_ways(duels.prompts))[:, 0]
    top = jnp.where(jnp.isfinite(best), -best, 1.0)
    start = (jnp.zeros_like(top), top, attains(jnp.zeros_like(top))[0], attains(top)[0])
    bottom, _, low, high = jax.lax.fori_loop(0, _HALVINGS, halve, start)
    rising = jnp.maximum(of_rows(regret, low) - bottom * of_rows(information, low), 0.0)
    falling = jnp.maximum(bottom * of_rows(information, high) - of_rows(regret, high), 0.0)
    chance = jnp.where(rising + falling > 0, falling / jnp.where(rising + falling > 0, rising + falling, 1.0), 1.0)
    return low, high, chance


STRATEGY = strategy("ids", _propose, DIFFERENCES, ranks=False)
