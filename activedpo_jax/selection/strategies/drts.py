"""`drts`: Double Reverse Thompson Sampling on every prompt: a draw of the best response against one of the worst.

y_1 as in `dts`; y_2 = argmax_j −μ_j + c z_j s_j, redrawn until it is another that may be shown with y_1, as there
(Melikidze et al. 2026, ActiveUltraFeedback, arXiv 2603.09692).
"""

import jax
from jax.sharding import Mesh

from activedpo_jax.selection.greedy import Picks
from activedpo_jax.selection.strategies.base import Evidence, Strategy
from activedpo_jax.selection.strategies.dts import two_draws
from activedpo_jax.selection.strategies.per_prompt import (
    NO_CHOICE,
    Duels,
    Proposals,
    Rewards,
    by_prompt,
    rewards_of_responses,
)


def select(evidence: Evidence, available: jax.Array, key: jax.Array, num_picks: int, block: int, mesh: Mesh) -> Picks:
    """Prompts come at random.  Before any training the draws are those of widths."""
    known = rewards_of_responses("drts", evidence, mesh)
    return by_prompt(_propose, known, evidence, available, key, num_picks, mesh)


def _propose(duels: Duels, known: Rewards, key: jax.Array) -> Proposals:
    return two_draws(duels, known, -known.mean, key)


STRATEGY = Strategy(
    "drts",
    select,
    frozenset({"response_features", "rewards"}),
    design="response_features",
    ranks=False,
    falls_back=NO_CHOICE,
)
