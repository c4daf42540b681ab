"""The third verb of a round: DPO on the labels so far.  Pure functions, for `fused` and `staged` alike."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from activedpo_jax import layout
from activedpo_jax.data.groups import Array, Bucket, Groups
from activedpo_jax.data.packing import Packing
from activedpo_jax.models.lora import Lora
from activedpo_jax.models.policy import Policy, response_logps
from activedpo_jax.rounds.choose import labelled_vectors
from activedpo_jax.rounds.spec import RoundSpec
from activedpo_jax.rounds.state import Answers, Chosen, Labelled, RunState
from activedpo_jax.training import losses, optimiser
from activedpo_jax.training.loop import Work


def training_work(number: int, schedule: optimiser.BatchSchedule, done: int = 0) -> Work:
    """The optimiser steps of round `number`, after the first `done`."""
    label, option = f"training, round {number}", "config.dpo.learning_rate"
    return Work(label, done, schedule.num_steps, option, schedule.examples)


class Measured(NamedTuple):
    """What is computed once of a newly labelled pair."""

    ref_logps: jax.Array  # [K, 2] float32
    vectors: jax.Array | None  # [K, D] float32; None unless the posterior is frozen


def measure(spec: RoundSpec, policy: Policy, state: RunState, groups: Groups) -> Measured:
    """log π_ref of pairs (groups with m = 2), and the vectors that a frozen posterior keeps of them, at θ before the
    round's training."""
    vectors = None
    if state.labelled.vectors is not None:
        vectors = labelled_vectors(spec, policy, state.lora, groups, state.seed)
    return Measured(response_logps(policy.decoder, policy.params, policy.reference, groups), vectors)


def append(spec: RoundSpec, labelled: Labelled, chosen: Chosen, answers: Answers, measured: Measured) -> Labelled:
    """The labelled pairs with the K new ones, in the order in which these were picked."""

    def store(old: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), labelled.size, axis=0)

    bucket = spec.bucket
    prompt_ids, prompt_len, response_ids, response_len = chosen.groups
    wide = Groups(
        jnp.pad(prompt_ids, ((0, 0), (bucket.prompt - prompt_ids.shape[1], 0))),
        prompt_len,
        jnp.pad(response_ids, ((0, 0), (0, 0), (0, bucket.response - response_ids.shape[2]))),
        response_len,
    )
    return Labelled(
        size=labelled.size + spec.selection.labels_per_round,
        groups=jax.tree.map(store, labelled.groups, wide),
        digests=store(labelled.digests, chosen.digests),
        preferences=store(labelled.preferences, answers.preferences),
        weights=store(labelled.weights, answers.weights),
        ref_logps=store(labelled.ref_logps, measured.ref_logps),
        vectors=None if measured.vectors is None else store(labelled.vectors, measured.vectors),  # type: ignore[arg-type]
    )


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["slots", "weights"], meta_fields=["bucket", "packing"]
)
@dataclasses.dataclass(frozen=True)
class Microbatch:
    """Some of a batch's labelled pairs; a pytree whose shape is static."""

    slots: Any  # [B] int32, places among the labelled pairs; −1 makes up the batch
    weights: Any  # [B] float32, of each in the mean over the batch; 0 at padding
    bucket: Bucket  # which holds all of them; their padding beyond it is cut off
    packing: Packing | None = None  # in which they lie; None: they are padded


class Whole(NamedTuple):
    """What the microbatches of a batch have in common."""

    token_share: Any  # scalar float32, of a preferred token in the mean over those of the batch
    kl: Any = None  # scalar float32, the sum of `mismatch` over the batch; None: its loss needs none


def token_share(lengths: Array, preferences: Array, slots: Array, weights: Array) -> Array:
    """What one preferred token counts in the mean over those of a batch: a scalar.

    Args:
      lengths, preferences: of all labelled pairs, [C, 2] and [C]; on the host or traced.
      slots, weights: [B] of the whole batch, else as of a `Microbatch`.
    """
    there = lengths[slots] * (weights > 0)[:, None]
    return 1 / losses.preferred_tokens(there, preferences[slots])


