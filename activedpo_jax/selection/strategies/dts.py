"""`dts`: Double Thompson Sampling on every prompt: two draws of the best response, redrawn until they differ.

y_1 = argmax_j μ_j + c z_j s_j, z_j uniform on (−1, 1), and y_2 likewise (Melikidze et al. 2026, ActiveUltraFeedback,
arXiv 2603.09692, after Dwaracherla et al. 2024, arXiv 2402.00396).  If 30 draws, as many as in their settings, give no
y_2 that may be shown with y_1, it is a random one that may, where their code may return y_1 twice.
"""

import jax
import jax.numpy as jnp

from activedpo_jax.selection.strategies.per_prompt import (
    REWARDS,
    Duels,
    Proposals,
    Rewards,
    drawn_of_responses,
    highest,
    kept,
    lowest_response,
    lowest_row,
    of_prompt,
    strategy,
)

TRIES = 30


def _propose(duels: Duels, known: Rewards, key: jax.Array) -> Proposals:
    """Prompts come at random.  Before any training the draws are those of widths."""
    return two_draws(duels, known, known.mean, key)


def two_draws(duels: Duels, known: Rewards, second_mean: jax.Array, key: jax.Array) -> Proposals:
    """The pairs (y_1, y_2); y_2 = argmax_j of `second_mean` + c z_j s_j."""

    def sampled(mean: jax.Array, key: jax.Array) -> jax.Array:
        """The duels of each prompt's response with the largest draw."""
        draws = mean + known.width * drawn_of_responses(key, duels, low=-1.0)
        return lowest_response(duels, kept(duels, duels.open, draws))

    first = sampled(known.mean, jax.random.fold_in(key, 0))

    def without(found: jax.Array) -> jax.Array:
        """The duels of y_1 on prompts that have no y_2 yet."""
        return first & (highest(jnp.zeros_like(known.mean), found, of_prompt(duels)) < 0)

    def redraw(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        tries, found = carry
        second = sampled(second_mean, jax.random.fold_in(key, 1 + tries))
        return tries + 1, found | (without(found) & second[:, ::-1])

    def unfinished(carry: tuple[jax.Array, jax.Array]) -> jax.Array:
        return (carry[0] < TRIES) & jnp.any(without(carry[1]))

    tries, found = jax.lax.while_loop(unfinished, redraw, (jnp.int32(0), jnp.zeros_like(first)))
    tickets = drawn_of_responses(jax.random.fold_in(key, 1 + TRIES), duels)[:, ::-1]
    return Proposals(lowest_row(duels, found | kept(duels, without(found), tickets)))


STRATEGY = strategy("dts", _propose, REWARDS, ranks=False)
