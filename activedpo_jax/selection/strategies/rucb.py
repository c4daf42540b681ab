"""`rucb`: Relative Upper Confidence Bound on every prompt (Zoghi et al. 2014, arXiv 1312.3393, algorithm 1).

With upper bounds u_ij on the probability that i is preferred to j, a champion is drawn from the candidates, those with
u_ij ≥ ½ for all j, and shown with the challenger argmax_j u_ji.  Here u_ij = σ(Δ_ij + c ‖φ‖), from the posterior, where
the paper counts wins; the response with the best mean is always a candidate.  Three things are not carried over.  A
prompt is visited once at a θ, so that there is no earlier candidate to prefer, and the draw is uniform.  A champion
cannot be its own challenger, since nothing would be asked: the challenger is the best of the others.  Where the paper
draws among tied challengers, the lowest row comes first.
"""

import jax

from activedpo_jax.selection.strategies.per_prompt import (
    DIFFERENCES,
    Differences,
    Duels,
    Proposals,
    drawn_of_responses,
    kept,
    lowest_response,
    lowest_row,
    may_be_best,
    of_response,
    strategy,
)


def _propose(duels: Duels, known: Differences, key: jax.Array) -> Proposals:
    """Prompts come at random.  Before any training every response is a candidate, and d is the widest duel."""
    candidates = duels.open & may_be_best(duels, known, of_response(duels))
    champion = lowest_response(duels, kept(duels, candidates, drawn_of_responses(key, duels)))
    against = known.width.values - known.mean  # of d with c; σ keeps the order
    return Proposals(lowest_row(duels, kept(duels, champion, against, known.width.tolerance)))


STRATEGY = strategy("rucb", _propose, DIFFERENCES, ranks=False)