def others(slots: Array, weights: Array) -> Array:
    """For each pair of a batch the one before it, for the first the last: [B], on the host or traced; arguments as of
    `token_share`."""
    return slots[(np.arange(len(slots)) - 1) % (weights > 0).sum()]


def mismatch(
    spec: RoundSpec, policy: Policy, lora: Lora, labelled: Labelled, microbatch: Microbatch, answered: jax.Array
) -> jax.Array:
    """What a microbatch adds to its batch's mean of log π_θ − log π_ref over responses to other prompts, scalar.

    At least 0, that is KTO's estimate z₀ of KL(π_θ ‖ π_ref) (Ethayarajh et al. 2024, section 4.1), and TRL's, whose
    order of a batch is all preferred responses, then all others.  It costs two forward passes over the batch.

    Args:
      answered: [B], the pairs of which the responses are: `others` of the whole batch.
    """
    groups, decoder = _groups(spec, labelled, microbatch, answered), policy.packed(microbatch.packing).decoder
    logps, ref_logps = (response_logps(decoder, policy.params, x, groups) for x in (lora, policy.reference))
    return jnp.sum(microbatch.weights * jnp.mean(logps - ref_logps, axis=1))


def _groups(spec: RoundSpec, labelled: Labelled, microbatch: Microbatch, answered: jax.Array) -> Groups:
    """The prompts of a microbatch, with the responses of the pairs `answered`."""
    bucket, there = microbatch.bucket, microbatch.slots >= 0
    slots, answered = jnp.maximum(microbatch.slots, 0), jnp.maximum(answered, 0)
    cut = Groups(
        labelled.groups.prompt_ids[slots, spec.bucket.prompt - bucket.prompt :],
        jnp.where(there, labelled.groups.prompt_len[slots], 1),
        labelled.groups.response_ids[answered, :, : bucket.response],
        jnp.where(there[:, None], labelled.groups.response_len[answered], 0),
    )
    return jax.lax.with_sharding_constraint(cut, layout.batch(spec.mesh))


def microbatch_gradient(
    spec: RoundSpec, policy: Policy, lora: Lora, labelled: Labelled, microbatch: Microbatch, whole: Whole
) -> tuple[Lora, losses.DpoMetrics]:
    """What some labelled pairs add to the gradient and the metrics of their batch."""
    weights, slots = microbatch.weights, jnp.maximum(microbatch.slots, 0)
    groups = _groups(spec, labelled, microbatch, slots)
    confidence = labelled.weights[slots]
    pairs = losses.Preferences(
        labelled.preferences[slots],
        labelled.ref_logps[slots],
        weights * confidence,
        jnp.where(weights > 0, whole.token_share, 0.0) * confidence,
        whole.kl,
    )
    decoder = policy.packed(microbatch.packing).decoder
    return optimiser.dpo_gradient(decoder, spec.training.dpo, policy.params, lora, groups, pairs)


def added(
    spec: RoundSpec, total: tuple[Lora, losses.DpoMetrics], new: tuple[Lora, losses.DpoMetrics]
) -> tuple[Lora, losses.DpoMetrics]:
    """The sum of two parts of a batch's gradient and metrics."""
    gradient, metrics = jax.tree.map(jnp.add, total, new)
    return layout.like_weights(spec.mesh, gradient), metrics


def like_moments(spec: RoundSpec, opt_state: optax.OptState, lora: Lora) -> optax.OptState:
    """The optimiser's state, laid out like the adapter: a compiler that is not told keeps all of it on every device."""
    shardings = optimiser.optimiser_shardings(spec.training.dpo.optimiser, spec.mesh, lora)
    return jax.lax.with_sharding_constraint(opt_state, shardings)


