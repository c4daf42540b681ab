"""On-policy candidates: m responses a prompt, sampled from the current θ, and the pairs among them.

A response that is empty or equal to another of its prompt is on record with the others, but no pair of it is asked
about.  What a response is depends on the run's seed, the round and its prompt alone.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from activedpo_jax import layout
from activedpo_jax.data import batches
from activedpo_jax.data.digests import digests_of_bytes
from activedpo_jax.data.groups import (
    Bucket,
    Candidates,
    Groups,
    Texts,
    assign_buckets,
    group_pairs,
    pad_groups,
)
from activedpo_jax.data.ragged import Chained, Taken
from activedpo_jax.generation.decoding import Requests, Responses, respond
from activedpo_jax.generation.responses import flawed
from activedpo_jax.models.decoder import unstack
from activedpo_jax.models.policy import Policy
from activedpo_jax.models.token_hash import pair_digests, prompt_hash
from activedpo_jax.progress import progress
from activedpo_jax.resumable import NOTHING_SAVED, SavedWork, pieces
from activedpo_jax.rounds.choose import DeviceCandidates, Rows
from activedpo_jax.rounds.fused import Source
from activedpo_jax.rounds.spec import RoundSpec
from activedpo_jax.rounds.state import RunState, round_key


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """Prompts that the policy is to respond to, on the host."""

    ids: Sequence[str]  # unique names
    texts: Texts  # their tokens; no responses
    prompt_texts: Sequence[Any]  # as a person reads them
    text_of: Callable[[np.ndarray], str]  # the text of a response's tokens

    def draw(self, count: int, seed: int, number: int) -> "PromptSet":
        """`count` of the prompts for a round, in their order; drawn by the seed and the round's number."""
        if not count or count >= len(self.ids):
            return self
        return self.taken(np.sort(np.random.default_rng([seed, number]).choice(len(self.ids), count, replace=False)))

    def distinct(self) -> "PromptSet":
        """Without the prompts whose tokens are those of one before, of which the same responses would be sampled."""
        digests = digests_of_bytes(prompt.tobytes() for prompt in self.texts.prompt_tokens)
        return self.taken(np.sort(np.unique(digests, axis=0, return_index=True)[1]))

    def taken(self, rows: np.ndarray) -> "PromptSet":
        """The prompts of these rows."""
        texts = dataclasses.replace(
            self.texts,
            prompt_tokens=Taken(self.texts.prompt_tokens, rows),
            response_tokens=Taken(self.texts.response_tokens, rows),
        )
        ids, prompt_texts = Taken(self.ids, rows), Taken(self.prompt_texts, rows)
        return dataclasses.replace(self, ids=ids, texts=texts, prompt_texts=prompt_texts)


class Prompts(NamedTuple):
    """Prompts on the device, padded on the left."""

    ids: Any  # [..., G, P] int32
    length: Any  # [..., G] int32


class FreshChunk(NamedTuple):
    """What the policy made of G prompts."""

    responses: Responses  # [G, m, ...]
    valid: jax.Array  # [G, m(m−1)/2] bool
    digests: jax.Array  # [G, m(m−1)/2, 4] uint32


def unrolled(spec: RoundSpec, policy: Policy, state: RunState) -> tuple[Any, Any]:
    """The weights and θ as `generation.decoding` takes them; a copy of the layers."""
    on_cpu = spec.mesh.devices.flat[0].platform == "cpu"
    return unstack(policy.params, on_cpu), unstack(state.lora)


def respond_to_chunk(
    spec: RoundSpec, weights: tuple[Any, Any], seed: jax.Array, number: jax.Array, prompts: Prompts
) -> FreshChunk:
    """m responses to each of G prompts.

    Args:
      weights: as of `unrolled`.
      number: of the round, scalar.
    """
    assert spec.sampling is not None
    m = spec.responses
    empty = jnp.zeros((prompts.ids.shape[0], 1, 1), jnp.int32)
    only_prompts = Groups(prompts.ids, prompts.length, empty, empty[..., 0])
    seeds = prompt_hash(only_prompts, seed + number * jnp.uint32(0x9E3779B9))
    samples = jnp.broadcast_to(jnp.arange(m, dtype=jnp.int32), (seeds.shape[0], m))
    responses = respond(spec.sampling, *weights, Requests(prompts.ids, prompts.length, seeds, samples))

    first, second = group_pairs(m).T
    ids, length = responses.tokens, responses.length
    words = length - responses.ended  # without the token that ends a response, which nobody reads
    content = jnp.where(jnp.arange(ids.shape[-1]) < words[..., None], ids, -1)
    same = jnp.all(content[:, first] == content[:, second], axis=-1)  # [G, pairs]
    repeats = jnp.stack([jnp.any(same[:, second == j], axis=1) for j in range(m)], axis=1)
    usable = ~repeats & (words > 0)
    groups = Groups(prompts.ids, prompts.length, ids, length)
    return FreshChunk(responses, usable[:, first] & usable[:, second], pair_digests(groups))


