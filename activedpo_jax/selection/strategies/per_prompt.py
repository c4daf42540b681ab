"""Selection prompt by prompt: a rule of dueling bandits says which two of a prompt's m responses to show.

The rule proposes one pair of every prompt.  Proposals are ranked across prompts by the rule's score, where it has one,
else at random, and the K first are picked.  Where K is larger than the number of prompts, all are picked, and the rule
is asked again about what is left of each.

A pair that may not be picked, as one that is labelled already, is out of the duel: the rule compares a response with
those others alone that it may still be shown with.  Where every prompt has one pair only, as with two responses, there
is nothing for a rule to choose, and the picks are random.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from activedpo_jax.selection.greedy import Picks
from activedpo_jax.selection.ranking import draw, first, instead, largest, unless_broken
from activedpo_jax.selection.strategies.base import Evidence, Strategy, required
from activedpo_jax.selection.widths import Known, widths

NO_CHOICE = "no prompt has two pairs to choose from"


class Duels(NamedTuple):
    """N pairs i < j as 2N duels of a response with another: [:, 0] is i with j, and [:, 1] is j with i."""

    open: jax.Array  # [N, 2] bool: of pairs that may be picked
    prompts: jax.Array  # [N] int32 from 0 to N − 1, one number for each prompt
    groups: jax.Array  # [N] int32, which prompt of the round's candidates it is; everything random depends on it
    responses: jax.Array  # [N, 2] int32, the one that each duel is of; reversed, its opponent


class Differences(NamedTuple):
    """What the posterior says of μ_i − μ_j, for each duel of i with j: [N, 2] float32."""

    mean: jax.Array
    width: Known  # c ‖φ‖, c of the bounds, in V⁻¹


class Rewards(NamedTuple):
    """What the posterior says of μ_i, for each duel of i with j: [N, 2] float32."""

    mean: jax.Array
    width: jax.Array  # c s_i


class Proposals(NamedTuple):
    """One pair of every prompt that has one."""

    rows: jax.Array  # [N] bool
    scores: Known | None = None  # [N], to rank them by; None: at random


Propose = Callable[[Duels, Any, jax.Array], Proposals]  # of duels, what is known of rewards, and a key of `jax.random`


def differences(strategy: str, evidence: Evidence, mesh: Mesh) -> Differences:
    """Those of all duels, from `features` and `rewards`.

    Raises:
      ValueError: evidence is missing.
    """
    names = ("rewards", "features", "posterior", "lam", "width_scale")
    rewards, features, posterior, lam, scale = required(strategy, evidence, *names)
    of_pairs = Known(*(scale * x for x in widths(features, posterior, lam, mesh)))
    delta = rewards[:, 0] - rewards[:, 1]
    return Differences(jnp.stack([delta, -delta], axis=1), Known(*(both_ways(x) for x in of_pairs)))


def rewards_of_responses(strategy: str, evidence: Evidence, mesh: Mesh) -> Rewards:
    """Those of all duels, from `response_features` and `rewards`.

    Raises:
      ValueError: evidence is missing.
    """
    names = ("rewards", "response_features", "posterior", "lam", "width_scale")
    rewards, features, posterior, lam, scale = required(strategy, evidence, *names)
    return Rewards(rewards, scale * widths(features, posterior, lam, mesh).values)


def by_prompt(
    propose: Propose, known: Any, evidence: Evidence, available: jax.Array, key: jax.Array, num_picks: int, mesh: Mesh
) -> Picks:
    """K pairs that a rule proposes.

    Args:
      propose: the rule.
      known: a pytree of [N, 2] float32, what it looks at.
      evidence, available, key, num_picks, mesh: as strategies see them.

    Returns:
      As a strategy does.

    Raises:
      ValueError: `groups` or `responses` are missing.
    """
    groups, responses = required("by prompt", evidence, "groups", "responses")
    # Next to the vectors these are few numbers: every device has them all, and computes the same.
    whole = NamedSharding(mesh, P())
    known, groups, responses, available = jax.lax.with_sharding_constraint((known, groups, responses, available), whole)
    duels = Duels(both_ways(available), numbered(groups), groups, responses)
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(x), axis=1) for x in jax.tree.leaves(known)]), axis=0)
    broken = jnp.any(available & ~finite)
    limit = jnp.where(broken, 0, jnp.minimum(jnp.sum(available), num_picks))
    places = jnp.arange(num_picks)

    def ask(carry: tuple[jax.Array, jax.Array, jax.Array, Picks]) -> tuple[jax.Array, jax.Array, jax.Array, Picks]:
        times, made, left, picks = carry
        proposed = propose(duels._replace(open=both_ways(left)), known, jax.random.fold_in(key, 2 * times))
        if proposed.scores is None:
            tickets = drawn(jax.random.fold_in(key, 2 * times + 1), groups)
            ranked = first((tickets,), jnp.zeros_like(tickets), proposed.rows, num_picks)
        else:
            ranked = largest(*proposed.scores, proposed.rows, num_picks)
        next_ones = jnp.maximum(places - made, 0)
        rows = jnp.where(places < made, picks.rows, ranked.rows[next_ones])
        scores = jnp.where(places < made, picks.scores, ranked.scores[next_ones])
        made += jnp.sum(proposed.rows, dtype=jnp.int32)
        return times + 1, made, left & ~proposed.rows, Picks(rows, scores)

    none = Picks(jnp.full(num_picks, -1, jnp.int32), jnp.zeros(num_picks, jnp.float32))
    start = (jnp.int32(0), jnp.int32(0), available, none)
    *_, picks = jax.lax.while_loop(lambda carry: carry[1] < limit, ask, start)
    pairs_left = jax.ops.segment_sum(available.astype(jnp.int32), duels.prompts, groups.size)
    no_choice = ~broken & jnp.any(available) & jnp.all(pairs_left <= 1)
    return unless_broken(instead(no_choice, draw(available, key, num_picks), picks), broken)


class Look(NamedTuple):
    """What a rule looks at: kinds of evidence, and what they come to."""

    needs: frozenset[str]
    design: str
    known: Callable[[str, Evidence, Mesh], Any]


DIFFERENCES = Look(frozenset({"features", "rewards"}), "features", differences)
REWARDS = Look(frozenset({"response_features", "rewards"}), "response_features", rewards_of_responses)


def strategy(name: str, propose: Propose, look: Look, ranks: bool) -> Strategy:
    """The strategy of a rule.

    Args:
      ranks: prompts are ranked by the rule's scores, else they come at random.
    """

    def select(
        evidence: Evidence, available: jax.Array, key: jax.Array, num_picks: int, block: int, mesh: Mesh
    ) -> Picks:
        return by_prompt(propose, look.known(name, evidence, mesh), evidence, available, key, num_picks, mesh)

    return Strategy(name, select, look.needs, look.design, ranks, falls_back=NO_CHOICE)


def numbered(groups: jax.Array) -> jax.Array:
    """A number from 0 to N − 1 for each value of [N] int32: [N] int32."""
    rows = jnp.arange(groups.size, dtype=jnp.int32)
    ordered, order = jax.lax.sort((groups, rows), num_keys=1)
    begins = jnp.concatenate([jnp.zeros(1, bool), ordered[1:] != ordered[:-1]])
    return jnp.zeros_like(rows).at[order].set(jnp.cumsum(begins, dtype=jnp.int32))


def of_response(duels: Duels) -> jax.Array:
    """A number from 0 to 2N − 1 for the response that each duel is of, [N, 2] int32; reversed, of its opponent."""
    prompts, responses = jnp.repeat(duels.prompts, 2), duels.responses.reshape(-1)
    places = jnp.arange(responses.size, dtype=jnp.int32)
    *ordered, order = jax.lax.sort((prompts, responses, places), num_keys=2)
    same = jnp.all(jnp.stack([x[1:] == x[:-1] for x in ordered]), axis=0)
    begins = jnp.concatenate([jnp.zeros(1, bool), ~same])
    return jnp.zeros_like(places).at[order].set(jnp.cumsum(begins, dtype=jnp.int32)).reshape(-1, 2)


def highest(values: jax.Array, among: jax.Array, numbers: jax.Array) -> jax.Array:
    """The largest value of those with the same number, for each of them; −∞ where there is none.

    Args:
      values: [N, 2] float32; among: [N, 2] bool, those that count; numbers: [N, 2] int32 from 0 to 2N − 1.
    """
    masked = jnp.where(among, values, -jnp.inf).reshape(-1)
    return jax.ops.segment_max(masked, numbers.reshape(-1), masked.size)[numbers]


def of_prompt(duels: Duels) -> jax.Array:
    """The number of each duel's prompt, [N, 2] int32."""
    return both_ways(duels.prompts)


