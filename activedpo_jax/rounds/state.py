"""What passes from round to round, and within one from verb to verb: pytrees of arrays."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from activedpo_jax import layout
from activedpo_jax.data.groups import Groups
from activedpo_jax.evidence.registry import EMBEDDINGS
from activedpo_jax.models.lora import Lora
from activedpo_jax.rounds.spec import RoundSpec
from activedpo_jax.selection.greedy import Picks
from activedpo_jax.training import losses


class Labelled(NamedTuple):
    """The pairs labelled so far, in the order in which they were picked; the first n of C places are filled.

    It owns what it is about, tokens included, so that a label is true whatever becomes of the pool.
    """

    size: jax.Array  # scalar int32, n
    groups: Groups  # m = 2, in the order shown: prompts [C, P], responses [C, 2, R]
    digests: jax.Array  # [C, 4] uint32, of `data.groups.Candidates`
    preferences: jax.Array  # [C] float32: 0 the first response is preferred, 1 the second, ½ neither
    weights: jax.Array  # [C] float32, of the label in the loss; 0: no preference is known, the pair is not learnt
    ref_logps: jax.Array  # [C, 2] float32, log π_ref
    vectors: jax.Array | None  # [C, D] float32, as they were when picked; None unless the posterior is frozen


class RunState(NamedTuple):
    """All that survives a round, and exactly what a checkpoint holds."""

    lora: Lora  # θ
    labelled: Labelled
    seed: jax.Array  # scalar uint32, from which every random choice of the run comes
    round: jax.Array  # scalar int32, of rounds that are done


class Answers(NamedTuple):
    """What was said of K pairs; see `Labelled`."""

    preferences: jax.Array  # [K] float32
    weights: jax.Array  # [K] float32


class Chosen(NamedTuple):
    """The K pairs that a round asks about."""

    picks: Picks  # rows of the round's candidates
    lam: jax.Array  # scalar float32: λ as used, see `posterior.resolved_lam`
    groups: Groups  # m = 2, in the order shown: [K, P], [K, 2, R]
    digests: jax.Array  # [K, 4] uint32


class RoundResult(NamedTuple):
    """What a round reports."""

    chosen: Chosen
    answers: Answers
    training: losses.DpoMetrics  # means over the last epoch
    good_steps: jax.Array  # scalar int32, of training, before the first whose loss is not finite


def vector_size(spec: RoundSpec) -> int | None:
    """D of the vectors that the strategy's posterior is over; None: it has none."""
    design = spec.selection.rule.design
    if design is None:
        return None
    return spec.hidden_size if design in EMBEDDINGS else spec.evidence.features.dim


def round_key(state: RunState) -> jax.Array:
    """Of the round that comes next."""
    return jax.random.fold_in(jax.random.key(state.seed), state.round + 1)


def initial_state(spec: RoundSpec, lora: Lora, seed: int) -> RunState:
    """The state before the first round, on the mesh."""
    rest = (empty_labelled(spec), jnp.uint32(np.uint32(seed)), jnp.int32(0))
    return RunState(jax.tree.map(jnp.copy, lora), *layout.put(rest, layout.replicated(spec.mesh)))


def empty_labelled(spec: RoundSpec) -> Labelled:
    """No pair, and room for all that the run will label."""
    c, bucket = spec.capacity, spec.bucket
    size = vector_size(spec) if spec.selection.frozen else None
    return Labelled(
        size=jnp.int32(0),
        groups=Groups(
            jnp.zeros((c, bucket.prompt), jnp.int32),
            jnp.ones(c, jnp.int32),
            jnp.zeros((c, 2, bucket.response), jnp.int32),
            jnp.zeros((c, 2), jnp.int32),
        ),
        digests=jnp.zeros((c, 4), jnp.uint32),
        preferences=jnp.zeros(c, jnp.float32),
        weights=jnp.zeros(c, jnp.float32),
        ref_logps=jnp.zeros((c, 2), jnp.float32),
        vectors=None if size is None else jnp.zeros((c, size), jnp.float32),
    )