def learn(
    spec: RoundSpec,
    policy: Policy,
    state: RunState,
    chosen: Chosen,
    answers: Answers,
    schedule: optimiser.BatchSchedule,
) -> tuple[RunState, losses.DpoMetrics, jax.Array]:
    """DPO on all labels so far, from the labels of a round to the state after it.  Traceable.

    Args:
      schedule: for the number of labels after this round.

    Returns:
      the state, the means over the last epoch, and the first step whose loss is not finite, or the number of steps.
    """
    labelled = append(spec, state.labelled, chosen, answers, _measure_all(spec, policy, state, chosen.groups))
    dpo = spec.training.dpo
    start = policy.reference if spec.training.from_reference else state.lora
    total = jnp.asarray(schedule.num_steps)

    def step(i: jax.Array, carry):  # type: ignore[no-untyped-def]
        lora, opt_state, sums, good = carry

        slots, weights = schedule.slots[i], schedule.weight[i]
        whole = Whole(token_share(labelled.groups.response_len, labelled.preferences, slots, weights))

        def add_mismatch(total, part):  # type: ignore[no-untyped-def]
            *own, answered = part
            return total + mismatch(spec, policy, lora, labelled, Microbatch(*own, spec.bucket), answered), None

        def add(total, part):  # type: ignore[no-untyped-def]
            new = microbatch_gradient(spec, policy, lora, labelled, Microbatch(*part, spec.bucket), whole)
            return added(spec, total, new), None

        *parts, answered = (x.reshape(-1, spec.training.microbatch) for x in (slots, weights, others(slots, weights)))
        if dpo.loss.needs_kl:
            whole = whole._replace(kl=jax.lax.scan(add_mismatch, jnp.float32(0), (*parts, answered))[0])
        (gradient, metrics), _ = jax.lax.scan(add, optimiser.no_gradient(lora), parts)
        rate = optimiser.learning_rate(dpo.optimiser, optimiser.Position(i, total))
        lora, opt_state = optimiser.update(dpo.optimiser, lora, opt_state, gradient, rate)
        lora, opt_state = layout.like_weights(spec.mesh, lora), like_moments(spec, opt_state, lora)
        last_epoch = i >= total - schedule.steps_per_epoch
        sums = jax.tree.map(lambda s, x: s + jnp.where(last_epoch, x, 0.0), sums, metrics)
        return lora, opt_state, sums, jnp.where(jnp.isfinite(metrics.loss), good, jnp.minimum(good, i))

    zeros = losses.DpoMetrics(*(jnp.float32(0),) * 3)
    opt_state = like_moments(spec, optimiser.init_optimiser(dpo.optimiser, start), start)
    lora, _, sums, good = jax.lax.fori_loop(0, total, step, (start, opt_state, zeros, total.astype(jnp.int32)))
    # Laid out as they came in, or the next round would be compiled anew.
    lora = layout.like_weights(spec.mesh, lora)
    rest = (labelled, state.seed, state.round + 1)
    rest = jax.lax.with_sharding_constraint(rest, layout.replicated(spec.mesh))
    return RunState(lora, *rest), jax.tree.map(lambda s: s / schedule.steps_per_epoch, sums), good


def _measure_all(spec: RoundSpec, policy: Policy, state: RunState, groups: Groups) -> Measured:
    """`measure`, chunk by chunk."""
    count = groups.prompt_len.shape[0]
    width = min(spec.chunk, layout.round_up(count, spec.mesh))

    def chunks(x: jax.Array) -> jax.Array:
        # The first pair once more, not zeros: every row has to have a token to attend to.
        x = jnp.concatenate([x, jnp.repeat(x[:1], -count % width, axis=0)])
        return x.reshape(-1, width, *x.shape[1:])

    def one(chunk: Groups) -> Measured:
        return measure(spec, policy, state, jax.lax.with_sharding_constraint(chunk, layout.batch(spec.mesh)))

    found = jax.lax.map(one, Groups(*(chunks(x) for x in groups)))  # type: ignore[arg-type]
    return jax.tree.map(lambda x: x.reshape(-1, x.shape[-1])[:count], found)