def shown_order(spec: RoundSpec, state: RunState, count: int) -> jax.Array:
    """The pairs of `count` groups, [count · m(m−1)/2, 3] int32, each shown in an order that only seed, round and row
    decide."""
    pairs = group_pairs(spec.responses)
    rows = jnp.arange(count * len(pairs))
    group, (low, high) = jnp.repeat(jnp.arange(count), len(pairs)), jnp.tile(pairs, (count, 1)).T
    key = jax.random.fold_in(round_key(state), 1)
    swapped = jax.vmap(lambda row: jax.random.bits(jax.random.fold_in(key, row)))(rows) & 1 == 1
    return jnp.stack([group, jnp.where(swapped, high, low), jnp.where(swapped, low, high)], axis=1).astype(jnp.int32)


# On the device, for `fused`


def fresh_source(spec: RoundSpec, prompts: PromptSet, bucket: Bucket) -> Source:
    """A source that responds to these prompts within the program.

    Args:
      bucket: which holds the prompts; the responses are as long as `spec.sampling` makes them.
    """
    return jax.tree_util.Partial(_respond, *_placed(spec, prompts, bucket))


def mixed_source(spec: RoundSpec, pool: DeviceCandidates, prompts: PromptSet, bucket: Bucket) -> Source:
    """The pairs of a pool on the device, then those of fresh responses."""
    return jax.tree_util.Partial(_mix, pool, *_placed(spec, prompts, bucket))


def _placed(spec: RoundSpec, prompts: PromptSet, bucket: Bucket) -> tuple[Prompts, jax.Array]:
    """The prompts in whole chunks, and which of them are there."""
    count = len(prompts.ids)
    size = -(-count // spec.chunk) * spec.chunk
    padded = pad_groups(prompts.texts, np.arange(count), bucket, size)
    arrays = Prompts(
        padded.prompt_ids.reshape(-1, spec.chunk, bucket.prompt), padded.prompt_len.reshape(-1, spec.chunk)
    )
    present = (np.arange(size) < count).reshape(-1, spec.chunk)
    return layout.put((arrays, present), layout.chunks(spec.mesh))


def _respond(
    prompts: Prompts, present: jax.Array, spec: RoundSpec, policy: Policy, state: RunState
) -> DeviceCandidates:
    weights = unrolled(spec, policy, state)
    chunks = jax.lax.map(lambda p: respond_to_chunk(spec, weights, state.seed, state.round + 1, p), prompts)
    groups = Groups(prompts.ids, prompts.length, chunks.responses.tokens, chunks.responses.length)
    rows = Rows(
        shown_order(spec, state, present.size),
        chunks.digests.reshape(-1, 4),
        (chunks.valid & present[..., None]).reshape(-1),
    )
    return DeviceCandidates(groups, rows)


def _mix(
    pool: DeviceCandidates,
    prompts: Prompts,
    present: jax.Array,
    spec: RoundSpec,
    policy: Policy,
    state: RunState,
) -> DeviceCandidates:
    fresh = _respond(prompts, present, spec, policy, state)
    size, count = pool.groups.prompt_len.size, pool.rows.pairs.shape[0]
    moved = fresh.rows._replace(pairs=fresh.rows.pairs + jnp.array([size, 0, 0], jnp.int32))
    rows = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), pool.rows, moved)
    per_group = fresh.rows.pairs.shape[0] // present.size
    # The pool's last groups may be padding, of which there are no rows.
    order = jnp.concatenate([jnp.arange(count), size * per_group + jnp.arange(fresh.rows.pairs.shape[0])])

    def widened(groups: Groups) -> Groups:
        missing = spec.bucket.response - groups.response_ids.shape[-1]
        return groups._replace(response_ids=jnp.pad(groups.response_ids, [(0, 0)] * 3 + [(0, missing)]))

    groups = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), widened(pool.groups), widened(fresh.groups))
    return DeviceCandidates(groups, rows, order)


# On the host, for `staged`

chunk_program = jax.jit(respond_to_chunk, static_argnums=0)
unrolled_program = jax.jit(unrolled, static_argnums=0)


