"""One round as one compiled program: features → selection → labels → DPO.

The pieces are pure functions; `fused_round` strings them together inside one `jax.jit`, `staged` calls the same ones
one by one with progress bars.  What a round leaves behind is in `Labelled` and the adapter, nothing else.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from activedpo_jax import layout
from activedpo_jax.data.groups import Groups
from activedpo_jax.evidence.gradients import FeatureSpec, pair_features
from activedpo_jax.models.decoder import Decoder, Params
from activedpo_jax.models.lora import Lora
from activedpo_jax.models.policy import response_logps
from activedpo_jax.selection import strategies
from activedpo_jax.selection.greedy import Picks
from activedpo_jax.selection.posterior import condition, resolved_lam
from activedpo_jax.training import losses, optimiser


@dataclasses.dataclass(frozen=True)
class RoundSpec:
    """Everything about a round that is fixed when it is compiled."""

    decoder: Decoder
    mesh: Mesh
    features: FeatureSpec
    dpo: optimiser.DpoSpec
    strategy: str
    frozen_posterior: bool
    labels_per_round: int  # K
    capacity: int  # labels of the whole run
    block: int  # candidates a device holds while selecting
    chunk: int  # examples per chunk, divided evenly by the mesh
    epochs: int
    batch_size: int  # pairs an optimiser step
    microbatch: int  # pairs whose activations exist at a time while training, divided evenly by the mesh
    train_on_newest: bool
    start_from_sft: bool

    @property
    def needs_features(self) -> bool:
        return "features" in strategies.get(self.strategy).needs

    @property
    def batch_width(self) -> int:
        """The padded batch of an optimiser step: whole microbatches."""
        return -(-self.batch_size // self.microbatch) * self.microbatch

    def schedule(self, labels: int, seed: int) -> optimiser.BatchSchedule:
        """The minibatches of the round that ends with so many labels."""
        first = labels - self.labels_per_round if self.train_on_newest else 0
        most = self.labels_per_round if self.train_on_newest else self.capacity
        max_steps = self.epochs * -(-most // self.batch_size)
        return optimiser.batch_schedule(first, labels, self.epochs, self.batch_size, self.batch_width, max_steps, seed)


class Labelled(NamedTuple):
    """The pairs labelled so far, in the order of the picks; C = capacity, the first n places are filled."""

    size: jax.Array  # scalar int32, n
    rows: jax.Array  # [C] int32 rows of the pool, −1 where empty
    preferences: jax.Array  # [C] int32, 0 the first response is preferred, 1 the second
    ref_logps: jax.Array  # [C, 2] float32, computed once
    features: jax.Array | None  # [C, D] float32 as they were when picked; None unless the posterior is `frozen`


class RoundResult(NamedTuple):
    """What a round reports."""

    picks: Picks
    preferences: jax.Array  # [K] int32
    training: losses.DpoMetrics  # means over the last epoch
    lam: jax.Array  # λ as used: see `posterior.resolved_lam`


class DevicePool(NamedTuple):
    """A pool of one bucket in device memory, for the fused round."""

    groups: Groups  # arrays of [chunks, G, ...]
    pairs: jax.Array  # [N, 3] int32: group, first response, second response
    preferences: jax.Array  # [N] int32: the answers, looked up only for what was picked


def no_labels(spec: RoundSpec) -> Labelled:
    """The state before the first round."""
    c, kept = spec.capacity, spec.frozen_posterior and spec.needs_features
    return Labelled(
        size=jnp.int32(0),
        rows=jnp.full(c, -1, jnp.int32),
        preferences=jnp.zeros(c, jnp.int32),
        ref_logps=jnp.zeros((c, 2), jnp.float32),
        features=jnp.zeros((c, spec.features.dim), jnp.float32) if kept else None,
    )


def chunk_features(spec: RoundSpec, params: Params, lora: Lora, groups: Groups, seed: jax.Array) -> jax.Array:
    """φ of all pairs of one chunk of groups: [G·m(m−1)/2, D] float32, in pool order."""
    return pair_features(spec.decoder, params, lora, groups, spec.features, seed).reshape(-1, spec.features.dim)


def select(
    spec: RoundSpec, features: jax.Array | None, labelled: Labelled, num_rows: int, key: jax.Array, lam: jax.Array
) -> tuple[Picks, jax.Array]:
    """The K pairs to label, [K] rows and scores, and λ as used.

    Args:
      features: φ of the whole pool at the current θ, [N, D]; None for strategies that do not look at them.
    """
    taken = jnp.where(labelled.rows < 0, num_rows, labelled.rows)
    available = jnp.ones(num_rows, bool).at[taken].set(False, mode="drop")
    precision = None
    if features is not None:
        known = features[labelled.rows] if labelled.features is None else labelled.features
        lam = resolved_lam(features, available, lam)
        precision = condition(known, labelled.rows >= 0, lam)
    evidence = strategies.Evidence(features=features, posterior=precision, lam=lam)
    strategy = strategies.get(spec.strategy)
    return strategy.select(evidence, available, key, spec.labels_per_round, spec.block, spec.mesh), lam


def add_labels(
    spec: RoundSpec,
    labelled: Labelled,
    picks: Picks,
    preferences: jax.Array,
    ref_logps: jax.Array,
    features: jax.Array | None,
) -> Labelled:
    """Appends the K new labels; their features are kept only where the posterior is `frozen`."""

    def append(store: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(store, new.astype(store.dtype), labelled.size, axis=0)

    kept = labelled.features
    if features is not None and kept is not None:
        kept = append(kept, features[picks.rows])
    return Labelled(
        size=labelled.size + spec.labels_per_round,
        rows=append(labelled.rows, picks.rows),
        preferences=append(labelled.preferences, preferences),
        ref_logps=append(labelled.ref_logps, ref_logps),
        features=kept,
    )


def batch_preferences(labelled: Labelled, slots: jax.Array, weight: jax.Array) -> losses.Preferences:
    """The labels at these places, as a batch."""
    return losses.Preferences(labelled.preferences[slots], labelled.ref_logps[slots], weight)


def _gather(spec: RoundSpec, pool: DevicePool, rows: jax.Array) -> Groups:
    """The pairs of these pool rows as groups with m = 2, in the order in which they are shown."""
    flat = Groups(*(x.reshape(-1, *x.shape[2:]) for x in pool.groups))
    group, first, second = pool.pairs[rows].T
    shown = jnp.stack([first, second], axis=1)
    batch = Groups(
        flat.prompt_ids[group],
        flat.prompt_len[group],
        flat.response_ids[group[:, None], shown],
        flat.response_len[group[:, None], shown],
    )
    return jax.lax.with_sharding_constraint(batch, layout.batch(spec.mesh))


def _reference(spec: RoundSpec, params: Params, sft_lora: Lora, pool: DevicePool, rows: jax.Array) -> jax.Array:
    """log π_ref of the pairs of these rows, chunk by chunk: [K, 2]."""
    count = rows.shape[0]
    width = min(spec.chunk, layout.round_up(count, spec.mesh))
    padded = jnp.pad(rows, (0, -count % width)).reshape(-1, width)
    score = lambda chunk: response_logps(spec.decoder, params, sft_lora, _gather(spec, pool, chunk))  # noqa: E731
    return jax.lax.map(score, padded).reshape(-1, 2)[:count]


def fused_round(
    spec: RoundSpec,
    params: Params,
    lora: Lora,
    labelled: Labelled,
    sft_lora: Lora,
    pool: DevicePool,
    schedule: optimiser.BatchSchedule,
    key: jax.Array,
    sketch_seed: jax.Array,
    lam: jax.Array,
) -> tuple[Lora, Labelled, RoundResult]:
    """One round of ActiveDPO (arXiv 2505.19241, algorithm 1) from θ and the labels so far to the next of both.

    Traceable; `compiled_round` is what one calls.

    Args:
      sft_lora: the adapter that the run starts from, which with the base weights is π_ref.  A fresh one has B = 0, so
        π_ref is the base model, exactly; one that SFT has trained makes it the SFT model.
      schedule: for the number of labels after this round.
    """
    num_rows = pool.pairs.shape[0]
    features = None
    if spec.needs_features:
        features = jax.lax.map(lambda g: chunk_features(spec, params, lora, g, sketch_seed), pool.groups)
        features = features.reshape(-1, spec.features.dim)[:num_rows]

    picks, lam = select(spec, features, labelled, num_rows, key, lam)
    preferences = pool.preferences[picks.rows]
    ref_logps = _reference(spec, params, sft_lora, pool, picks.rows)
    labelled = add_labels(spec, labelled, picks, preferences, ref_logps, features)

    start = sft_lora if spec.start_from_sft else lora
    opt_state = optimiser.init_optimiser(spec.dpo.optimiser, start)
    total = jnp.asarray(schedule.num_steps)

    def step(i: jax.Array, carry):  # type: ignore[no-untyped-def]
        lora, opt_state, sums = carry

        def add(total, part):  # type: ignore[no-untyped-def]
            slots, weight = part
            groups = _gather(spec, pool, jnp.maximum(labelled.rows[slots], 0))
            pairs = batch_preferences(labelled, slots, weight)
            new = optimiser.dpo_gradient(spec.decoder, spec.dpo, params, lora, groups, pairs)
            return jax.tree.map(jnp.add, total, new), None

        parts = jax.tree.map(lambda x: x[i].reshape(-1, spec.microbatch), (schedule.slots, schedule.weight))
        (gradient, metrics), _ = jax.lax.scan(add, optimiser.no_gradient(lora), parts)
        rate = optimiser.learning_rate(spec.dpo.optimiser, i, total)
        lora, opt_state = optimiser.update(spec.dpo.optimiser, lora, opt_state, gradient, rate)
        last_epoch = i >= total - schedule.steps_per_epoch
        return lora, opt_state, jax.tree.map(lambda s, x: s + jnp.where(last_epoch, x, 0.0), sums, metrics)

    zeros = losses.DpoMetrics(*(jnp.float32(0),) * 3)
    lora, _, sums = jax.lax.fori_loop(0, total, step, (start, opt_state, zeros))
    # Laid out as they came in, or the next round would be compiled anew.
    lora = jax.lax.with_sharding_constraint(lora, layout.weight_shardings(spec.mesh, lora))
    labelled = jax.lax.with_sharding_constraint(labelled, layout.replicated(spec.mesh))
    training = jax.tree.map(lambda s: s / schedule.steps_per_epoch, sums)
    return lora, labelled, RoundResult(picks, preferences, training, lam)


# One compilation serves every round, seed and adapter of the same shape.  θ is donated; the labels are small, and the
# caller still writes them out.
compiled_round = jax.jit(fused_round, static_argnums=0, donate_argnums=2)


def device_pool(spec: RoundSpec, groups: Groups, pairs: np.ndarray, preferences: np.ndarray) -> DevicePool:
    """Places the padded groups of a whole pool on the mesh, cut into chunks of `spec.chunk` groups."""
    groups = Groups(*(np.asarray(x).reshape(-1, spec.chunk, *x.shape[1:]) for x in groups))
    everywhere = layout.replicated(spec.mesh)
    return DevicePool(
        groups=jax.device_put(groups, layout.chunks(spec.mesh)),
        pairs=jax.device_put(pairs.astype(np.int32), everywhere),
        preferences=jax.device_put(preferences.astype(np.int32), everywhere),
    )
