"""`drts`: Double Reverse Thompson Sampling on every prompt: a draw of the best response against one of the worst.

y_1 as in `dts`; y_2 = argmax_j −μ_j + c z_j s_j, redrawn until it is another that may be shown with y_1, as there
(Melikidze et al. 2026, ActiveUltraFeedback, arXiv 2603.09692).
"""

import jax

from activedpo_jax.selection.strategies.dts import two_draws
from activedpo_jax.selection.strategies.per_prompt import (
    REWARDS,
    Duels,
    Proposals,
    Rewards,
    strategy,
)


def _propose(duels: Duels, known: Rewards, key: jax.Array) -> Proposals:
    """Prompts come at random.  Before any training the draws are those of widths."""
    return two_draws(duels, known, -known.mean, key)


STRATEGY = strategy("drts", _propose, REWARDS, ranks=False)
