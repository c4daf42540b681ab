"""One round in stages: the pieces of `fused`, run one after the other with progress bars.

For pools of several buckets or too large for one program, and for labels that come from outside.  Same picks, same
weights as `fused.fused_round`.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from activedpo_jax import layout
from activedpo_jax.data.groups import Bucket, Groups, PairPool, assign_buckets, microbatches, pad_groups, pad_pairs
from activedpo_jax.evaluation.heldout import Batches, log_probs
from activedpo_jax.models.decoder import Params
from activedpo_jax.models.lora import Lora
from activedpo_jax.rounds.fused import (
    Labelled,
    RoundResult,
    RoundSpec,
    add_labels,
    batch_preferences,
    chunk_features,
    select,
)
from activedpo_jax.selection.greedy import Picks
from activedpo_jax.training import losses, optimiser

Ask = Callable[[np.ndarray], np.ndarray]  # rows of the pool [K] → preferences [K] int

features_program = jax.jit(chunk_features, static_argnums=0)
select_program = jax.jit(select, static_argnums=(0, 3))
_add_labels = jax.jit(add_labels, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def gradient_program(
    spec: RoundSpec,
    params: Params,
    lora: Lora,
    total: tuple[Lora, losses.DpoMetrics],
    groups: Groups,
    labelled: Labelled,
    slots: jax.Array,
    weight: jax.Array,
) -> tuple[Lora, losses.DpoMetrics]:
    """Adds the part of a batch's gradient and metrics that comes from one microbatch."""
    pairs = batch_preferences(labelled, slots, weight)
    new = optimiser.dpo_gradient(spec.decoder, spec.dpo, params, lora, groups, pairs)
    return jax.tree.map(jnp.add, total, new)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def update_program(
    spec: RoundSpec, lora: Lora, opt_state: optax.OptState, gradient: Lora, step: jax.Array, total: jax.Array
) -> tuple[Lora, optax.OptState]:
    rate = optimiser.learning_rate(spec.dpo.optimiser, step, total)
    lora, opt_state = optimiser.update(spec.dpo.optimiser, lora, opt_state, gradient, rate)
    return jax.lax.with_sharding_constraint(lora, layout.weight_shardings(spec.mesh, lora)), opt_state


_no_gradient = jax.jit(optimiser.no_gradient)


@jax.jit
def _assemble(chunks: list[jax.Array], order: jax.Array) -> jax.Array:
    return jnp.concatenate(chunks)[order]


def pool_features(
    spec: RoundSpec, params: Params, lora: Lora, pool: PairPool, buckets: Sequence[Bucket], seed: jax.Array
) -> jax.Array:
    """φ of the whole pool, [N, D] float32 in pool order, bucket by bucket and chunk by chunk."""
    of_group = assign_buckets(pool, buckets)
    m = pool.responses_per_group
    per_group = m * (m - 1) // 2
    place = np.zeros(pool.num_groups, np.int64)  # where a group's pairs begin in the concatenated chunks
    chunks: list[jax.Array] = []
    done = 0
    sharding = layout.batch(spec.mesh)
    with tqdm(total=pool.num_groups, desc="features", unit="prompt", leave=False) as bar:
        for b, bucket in enumerate(buckets):
            members = np.flatnonzero(of_group == b)
            for i in range(0, len(members), spec.chunk):
                rows = members[i : i + spec.chunk]
                groups = jax.device_put(pad_groups(pool, rows, bucket, spec.chunk), sharding)
                chunks.append(features_program(spec, params, lora, groups, seed))
                place[rows] = done + np.arange(len(rows)) * per_group
                done += spec.chunk * per_group
                chunks[-1].block_until_ready()  # else the bar would count what is only queued
                bar.update(len(rows))
    # Of a pair in its group: the number of canonical pairs before (i, j).
    group, low = pool.pairs[:, 0], pool.pairs[:, 1:].min(axis=1)
    high = pool.pairs[:, 1:].max(axis=1)
    order = place[group] + low * m - low * (low + 1) // 2 + high - low - 1
    return _assemble(chunks, order)


