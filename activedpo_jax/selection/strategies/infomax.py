"""`infomax`: of every prompt the pair whose preference is least known, argmax σ(U) − σ(L) of its reward difference.

[L, U] = Δ ± c ‖φ‖, with the joint width of the difference; Melikidze et al. 2026 (ActiveUltraFeedback, arXiv
2603.09692) add the widths of the two responses; see `selection.widths`.
"""

import jax

from activedpo_jax.selection.strategies.per_prompt import (
    DIFFERENCES,
    Differences,
    Duels,
    Proposals,
    kept,
    lowest_row,
    strategy,
)
from activedpo_jax.selection.widths import Known, bounds


def _propose(duels: Duels, known: Differences, key: jax.Array) -> Proposals:
    """Scores are σ(U) − σ(L); before any training widths alone rank."""
    width, tolerance = known.width
    scores = spread(known.mean, width)
    tolerance = spread(known.mean, width + tolerance) - scores
    rows = lowest_row(duels, kept(duels, duels.open, scores, tolerance))
    return Proposals(rows, Known(scores[:, 0], tolerance[:, 0]))


def spread(mean: jax.Array, width: jax.Array) -> jax.Array:
    """How far apart the bounds are on the probability that the one response is preferred."""
    low, high = bounds(mean, width, 1.0)
    return jax.nn.sigmoid(high) - jax.nn.sigmoid(low)


STRATEGY = strategy("infomax", _propose, DIFFERENCES, ranks=True)
