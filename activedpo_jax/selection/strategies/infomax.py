"""`infomax`: of every prompt the pair whose preference is least known, argmax σ(U) − σ(L) of its reward difference.

[L, U] = Δ ± c ‖φ‖, with the joint width of the difference; Melikidze et al. 2026 (ActiveUltraFeedback, arXiv
2603.09692) add the widths of the two responses; see `selection.widths`.
"""

import jax
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
from activedpo_jax.selection.widths import Known, bounds


def select(evidence: Evidence, available: jax.Array, key: jax.Array, num_picks: int, block: int, mesh: Mesh) -> Picks:
    """Scores are σ(U) − σ(L); before any training widths alone rank."""
    known = differences("infomax", evidence, mesh)
    return by_prompt(_propose, known, evidence, available, key, num_picks, mesh)


def _propose(duels: Duels, known: Differences, key: jax.Array) -> Proposals:
    width, tolerance = known.width
    scores = spread(known.mean, width)
    tolerance = spread(known.mean, width + tolerance) - scores
    rows = lowest_row(duels, kept(duels, duels.open, scores, tolerance))
    return Proposals(rows, Known(scores[:, 0], tolerance[:, 0]))


def spread(mean: jax.Array, width: jax.Array) -> jax.Array:
    """How far apart the bounds are on the probability that the one response is preferred."""
    low, high = bounds(mean, width, 1.0)
    return jax.nn.sigmoid(high) - jax.nn.sigmoid(low)


STRATEGY = Strategy("infomax", select, frozenset({"features", "rewards"}), design="features", falls_back=NO_CHOICE)