def staged_round(
    spec: RoundSpec,
    params: Params,
    lora: Lora,
    labelled: Labelled,
    sft_lora: Lora,
    pool: PairPool,
    buckets: Sequence[Bucket],
    schedule: optimiser.BatchSchedule,
    key: jax.Array,
    sketch_seed: jax.Array,
    lam: jax.Array,
    check: Callable[[Picks], None],
    ask: Ask,
    answered: tuple[np.ndarray, np.ndarray, np.ndarray] | None,
    on_labels: Callable[[Picks, np.ndarray], None],
) -> tuple[Lora, Labelled, RoundResult, dict[str, float]]:
    """One round, as `fused.fused_round`, in stages.

    Args:
      check: raises if the picks are not what they must be, before anybody is asked.
      ask: the oracle.
      answered: (rows, scores, preferences) of this round if they are on record from a run that was interrupted after
        the labels came in: nobody is asked twice.
      on_labels: called as soon as the labels are there, to put them on record before anything else happens.

    Returns:
      the new adapter, the labels, what to report, and the seconds of each stage.
    """
    seconds: dict[str, float] = {}
    clock = time.perf_counter()

    def stage(name: str) -> None:
        nonlocal clock
        seconds[name] = time.perf_counter() - clock
        clock = time.perf_counter()

    features = None
    if spec.needs_features and (answered is None or spec.frozen_posterior):
        features = pool_features(spec, params, lora, pool, buckets, sketch_seed)
        stage("features")
    if answered is None:
        picks, lam = jax.block_until_ready(select_program(spec, features, labelled, pool.num_pairs, key, lam))
        check(picks)
        stage("selection")
        preferences = np.asarray(ask(np.asarray(picks.rows)))
        on_labels(picks, preferences)
        stage("labels")
    else:
        rows, scores, preferences = answered
        picks = Picks(jnp.asarray(rows, jnp.int32), jnp.asarray(scores, jnp.float32))

    rows = np.asarray(picks.rows)
    batches = Batches(pool, rows, buckets, spec.chunk, spec.mesh)
    ref_logps = log_probs(spec.decoder, params, sft_lora, batches, pool.num_pairs, "reference")[rows]
    labelled = _add_labels(spec, labelled, picks, jnp.asarray(preferences, jnp.int32), ref_logps, features)
    stage("reference")
    lora, training = _train(spec, params, lora, labelled, sft_lora, pool, buckets, schedule)
    stage("training")
    return lora, labelled, RoundResult(picks, jnp.asarray(preferences), training, lam), seconds


def _train(
    spec: RoundSpec,
    params: Params,
    lora: Lora,
    labelled: Labelled,
    sft_lora: Lora,
    pool: PairPool,
    buckets: Sequence[Bucket],
    schedule: optimiser.BatchSchedule,
) -> tuple[Lora, losses.DpoMetrics]:
    of_group = assign_buckets(pool, buckets)
    rows_of_slot = np.maximum(np.asarray(labelled.rows), 0)
    # The step donates its adapter, and the one to start from must live on.
    lora = jax.tree.map(jnp.copy, sft_lora if spec.start_from_sft else lora)
    opt_state = jax.jit(lambda w: optimiser.init_optimiser(spec.dpo.optimiser, w))(lora)
    last_epoch: list[Any] = []
    with tqdm(total=schedule.num_steps, desc="training", unit="step", leave=False) as bar:
        for step in range(schedule.num_steps):
            present = schedule.weight[step] > 0
            slots, weight = schedule.slots[step][present], schedule.weight[step][present]
            rows = rows_of_slot[slots]
            total = _no_gradient(lora)
            for b, part in microbatches(of_group[pool.pairs[rows, 0]], spec.microbatch):
                groups = pad_pairs(pool, rows[part], buckets[b], spec.microbatch)
                groups = jax.device_put(groups, layout.batch(spec.mesh))
                pad = (0, spec.microbatch - len(part))
                padded = np.pad(slots[part], pad), np.pad(weight[part], pad)
                total = gradient_program(spec, params, lora, total, groups, labelled, *padded)
            gradient, metrics = total
            lora, opt_state = update_program(
                spec, lora, opt_state, gradient, jnp.int32(step), jnp.int32(schedule.num_steps)
            )
            if step >= schedule.num_steps - schedule.steps_per_epoch:
                last_epoch.append(metrics)
            if not np.isfinite(float(metrics.loss)):
                shown = ", ".join(pool.pair_ids[row] for row in rows[:8])
                raise FloatingPointError(
                    f"training step {step + 1} of {schedule.num_steps}: the DPO loss is {float(metrics.loss)} on "
                    f"the pairs {shown}; lower config.dpo.learning_rate.  Nothing of this round was saved"
                )
            bar.update()
    return lora, jax.tree.map(lambda *x: jnp.mean(jnp.stack(x)), *last_epoch)