def kept(duels: Duels, among: jax.Array, values: jax.Array, tolerance: jax.Array | float = 0.0) -> jax.Array:
    """Those duels of each prompt with its largest value, or no further than the tolerance below it: [N, 2] bool.

    Args:
      among: [N, 2] bool, those that count; values, tolerance: [N, 2] float32.
    """
    return among & (values + tolerance >= highest(values, among, of_prompt(duels)))


def may_be_best(duels: Duels, known: Differences, numbers: jax.Array) -> jax.Array:
    """Whether the response of each duel may be the best, no U_ij = Δ_ij + c ‖φ‖ being below 0: [N, 2] bool.

    Args:
      numbers: `of_response`.
    """
    return -highest(-(known.mean + known.width.values), duels.open, numbers) >= 0


def lowest_response(duels: Duels, among: jax.Array) -> jax.Array:
    """Those duels of each prompt that are of the lowest response; integers below 2²⁴ are exact in float32."""
    return kept(duels, among, -duels.responses.astype(jnp.float32))


def lowest_row(duels: Duels, among: jax.Array) -> jax.Array:
    """The lowest row of each prompt that has one of these duels: [N] bool."""
    rows = jnp.arange(duels.prompts.size, dtype=jnp.int32)
    found = jnp.where(jnp.any(among, axis=1), rows, rows.size)
    return (found < rows.size) & (found == jax.ops.segment_min(found, duels.prompts, rows.size)[duels.prompts])


def drawn(key: jax.Array, *numbers: jax.Array, low: float = 0.0, high: float = 1.0) -> jax.Array:
    """Uniform numbers [low, high), float32, which depend on the key and on these numbers alone.

    Args:
      numbers: int32 of one shape; equal ones draw the same.
    """

    def one(*each: jax.Array) -> jax.Array:
        folded = key
        for number in each:
            folded = jax.random.fold_in(folded, number)
        return jax.random.uniform(folded, minval=low, maxval=high)

    flat = jax.vmap(one)(*(x.reshape(-1) for x in numbers))
    return flat.reshape(numbers[0].shape)


def drawn_of_responses(key: jax.Array, duels: Duels, low: float = 0.0, high: float = 1.0) -> jax.Array:
    """`drawn` for the response that each duel is of: [N, 2] float32."""
    return drawn(key, both_ways(duels.groups), duels.responses, low=low, high=high)


def both_ways(values: jax.Array) -> jax.Array:
    """Values of pairs [N] as values of their duels [N, 2]."""
    return jnp.stack([values, values], axis=1)
