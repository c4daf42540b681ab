"""The strategies: which K unlabelled pairs to ask about, from shared evidence.

A strategy names the evidence that it needs, so that a run computes no other, and is a pure function that can be traced
into the compiled round.  Strategies differ in their definitions, not in what they see and return.  A new one is a file
next to these, and a line below; a user's own needs neither, see `selection.user`.
"""

import difflib

from activedpo_jax.selection.strategies import (
    activedpo,
    activedpo_fisher,
    activedpo_norm,
    activedpo_topk,
    adpo,
    apl_certainty,
    apl_entropy,
    aplp,
    apo,
    badge,
    deltaquantile,
    deltaucb,
    dopt,
    drts,
    dts,
    ids,
    infomax,
    kcenter,
    margin,
    maxminlcb,
    random,
    rucb,
    transductive,
    ultrafeedback,
)
from activedpo_jax.selection.strategies.base import Evidence, Select, Strategy, conditioned
from activedpo_jax.selection.user import user_strategy

__all__ = ["STRATEGIES", "Evidence", "Select", "Strategy", "conditioned", "get"]

STRATEGIES: dict[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        activedpo.STRATEGY,
        activedpo_fisher.STRATEGY,
        activedpo_norm.STRATEGY,
        activedpo_topk.STRATEGY,
        adpo.STRATEGY,
        apl_certainty.STRATEGY,
        apl_entropy.STRATEGY,
        aplp.STRATEGY,
        apo.STRATEGY,
        badge.STRATEGY,
        deltaquantile.STRATEGY,
        deltaucb.STRATEGY,
        dopt.STRATEGY,
        drts.STRATEGY,
        dts.STRATEGY,
        ids.STRATEGY,
        infomax.STRATEGY,
        kcenter.STRATEGY,
        margin.STRATEGY,
        maxminlcb.STRATEGY,
        random.STRATEGY,
        rucb.STRATEGY,
        transductive.STRATEGY,
        ultrafeedback.STRATEGY,
    )
}


def get(name: str) -> Strategy:
    """The strategy of that name, or a user's own where it is `module:name`.

    Raises:
      ValueError: there is none; names the nearest, and lists all.
    """
    if ":" in name:
        return user_strategy(name)
    if name not in STRATEGIES:
        nearest = difflib.get_close_matches(name, STRATEGIES, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"config.strategies: there is no strategy {name!r}; did you mean {nearest!r}? "
            f"Known: {', '.join(sorted(STRATEGIES))}"
        )
    return STRATEGIES[name]
