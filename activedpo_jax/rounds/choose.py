"""The first verb of a round: which pairs to ask about.  Pure functions, for `fused` and `staged` alike."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from activedpo_jax import layout
from activedpo_jax.data.groups import Groups
from activedpo_jax.evidence import registry
from activedpo_jax.models.lora import Lora
from activedpo_jax.models.policy import Policy
from activedpo_jax.rounds.spec import RoundSpec
from activedpo_jax.rounds.state import Chosen, RunState, round_key
from activedpo_jax.selection.greedy import Picks
from activedpo_jax.selection.strategies import Evidence, conditioned
from activedpo_jax.selection.widths import pair_vectors

EvidenceRows = dict[str, jax.Array]  # by name, [N, ...]: a row for each pair


class Rows(NamedTuple):
    """What selection has to know of a round's N pairs beside their evidence."""

    pairs: jax.Array  # [N, 3] int32: group, response shown first, response shown second
    digests: jax.Array  # [N, 4] uint32, of `data.groups.Candidates`
    valid: jax.Array  # [N] bool


class DeviceCandidates(NamedTuple):
    """The candidates of a round in device memory, all of one bucket and with as many responses each."""

    groups: Groups  # arrays of [chunks, G, ...]
    rows: Rows  # of the pairs i < j of every group, in order, whichever of the two is shown first
    order: jax.Array | None = None  # [N] int32, where in that order each row stands; None: the first N


def chunk_evidence(spec: RoundSpec, policy: Policy, lora: Lora, groups: Groups, seed: jax.Array) -> EvidenceRows:
    """What the strategy looks at, of all pairs of one chunk of groups: [G·m(m−1)/2, ...] each."""
    return registry.compute(spec.needs, spec.evidence, policy, lora, groups, seed)


def labelled_vectors(spec: RoundSpec, policy: Policy, lora: Lora, groups: Groups, seed: jax.Array) -> jax.Array:
    """The vectors of labelled pairs that the strategy's posterior is made of: [G, D] of groups with m = 2."""
    design = spec.selection.rule.design
    assert design is not None
    return pair_vectors(registry.compute((design,), spec.evidence, policy, lora, groups, seed)[design])


def all_labelled_vectors(spec: RoundSpec, policy: Policy, state: RunState) -> jax.Array:
    """`labelled_vectors` of all C places, chunk by chunk: [C, D]."""
    width = min(spec.chunk, layout.round_up(spec.capacity, spec.mesh))

    def pad(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, -spec.capacity % width)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(-1, width, *x.shape[1:])

    def one(groups: Groups) -> jax.Array:
        groups = jax.lax.with_sharding_constraint(groups, layout.batch(spec.mesh))
        # A place in the padding has no prompt; every row has to have one token to attend to.
        groups = groups._replace(prompt_len=jnp.maximum(groups.prompt_len, 1))
        return labelled_vectors(spec, policy, state.lora, groups, state.seed)

    chunks = Groups(*(pad(x) for x in state.labelled.groups))  # type: ignore[arg-type]
    found = jax.lax.map(one, chunks)
    return found.reshape(-1, found.shape[-1])[: spec.capacity]


def select(
    spec: RoundSpec, state: RunState, rows: Rows, evidence: EvidenceRows, known: jax.Array | None
) -> tuple[Picks, jax.Array]:
    """The K pairs to label, [K] rows and scores, and λ as used.

    Args:
      known: the vectors of the labelled pairs [C, D], where they are neither frozen nor among the candidates.
    """
    labelled, rule = state.labelled, spec.selection.rule
    filled = jnp.arange(spec.capacity) < labelled.size
    taken, places = labelled_rows(rows.digests, labelled.digests, filled)
    available = rows.valid & ~taken
    if labelled.vectors is not None:
        known = labelled.vectors
    elif known is None and rule.design is not None:
        known = pair_vectors(evidence[rule.design][places])
    responses = jnp.sort(rows.pairs[:, 1:], axis=1)
    seen = Evidence(groups=rows.pairs[:, 0], responses=responses, width_scale=spec.selection.width_scale, **evidence)
    seen = conditioned(rule, seen, available, spec.selection.lam, known, filled & (labelled.weights > 0))
    count, block = spec.selection.labels_per_round, spec.selection.block
    return rule.select(seen, available, round_key(state), count, block, spec.mesh), seen["lam"]


def labelled_rows(digests: jax.Array, labelled: jax.Array, filled: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Which of N rows are labelled, [N] bool, and where each of C labelled pairs is among them, [C] int32.

    One labelled pair after the other, since a table of [C, N] would outgrow the features of a large pool.

    Args:
      digests: [N, 4] uint32; labelled: [C, 4] uint32; filled: [C] bool, which of these are there.
    """
    words = digests.T

    def one(taken: jax.Array, slot: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        digest, there = slot
        same = there & jnp.all(words == digest[:, None], axis=0)
        return taken | same, jnp.argmax(same).astype(jnp.int32)

    return jax.lax.scan(one, jnp.zeros(digests.shape[0], bool), (labelled, filled))


def needs_known(spec: RoundSpec) -> bool:
    """Whether the labelled pairs' vectors are to be computed from their own groups."""
    # Those of a pool are among the candidates, but between two passes their evidence is not of the current θ.
    among_candidates = spec.pool_only and not spec.passes.in_reach
    return spec.selection.rule.design is not None and not spec.selection.frozen and not among_candidates


def shown_pairs(groups: Groups, pairs: jax.Array) -> Groups:
    """Pairs [K, 3] of groups [G, ...] as groups with m = 2, in the order in which they are shown."""
    group, first, second = pairs.T
    shown = jnp.stack([first, second], axis=1)
    return Groups(
        groups.prompt_ids[group],
        groups.prompt_len[group],
        groups.response_ids[group[:, None], shown],
        groups.response_len[group[:, None], shown],
    )


def choose(spec: RoundSpec, policy: Policy, state: RunState, candidates: DeviceCandidates) -> Chosen:
    """The K pairs to ask about (arXiv 2505.19241, algorithm 1): evidence, posterior, strategy.  Traceable."""
    count = candidates.rows.pairs.shape[0]
    evidence: EvidenceRows = {}
    if spec.needs:
        chunks = jax.lax.map(
            lambda groups: chunk_evidence(spec, policy, state.lora, groups, state.seed), candidates.groups
        )
        flat_rows = {name: x.reshape(-1, *x.shape[2:]) for name, x in chunks.items()}
        wanted = slice(count) if candidates.order is None else candidates.order
        evidence = {name: x[wanted] for name, x in flat_rows.items()}
    known = all_labelled_vectors(spec, policy, state) if needs_known(spec) else None
    picks, lam = select(spec, state, candidates.rows, evidence, known)
    flat = Groups(*(x.reshape(-1, *x.shape[2:]) for x in candidates.groups))
    groups = shown_pairs(flat, candidates.rows.pairs[picks.rows])
    return Chosen(picks, lam, groups, candidates.rows.digests[picks.rows])
