"""Batches without padding where it costs: the tokens of all texts end to end, on one axis, in every linear map.

A linear map does not ask which token belongs to which text, so it takes [N, d], texts end to end.  Attention does ask:
there, and where gradients are told apart by text, the longest texts are padded to one width, shorter ones to another,
as the tiers of `data.packing` say.  Going from one layout to the other is a gather, forwards and backwards alike.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from activedpo_jax.data.groups import Groups
from activedpo_jax.data.packing import Axis, Packing, Tier
from activedpo_jax.models import kernels
from activedpo_jax.models.attention import Rule


@jax.custom_vjp
def moved(x: jax.Array, source: jax.Array, back: jax.Array) -> jax.Array:
    """x[source], zeros where `source` is len(x): [N, ...] and [M] → [M, ...].

    Args:
      back: [N] or [copies, N], where in the result each row went, once or in several copies; M: nowhere.  Of use
        backwards, where the transpose of a gather, which adds rows up one by one, becomes a gather too.
    """
    return jnp.take(x, source, axis=0, mode="fill", fill_value=0)


def _moved_fwd(x, source, back):  # type: ignore[no-untyped-def]
    return moved(x, source, back), (source, back)


def _moved_bwd(residuals, d_out):  # type: ignore[no-untyped-def]
    source, back = residuals
    copies = back if back.ndim == 2 else back[None]
    return functools.reduce(jnp.add, [moved(d_out, copy, source) for copy in copies]), None, None


moved.defvjp(_moved_fwd, _moved_bwd)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["length", "order", "source", "back", "rank", "text", "place"],
    meta_fields=["tiers"],
)
@dataclasses.dataclass(frozen=True)
class Texts:
    """T texts end to end on an axis of N tokens, and padded in tiers, longest texts first."""

    length: jax.Array  # [T] int32
    order: jax.Array  # [T] int32, the texts from the longest to the shortest
    rank: jax.Array  # [T] int32, where in this order each text is
    text: jax.Array  # [N] int32, the text of each token; T: of none, at the end of the axis
    place: jax.Array  # [N] int32, of each token in its text
    source: jax.Array  # [S] int32, the token at each padded place; N: there is none
    back: jax.Array  # [N] int32, the padded place of each token; S: it is of no text
    tiers: tuple[Tier, ...]

    @property
    def start(self) -> jax.Array:
        """The first token of each text, [T] int32."""
        return jnp.cumsum(self.length) - self.length

    def padded(self, x: jax.Array) -> list[jax.Array]:
        """[N, ...] → the tiers, [count, width, ...] each."""
        return self.cut(moved(x, self.source, self.back))

    def cut(self, flat: jax.Array) -> list[jax.Array]:
        """[S, ...] → the tiers."""
        return _cut(flat, self.tiers)

    def packed(self, tiers: Sequence[jax.Array]) -> jax.Array:
        """The tiers, [count, width, ...] each → [N, ...], zeros where there is no text."""
        flat = jnp.concatenate([x.reshape(-1, *x.shape[2:]) for x in tiers])
        return moved(flat, self.back, self.source)

    def by_tier(self, x: jax.Array) -> list[jax.Array]:
        """Something of each text, [T, ...] → [count, ...] of each tier."""
        return _split(x[self.order], [count for count, _ in self.tiers])

    def of_texts(self, tiers: Sequence[jax.Array]) -> jax.Array:
        """[count, ...] of each tier → [T, ...]."""
        return jnp.concatenate(tiers)[self.rank]


def _cut(flat: jax.Array, tiers: Sequence[Tier]) -> list[jax.Array]:
    parts = _split(flat, [count * width for count, width in tiers])
    return [x.reshape(*tier, *flat.shape[1:]) for x, tier in zip(parts, tiers, strict=True)]


def _split(x: jax.Array, sizes: Sequence[int]) -> list[jax.Array]:
    return jnp.split(x, np.cumsum(sizes)[:-1].tolist())


def _texts(length: jax.Array, axis: Axis, left: bool) -> Texts:
    """Texts of these lengths [T], padded on the left or on the right."""
    count, tokens = len(length), axis.tokens
    order = jnp.argsort(-length, stable=True)
    rank = jnp.argsort(order)
    end = jnp.cumsum(length)
    start = end - length
    token = jnp.arange(tokens)
    text = jnp.sum(end <= token[:, None], axis=1, dtype=jnp.int32)
    own = jnp.minimum(text, count - 1)
    place = token - start[own]

    # Of each rank: the width of its tier, and where among the padded places its text begins.
    widths = axis.widths
    begins = np.cumsum(widths) - widths
    total = int(widths.sum())
    row = np.repeat(np.arange(count), widths)  # of each padded place
    column = np.arange(total) - begins[row]
    by_rank = length[order]
    before = jnp.asarray(widths) - by_rank if left else jnp.zeros_like(by_rank)  # padding before each text
    inside = column - before[row]
    there = (inside >= 0) & (inside < by_rank[row])
    source = jnp.where(there, start[order][row] + inside, tokens)
    back = jnp.where(text < count, jnp.asarray(begins)[rank[own]] + before[rank[own]] + place, total)
    return Texts(length, order, rank, text, place, source, back, axis.tiers)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["prompts", "responses", "positions", "source", "back"],
    meta_fields=["width"],
)
@dataclasses.dataclass(frozen=True)
class Packed:
    """Where the tokens of a batch of groups are."""

    prompts: Texts  # G, padded on the left
    responses: Texts  # G·m, padded on the right, group by group
    positions: list[jax.Array]  # of the prompts' tokens [N] and the responses' [N']
    source: jax.Array  # [G·m·P] int32, the tokens of each response's prompt, by the order of responses
    back: jax.Array  # [m, N] int32, where in that each token of the prompts is
    width: int  # P

    @property
    def num_responses(self) -> int:
        """m, of a group."""
        return len(self.responses.length) // len(self.prompts.length)

    def attention(self, qkv: Sequence[Sequence[jax.Array]], rule: Rule, backend: kernels.Backend) -> list[jax.Array]:
        """As `kernels.prompt_attention` and `kernels.response_attention`.

        Args:
          qkv: queries, keys and values of both blocks, [N, heads, Dh] each.

        Returns:
          of both blocks, [N, H·Dh].
        """
        prompts, responses = self.prompts, self.responses
        q, k, v = (prompts.padded(x[0]) for x in qkv)
        lengths = prompts.by_tier(prompts.length)
        of_prompts = [
            kernels.prompt_attention(q[i], k[i], v[i], lengths[i], rule, backend) for i in range(len(prompts.tiers))
        ]
        q, k, v = ([y[:, None] for y in responses.padded(x[1])] for x in qkv)
        lengths = responses.by_tier(jnp.repeat(prompts.length, self.num_responses))
        tiers = [Tier(texts, self.width) for texts, _ in responses.tiers]
        prompt_k, prompt_v = (_cut(moved(x[0], self.source, self.back), tiers) for x in qkv[1:])
        of_responses = [
            kernels.response_attention(q[i], k[i], v[i], prompt_k[i], prompt_v[i], lengths[i], rule, backend)[:, 0]
            for i in range(len(tiers))
        ]
        return [prompts.packed(of_prompts), responses.packed(of_responses)]

    def before(self, prompt: jax.Array, response: jax.Array) -> jax.Array:
        """The state before each token of the responses: of packed states [N, d] and [N', d] → [N', d]."""
        last = prompt[jnp.cumsum(self.prompts.length) - 1]
        group = jnp.minimum(self.responses.text // self.num_responses, len(last) - 1)
        rows = jnp.concatenate([last, response])
        return rows[jnp.where(self.responses.place == 0, group, len(last) - 1 + jnp.arange(len(response)))]

    def last(self, prompt: jax.Array, response: jax.Array) -> jax.Array:
        """The last state of every response, its prompt's where it has no token: [G, m, d]."""
        end = jnp.cumsum(self.responses.length) - 1
        of_prompt = jnp.repeat(prompt[jnp.cumsum(self.prompts.length) - 1], self.num_responses, axis=0)
        found = jnp.where(self.responses.length[:, None] > 0, response[end], of_prompt)
        return found.reshape(-1, self.num_responses, found.shape[-1])

    def per_group(
        self, outer_sum: Callable[..., jax.Array], lefts: Sequence[jax.Array], rights: Sequence[jax.Array]
    ) -> jax.Array:
        """Σ left ⊗ right over the tokens of each group, of packed blocks [N, i] and [N, j]: [G, i, j] float32."""
        total: Any = 0.0
        for texts, left, right in zip((self.prompts, self.responses), lefts, rights, strict=True):
            sums = [outer_sum(x, y, num_batch=1) for x, y in zip(texts.padded(left), texts.padded(right), strict=True)]
            found = texts.of_texts(sums)
            total += jnp.sum(found.reshape(len(self.prompts.length), -1, *found.shape[1:]), axis=1)
        return total


