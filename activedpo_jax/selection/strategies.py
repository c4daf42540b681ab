"""The strategies: which K unlabelled pairs to ask about, from shared evidence.

A strategy names the evidence that it needs, so that a run computes no other, and is a pure function that can be traced
into the compiled round.  Their definitions differ; what they see, and what they return, does not.
"""

import dataclasses
import difflib
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from activedpo_jax.selection.greedy import Picks, greedy


class Evidence(NamedTuple):
    """What strategies may look at; a pytree of arrays.  What no strategy of the run needs is None."""

    features: jax.Array | None = None  # φ of the pool's pairs: [N, D] float32, rows cut over all devices
    posterior: jax.Array | None = None  # W of the labelled pairs, from the same features: [n, D] float32
    lam: jax.Array | float = 1.0  # λ


class Select(Protocol):
    def __call__(
        self, evidence: Evidence, available: jax.Array, key: jax.Array, num_picks: int, block: int, mesh: Mesh
    ) -> Picks:
        """Picks K of the rows that may be picked, the same on any mesh; traceable under `jax.jit`.

        Args:
          evidence: at least what the strategy needs.
          available: [N] bool, rows that may be picked.
          key: of `jax.random`.
          num_picks: K, static.
          block: candidate rows that a device holds, static; see `greedy`.
          mesh: devices, over all axes of which pool rows are cut; static.

        Returns:
          Picks in pick order: rows [K] int32, −1 at the end where no row was left; scores [K] float32, 0 there.

        Raises:
          ValueError: evidence that the strategy needs is None.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Strategy:
    name: str
    needs: frozenset[str]  # fields of Evidence that must not be None; `features` brings `posterior` with it
    select: Select


def _activedpo(
    evidence: Evidence, available: jax.Array, key: jax.Array, num_picks: int, block: int, mesh: Mesh
) -> Picks:
    """Greedy argmax φᵀV⁻¹φ with V ← V + φφᵀ after each pick (arXiv 2505.19241); the key is not used."""
    features, posterior, lam = evidence
    if features is None or posterior is None:
        raise ValueError("strategy activedpo needs the evidence `features` and `posterior`; at least one is None")
    return greedy(features, available, posterior, lam, num_picks=num_picks, block=block, mesh=mesh)


def _random(evidence: Evidence, available: jax.Array, key: jax.Array, num_picks: int, block: int, mesh: Mesh) -> Picks:
    """Uniform without replacement, with score 0: the baseline that all must beat.

    Every row draws a ticket from the key and its own number, and the lowest tickets win.  So the picks do not depend on
    how many rows follow: padding the pool to a multiple of the devices changes nothing.
    """
    rows = jnp.arange(available.shape[0], dtype=jnp.int32)
    tickets = jax.vmap(lambda row: jax.random.bits(jax.random.fold_in(key, row)))(rows)
    _, _, order = jax.lax.sort((~available, tickets, rows), num_keys=3)
    order = jnp.pad(order[:num_picks], (0, max(0, num_picks - rows.size)), constant_values=-1)
    chosen = jnp.where(jnp.arange(num_picks) < jnp.sum(available), order, -1)
    return Picks(chosen, jnp.zeros(num_picks, jnp.float32))


STRATEGIES: dict[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        Strategy("activedpo", frozenset({"features"}), _activedpo),
        Strategy("random", frozenset(), _random),
    )
}


def get(name: str) -> Strategy:
    """The strategy of that name.

    Raises:
      ValueError: there is none; names the nearest and all there are.
    """
    if name not in STRATEGIES:
        nearest = difflib.get_close_matches(name, STRATEGIES, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"config.strategies: there is no strategy {name!r}; did you mean {nearest!r}? "
            f"Known: {', '.join(sorted(STRATEGIES))}"
        )
    return STRATEGIES[name]