def fresh_candidates(
    spec: RoundSpec,
    policy: Policy,
    state: RunState,
    prompts: PromptSet,
    widths: Sequence[int],
    saved: SavedWork = NOTHING_SAVED,
) -> Candidates:
    """The pairs of m responses to each prompt.

    Args:
      widths: that prompts are padded to, each to the smallest that holds it; one compiled program each.
      saved: what is kept of the responses.
    """
    assert spec.sampling is not None
    weights = unrolled_program(spec, policy, state)
    count, m, number = len(prompts.ids), spec.responses, int(state.round) + 1
    buckets = [Bucket(width, 1) for width in sorted(set(widths))]
    tokens: list[list[np.ndarray]] = [[] for _ in range(count)]
    pairs = group_pairs(m)
    valid, digests = np.zeros((count, len(pairs)), bool), np.zeros((count, len(pairs), 4), np.uint32)
    chunks = batches.parts(assign_buckets(prompts.texts, buckets), buckets, m, (spec.chunk,))

    def compute(i: int) -> FreshChunk:
        b, rows, size = chunks[i]
        padded = pad_groups(prompts.texts, rows, buckets[b], size)
        batch = layout.put(Prompts(padded.prompt_ids, padded.prompt_len), layout.batch(spec.mesh))
        round_number = layout.put(np.int32(number), layout.replicated(spec.mesh))
        return chunk_program(spec, weights, state.seed, round_number, batch)

    def like(i: int) -> Any:
        ids = jax.ShapeDtypeStruct((spec.chunk, buckets[chunks[i].bucket].prompt), jnp.int32)
        like_prompts = Prompts(ids, jax.ShapeDtypeStruct((spec.chunk,), jnp.int32))
        shapes = jax.eval_shape(chunk_program, spec, weights, state.seed, jnp.int32(number), like_prompts)
        sharding = layout.batch(spec.mesh)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)

    results = pieces(saved, f"responses_{len(chunks)}x{spec.chunk}", len(chunks), compute, like)
    with progress(total=count, desc="responses", unit="prompt") as bar:
        for (_, rows, _), result in zip(chunks, results, strict=True):
            found = layout.get(result)
            for place, row in enumerate(rows):
                lengths = found.responses.length[place]
                tokens[row] = [found.responses.tokens[place, j, : lengths[j]] for j in range(m)]
            valid[rows], digests[rows] = found.valid[: len(rows)], found.digests[: len(rows)]
            bar.update(len(rows))
    # Different tokens may read the same, which a program cannot see: people would be shown one text twice.
    for row, responses in enumerate(tokens):
        useless = flawed([prompts.text_of(response) for response in responses])
        valid[row] &= ~np.isin(pairs, useless).any(axis=1)
    return _candidates(spec, state, prompts, tokens, valid.reshape(-1), digests.reshape(-1, 4))


def on_host(spec: RoundSpec, state: RunState, prompts: PromptSet, candidates: DeviceCandidates) -> Candidates:
    """The fresh candidates that `fresh_source` or `mixed_source` made on the device from this state."""
    count, per_group = len(prompts.ids), len(group_pairs(spec.responses))
    ids, length = layout.get((candidates.groups.response_ids, candidates.groups.response_len))
    ids, length = ids.reshape(-1, *ids.shape[2:]), length.reshape(-1, length.shape[-1])
    # A pool may stand before them, and padding behind them.
    size = -(-count // spec.chunk) * spec.chunk
    ids, length = ids[-size:][:count], length[-size:][:count]
    tokens = [[ids[g, j, : length[g, j]] for j in range(spec.responses)] for g in range(count)]
    rows = layout.get((candidates.rows.valid, candidates.rows.digests))
    valid, digests = (x[-size * per_group :][: count * per_group] for x in rows)
    return _candidates(spec, state, prompts, tokens, valid, digests)


def merged(pool: Candidates, fresh: Candidates) -> Candidates:
    """The pairs of a pool, then fresh ones."""
    valid = [np.ones(c.num_pairs, bool) if c.valid is None else c.valid for c in (pool, fresh)]
    return Candidates(
        prompt_tokens=Chained(pool.prompt_tokens, fresh.prompt_tokens),
        response_tokens=Chained(pool.response_tokens, fresh.response_tokens),
        pairs=np.concatenate([pool.pairs, fresh.pairs + np.array([pool.num_groups, 0, 0], np.int32)]),
        pair_ids=Chained(pool.pair_ids, fresh.pair_ids),
        prompt_texts=Chained(pool.prompt_texts, fresh.prompt_texts),
        response_texts=Chained(pool.response_texts, fresh.response_texts),
        content=np.concatenate([pool.digests, fresh.digests]),
        valid=np.concatenate(valid),
        fresh=fresh.fresh,
    )


def _candidates(
    spec: RoundSpec,
    state: RunState,
    prompts: PromptSet,
    tokens: list[list[np.ndarray]],
    valid: np.ndarray,
    digests: np.ndarray,
) -> Candidates:
    number = int(state.round) + 1
    order = np.asarray(shown_order(spec, state, len(tokens)))
    return Candidates(
        prompt_tokens=prompts.texts.prompt_tokens,
        response_tokens=tokens,
        pairs=order,
        pair_ids=[f"{prompts.ids[g]}/round{number}/{min(i, j)}-{max(i, j)}" for g, i, j in order.tolist()],
        prompt_texts=prompts.prompt_texts,
        response_texts=[[prompts.text_of(t) for t in several] for several in tokens],
        content=digests,
        valid=valid,
        fresh=len(tokens),
    )
