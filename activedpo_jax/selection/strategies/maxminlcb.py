"""`maxminlcb`: of every prompt the response that is surely best, against the one that it is least sure to beat.

argmax_i min_j L_ij, L_ij = Δ_ij − c ‖φ‖, with the joint width of the difference (Pásztor et al. 2024, arXiv 2406.16745;
Melikidze et al. 2026, arXiv 2603.09692, add the widths of the two responses; see `selection.widths`).  Only responses
count that may be best, with no U_ij = Δ_ij + c ‖φ‖ below 0, unless no pair of two such is left.  Where they draw among
ties, the lowest response comes first.
"""

import jax
import jax.numpy as jnp

from activedpo_jax.selection.strategies.per_prompt import (
    DIFFERENCES,
    Differences,
    Duels,
    Proposals,
    highest,
    kept,
    lowest_response,
    lowest_row,
    may_be_best,
    of_prompt,
    of_response,
    strategy,
)
from activedpo_jax.selection.widths import Known


def _propose(duels: Duels, known: Differences, key: jax.Array) -> Proposals:
    """Scores are max_i min_j L_ij, so that prompts come first whose best response is known best.

    Before any training these are −c times the widths, and those with the smallest come first.
    """
    width, tolerance = known.width
    low, numbers = known.mean - width, of_response(duels)
    candidates = may_be_best(duels, known, numbers)
    both = duels.open & candidates & candidates[:, ::-1]
    left = highest(jnp.zeros_like(low), both, of_prompt(duels)) == 0
    among = jnp.where(left, both, duels.open)
    worst = -highest(-low, among, numbers)
    of_worst = highest(tolerance, among, numbers)
    champion = lowest_response(duels, kept(duels, among, worst, of_worst))
    duel = kept(duels, champion, -low, tolerance)
    rows = lowest_row(duels, duel)
    scores = jnp.max(jnp.where(duel, worst, -jnp.inf), axis=1)
    return Proposals(rows, Known(jnp.where(rows, scores, 0.0), jnp.max(tolerance, axis=1)))


STRATEGY = strategy("maxminlcb", _propose, DIFFERENCES, ranks=True)