def pack(groups: Groups, packing: Packing) -> Packed:
    """Where the tokens of a batch go whose texts the packing holds; whether it does, only the host can check
    (`data.packing.holds`).

    Raises:
      ValueError: it is one for another number of groups.
    """
    count, m = groups.response_ids.shape[:2]
    if packing.groups != count:
        raise ValueError(f"{count} groups do not make a batch packed for {packing.groups}: make it up with empty ones")
    prompts = _texts(jnp.asarray(groups.prompt_len), packing.prompts, left=True)
    responses = _texts(jnp.asarray(groups.response_len).reshape(-1), packing.responses.times(m), left=False)
    prompt_of = jnp.repeat(prompts.length, m)  # the length of each response's prompt
    width = packing.prompts.tiers[0].width
    group = responses.order // m
    inside = jnp.arange(width) - (width - prompts.length[group, None])
    source = jnp.where(inside >= 0, prompts.start[group, None] + inside, packing.prompts.tokens).reshape(-1)
    # Each token of a prompt once for every response.
    own = jnp.minimum(prompts.text, len(prompts.length) - 1)
    row = responses.rank.reshape(-1, m)[own].T
    inside = row * width + width - prompts.length[own] + prompts.place
    back = jnp.where(prompts.text < len(prompts.length), inside, len(source))
    text = jnp.minimum(responses.text, len(prompt_of) - 1)
    positions = [prompts.place, prompt_of[text] + responses.place]
    return Packed(prompts, responses, positions, source, back, width)


