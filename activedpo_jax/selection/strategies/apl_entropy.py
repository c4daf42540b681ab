"""`apl_entropy`: the prompts whose responses the policy is least sure of, those of highest H (Muldrew et al. 2024).

arXiv 2402.08114, section 3, where each prompt has one pair.  Of several, one is drawn, and the prompt's others come
after those of all prompts.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from activedpo_jax.selection.greedy import Picks
from activedpo_jax.selection.ranking import first, tickets
from activedpo_jax.selection.strategies.base import Evidence, Strategy, required


def select(evidence: Evidence, available: jax.Array, key: jax.Array, num_picks: int, block: int, mesh: Mesh) -> Picks:
    """Scores are H.  The key decides which pair of a prompt is first."""
    entropies, groups = required("apl_entropy", evidence, "entropies", "groups")
    return first((_places(groups, available, key), -entropies), entropies, available, num_picks)


def _places(groups: jax.Array, available: jax.Array, key: jax.Array) -> jax.Array:
    """0 for the first pair of each prompt in random order, 1 for its second, ...: [N] int32."""
    rows = jnp.arange(groups.size, dtype=jnp.int32)
    absent, prompts, _, order = jax.lax.sort((~available, groups, tickets(key, groups.size), rows), num_keys=3)
    begins = jnp.concatenate([jnp.ones(1, bool), (prompts[1:] != prompts[:-1]) | (absent[1:] != absent[:-1])])
    places = rows - jax.lax.cummax(jnp.where(begins, rows, 0))
    return jnp.zeros_like(rows).at[order].set(places)


STRATEGY = Strategy("apl_entropy", select, frozenset({"entropies"}))
