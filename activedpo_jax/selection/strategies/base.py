"""What strategies are, what they see, and how they are called."""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from activedpo_jax.selection.greedy import Picks
from activedpo_jax.selection.posterior import condition, resolved_lam

# What strategies may look at, about each of N pairs; a pytree.  By name:
#   each kind of evidence that the strategy needs: [N, ...] float32, as `evidence.registry` computes it; the rows of
#     features and embeddings are cut over all devices, and these may be bfloat16
#   groups: [N] int32, which prompt the pair belongs to
#   responses: [N, 2] int32, which two of the prompt's responses it is of, i < j: evidence about two responses is in
#     this order, whichever is shown first
#   posterior: W [n, D] float32 of the labelled pairs' features or embeddings, where the strategy has a `design`
#   known: [n, D] of these pairs, and counts: [n] bool, which of them are there and count
#   lam: λ, scalar
#   width_scale: c of the bounds μ ± c s, scalar
Evidence = dict[str, Any]


class Select(Protocol):
    def __call__(
        self, evidence: Evidence, available: jax.Array, key: jax.Array, num_picks: int, block: int, mesh: Mesh
    ) -> Picks:
        """Picks K of the rows that may be picked, the same on any mesh; traceable under `jax.jit`.

        Args:
          evidence: at least what the strategy needs.
          available: [N] bool, rows that may be picked; evidence about the others may hold anything.
          key: of `jax.random`.
          num_picks: K, static.
          block: candidate rows that a device holds, static; see `greedy`.
          mesh: pool rows are cut over all of its axes; static.

        Returns:
          Picks in pick order; the lowest of equal rows comes first.  Rows are −1, and scores 0, at the end where no row
          was left.  If evidence about a row that may be picked is not finite, all rows are −1 and all scores NaN.

        Raises:
          ValueError: evidence that the strategy needs is None.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Strategy:
    """A rule, and what a round has to know to call it."""

    name: str
    select: Select
    needs: frozenset[str] = frozenset()  # kinds of evidence, by their names in `evidence.registry`
    design: str | None = None  # which of these `evidence.posterior` must be made of; None: it is not used
    ranks: bool = True  # scores mean something
    gains: bool = False  # Σ log(1 + score) is the information gain; see `posterior.information_gain`
    falls_back: str = "every reward margin is zero"  # when it picks at random instead, for the record


def conditioned(
    strategy: Strategy,
    evidence: Evidence,
    available: jax.Array,
    lam: jax.Array | float,
    known: jax.Array | None,
    counts: jax.Array | None,
) -> Evidence:
    """The evidence with λ as used, and with the posterior that the strategy's design asks for.

    Args:
      available: [N] bool, rows that may be picked.
      lam: λ as set; see `posterior.resolved_lam`.
      known: [n, D] float32 or bfloat16, the vectors of labelled pairs; None where the strategy has no design.
      counts: [n] bool, which of these are there and count in V.
    """
    if strategy.design is None:
        return {**evidence, "lam": jnp.float32(lam)}
    assert known is not None and counts is not None
    lam = resolved_lam(evidence[strategy.design], available, lam)
    return {**evidence, "known": known, "counts": counts, "lam": lam, "posterior": condition(known, counts, lam)}


def required(strategy: str, evidence: Evidence, *names: str) -> list[jax.Array]:
    """These entries of the evidence.

    Raises:
      ValueError: one is missing.
    """
    missing = [f"`{name}`" for name in names if evidence.get(name) is None]
    if missing:
        raise ValueError(f"strategy {strategy} needs the evidence {' and '.join(missing)}, which the round has not got")
    return [evidence[name] for name in names]