def packed_ids(groups: Groups, where: Packed) -> list[jax.Array]:
    """The tokens of the prompts [N] and of the responses [N'] int32; 0 where there is no text."""
    prompt_ids, response_ids = jnp.asarray(groups.prompt_ids), jnp.asarray(groups.response_ids)

    def taken(ids: jax.Array, texts: Texts, before: Any) -> jax.Array:
        text = jnp.minimum(texts.text, len(ids) - 1)
        found = ids[text, jnp.clip(before[text] + texts.place, 0, ids.shape[1] - 1)]
        return jnp.where(texts.text < len(ids), found, 0)

    flat = response_ids.reshape(-1, response_ids.shape[2])
    before = prompt_ids.shape[1] - where.prompts.length
    return [taken(prompt_ids, where.prompts, before), taken(flat, where.responses, jnp.zeros(len(flat), jnp.int32))]


def unpacked(values: jax.Array, groups: Groups, where: Packed) -> jax.Array:
    """A number for each token of the responses, [N'] → [G, m, R], 0 at padding."""
    _, m, length = groups.response_ids.shape
    place = where.responses.start.reshape(-1, m, 1) + jnp.arange(length)
    present = jnp.arange(length) < jnp.asarray(groups.response_len)[..., None]
    return jnp.where(present, values[jnp.minimum(place, len(values) - 1)], 0.0)
