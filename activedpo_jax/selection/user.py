"""A user's own strategy, named in the config as `module:name`.

The name is that of a function of evidence, whose parameters say which: each is a kind of evidence in
`evidence.registry`, or `groups`, `responses` or `key`, as in `strategies.base`.  It returns a score for every row, [N],
and the K largest are picked.  A rule that looks at its own picks is a `Strategy` instead.
"""

import functools
import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from activedpo_jax import user_code
from activedpo_jax.selection.greedy import Picks
from activedpo_jax.selection.ranking import first
from activedpo_jax.selection.strategies.base import Evidence, Strategy, required

_NOT_COMPUTED = frozenset({"groups", "responses", "key"})  # parameters that every round has


@functools.cache
def user_strategy(name: str) -> Strategy:
    """The strategy that `module:name` names.

    Raises:
      ValueError: it cannot be imported, or is neither a `Strategy` nor a function of named evidence.
    """
    found = user_code.load(name, "config.strategies")
    if isinstance(found, Strategy):
        return Strategy(name, found.select, found.needs, found.design, found.ranks, found.gains, found.falls_back)
    if not callable(found):
        raise ValueError(
            f"config.strategies: {name!r} is a {type(found).__name__}; expected a `Strategy`, or a function of evidence"
        )
    parameters = tuple(inspect.signature(found).parameters)
    return Strategy(name, _select_of(name, found, parameters), frozenset(parameters) - _NOT_COMPUTED)


def _select_of(name: str, score: Callable[..., jax.Array], parameters: tuple[str, ...]) -> Callable[..., Picks]:
    def select(
        evidence: Evidence, available: jax.Array, key: jax.Array, num_picks: int, block: int, mesh: Mesh
    ) -> Picks:
        seen = {**evidence, "key": key}
        scores = score(**dict(zip(parameters, required(name, seen, *parameters), strict=True)))
        if jnp.shape(scores) != available.shape:
            raise ValueError(
                f"config.strategies: {name} returned scores of shape {list(jnp.shape(scores))}; expected "
                f"{list(available.shape)}, one for every row"
            )
        scores = jnp.asarray(scores, jnp.float32)
        return first((-scores,), scores, available, num_picks)

    return select
