"""`ultrafeedback`: of four random responses to every prompt, the best by μ against a random one of the other three.

As the data set UltraFeedback was paired (Cui et al. 2024, arXiv 2310.01377), with the implicit reward as the score.  Of
fewer than four responses all are taken.  If no pair of the four may be picked, all responses of the prompt are.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from activedpo_jax.selection.greedy import Picks
from activedpo_jax.selection.strategies.base import Evidence, Strategy, required
from activedpo_jax.selection.strategies.per_prompt import (
    NO_CHOICE,
    Duels,
    Proposals,
    by_prompt,
    drawn_of_responses,
    highest,
    kept,
    lowest_response,
    lowest_row,
    of_prompt,
)
from activedpo_jax.selection.strategies.random import draw_where_flat

RESPONSES = 4


def select(evidence: Evidence, available: jax.Array, key: jax.Array, num_picks: int, block: int, mesh: Mesh) -> Picks:
    """Prompts come at random.  Random where every reward is 0, as in round 1."""
    (rewards,) = required("ultrafeedback", evidence, "rewards")
    picks = by_prompt(_propose, rewards, evidence, available, key, num_picks, mesh)
    return draw_where_flat(picks, jnp.max(jnp.abs(rewards), axis=1), available, key)


def _propose(duels: Duels, rewards: jax.Array, key: jax.Array) -> Proposals:
    of_draw, of_opponent = jax.random.split(key)
    tickets = drawn_of_responses(of_draw, duels)
    left, four = duels.open, jnp.zeros_like(duels.open)
    for _ in range(RESPONSES):
        next_one = lowest_response(duels, kept(duels, left, tickets))
        left, four = left & ~next_one, four | next_one
    within = four & four[:, ::-1]
    any_within = highest(jnp.zeros_like(rewards), within, of_prompt(duels)) == 0
    best = lowest_response(duels, kept(duels, jnp.where(any_within, within, duels.open), rewards))
    tickets = drawn_of_responses(of_opponent, duels)[:, ::-1]
    return Proposals(lowest_row(duels, kept(duels, best, tickets)))


STRATEGY = Strategy(
    "ultrafeedback",
    select,
    frozenset({"rewards"}),
    ranks=False,
    falls_back=f"{NO_CHOICE}, or every reward is zero",
)
