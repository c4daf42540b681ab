"""`deltaucb`: of every prompt the two responses whose rewards may differ most, argmax U_i − L_j.

Melikidze et al. 2026 (ActiveUltraFeedback, arXiv 2603.09692).  U_i − L_j is Δ_ij + c ‖φ‖ here, with the joint width of
the difference where they add those of the two responses; see `selection.widths`.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from activedpo_jax.selection.greedy import Picks
from activedpo_jax.selection.strategies.base import Evidence, Strategy
from activedpo_jax.selection.strategies.per_prompt import (
    NO_CHOICE,
    Differences,
    Duels,
    Proposals,
    by_prompt,
    differences,
    kept,
    lowest_row,
)
from activedpo_jax.selection.widths import Known


def select(evidence: Evidence, available: jax.Array, key: jax.Array, num_picks: int, block: int, mesh: Mesh) -> Picks:
    """Scores are |Δ| + c ‖φ‖, the larger of a pair's two directions; before any training widths alone rank."""
    known = differences("deltaucb", evidence, mesh)
    return by_prompt(_propose, known, evidence, available, key, num_picks, mesh)


def _propose(duels: Duels, known: Differences, key: jax.Array) -> Proposals:
    scores, tolerance = known.mean + known.width.values, known.width.tolerance
    rows = lowest_row(duels, kept(duels, duels.open, scores, tolerance))
    return Proposals(rows, Known(jnp.max(scores, axis=1), tolerance[:, 0]))


STRATEGY = Strategy("deltaucb", select, frozenset({"features", "rewards"}), design="features", falls_back=NO_CHOICE)
