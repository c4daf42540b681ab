"""`deltaucb`: of every prompt the two responses whose rewards may differ most, argmax U_i − L_j.

Melikidze et al. 2026 (ActiveUltraFeedback, arXiv 2603.09692).  U_i − L_j is Δ_ij + c ‖φ‖ here, with the joint width of
the difference where they add those of the two responses; see `selection.widths`.
"""

import jax
import jax.numpy as jnp

from activedpo_jax.selection.strategies.per_prompt import (
    DIFFERENCES,
    Differences,
    Duels,
    Proposals,
    kept,
    lowest_row,
    strategy,
)
from activedpo_jax.selection.widths import Known


def _propose(duels: Duels, known: Differences, key: jax.Array) -> Proposals:
    """Scores are |Δ| + c ‖φ‖, the larger of a pair's two directions; before any training widths alone rank."""
    scores, tolerance = known.mean + known.width.values, known.width.tolerance
    rows = lowest_row(duels, kept(duels, duels.open, scores, tolerance))
    return Proposals(rows, Known(jnp.max(scores, axis=1), tolerance[:, 0]))


STRATEGY = strategy("deltaucb", _propose, DIFFERENCES, ranks=True)
