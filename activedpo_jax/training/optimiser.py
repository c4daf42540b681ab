"""The optimiser step: AdamW with clipping and a schedule, on an adapter's DPO loss, or on all weights of a model."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from activedpo_jax import layout
from activedpo_jax.data.groups import Groups
from activedpo_jax.models.decoder import Decoder, Params
from activedpo_jax.models.lora import Lora
from activedpo_jax.models.quantise import refuse_quantised
from activedpo_jax.training import losses


@dataclasses.dataclass(frozen=True)
class OptimiserSpec:
    """AdamW (Loshchilov & Hutter 2019) with global-norm clipping; the learning rate warms up linearly, then follows
    `schedule` down to zero (`linear`, `cosine`) or stays (`constant`)."""

    learning_rate: float
    schedule: str = "linear"
    warmup_fraction: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0


@dataclasses.dataclass(frozen=True)
class DpoSpec:
    """The DPO recipe of one round."""

    loss: losses.LossSpec
    optimiser: OptimiserSpec


class Position(NamedTuple):
    """Where a training stands.  Both numbers may be traced, so that more labels need no new program."""

    step: Any  # scalar int32 or float32, from 0
    total: Any  # how many steps there are, of the same type


def learning_rate(spec: OptimiserSpec, position: Position) -> jax.Array:
    """The learning rate of the step that is next."""
    step, total = position
    warmup = jnp.ceil(spec.warmup_fraction * total)
    remaining = (total - step) / jnp.maximum(total - warmup, 1)
    decay = {
        "linear": remaining,
        "cosine": 0.5 * (1 + jnp.cos(jnp.pi * (1 - remaining))),
        "constant": jnp.ones_like(remaining),
    }[spec.schedule]
    return spec.learning_rate * jnp.where(step < warmup, (step + 1) / jnp.maximum(warmup, 1), jnp.minimum(decay, 1.0))


def _transform(spec: OptimiserSpec) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(spec.max_grad_norm),
        optax.scale_by_adam(),
        optax.add_decayed_weights(spec.weight_decay),
    )


def init_optimiser(spec: OptimiserSpec, weights: Any) -> optax.OptState:
    return _transform(spec).init(weights)


def optimiser_shardings(spec: OptimiserSpec, mesh: Mesh, weights: Any) -> Any:
    """Shardings of the optimiser's state: moments are laid out like their weights, as the compiler alone would not.

    Args:
      weights: base weights or an adapter, arrays or shapes.
    """
    return optax.tree_map_params(
        _transform(spec),
        lambda _, sharding: sharding,
        jax.eval_shape(lambda w: init_optimiser(spec, w), weights),
        layout.weight_shardings(mesh, weights),
        transform_non_params=lambda _: layout.replicated(mesh),
    )


def dpo_gradient(
    decoder: Decoder, spec: DpoSpec, params: Params, lora: Lora, groups: Groups, pairs: losses.Preferences
) -> tuple[Lora, losses.DpoMetrics]:
    """Gradient of the DPO loss of a batch of labelled pairs (groups with m = 2), or of a part of one."""

    def objective(lora: Lora) -> tuple[jax.Array, losses.DpoMetrics]:
        return losses.loss(spec.loss, decoder, params, lora, groups, pairs)

    return jax.grad(objective, has_aux=True)(lora)


def no_gradient(lora: Lora) -> tuple[Lora, losses.DpoMetrics]:
    """Zeros, to which the parts of a batch are added."""
    return jax.tree.map(jnp.zeros_like, lora), losses.DpoMetrics(*(jnp.float32(0),) * 3)


def completion_gradient(
    decoder: Decoder, params: Params, lora: Lora | None, groups: Groups, share: jax.Array
) -> tuple[Any, jax.Array]:
    """Gradient and value of −share · Σ log π(token) over the response tokens of a batch, or of a part of one.

    With share = 1/(response tokens of the whole batch) the parts add up to its mean negative log-likelihood.  The
    gradient is that of the adapter; without one (`lora=None`) it is that of all weights.

    Raises:
      ValueError: the gradient is that of all weights, and some are quantised.
    """

    def adapter_loss(lora: Lora) -> jax.Array:
        return -share * jnp.sum(decoder.apply({"params": params, "lora": lora}, groups))  # type: ignore[arg-type]

    def full_loss(params: Params) -> jax.Array:
        return -share * jnp.sum(decoder.apply({"params": params}, groups, None, True))  # type: ignore[arg-type]

    if lora is None:
        refuse_quantised(params, "the gradient of all weights")
        loss, grads = jax.value_and_grad(full_loss)(params)
    else:
        loss, grads = jax.value_and_grad(adapter_loss)(lora)
    return grads, loss


def update(
    spec: OptimiserSpec, weights: Any, opt_state: optax.OptState, gradient: Any, rate: jax.Array
) -> tuple[Any, optax.OptState]:
    """One step along a batch's gradient at learning rate `rate`."""
    updates, opt_state = _transform(spec).update(gradient, opt_state, weights)
    return jax.tree.map(lambda w, u: w - rate * u, weights, updates), opt_state


def language_model_step(
    decoder: Decoder, spec: OptimiserSpec, params: Params, opt_state: optax.OptState, groups: Groups, rate: jax.Array
) -> tuple[Params, optax.OptState, jax.Array]:
    """One step of all weights on the mean negative log-likelihood of the response tokens; returns that loss too."""
    share = 1 / jnp.sum(jnp.asarray(groups.response_len))
    grads, loss = completion_gradient(decoder, params, None, groups, share)
    params, opt_state = update(spec, params, opt_state, grads, rate)
    return params, opt_state, loss


class BatchSchedule(NamedTuple):
    """The labels that each step of a round trains on; host arrays of a fixed size, the same in all rounds."""

    slots: np.ndarray  # [max_steps, B] int32, indices into the list of labels
    weight: np.ndarray  # [max_steps, B] float32, 1/n for the n labels of a batch, 0 at padding
    num_steps: int
    steps_per_epoch: int

    def examples(self, step: int) -> list[int]:
        """The labels of a step."""
        return [int(slot) for slot in self.slots[step][self.weight[step] > 0]]


def batch_schedule(
    usable: np.ndarray, epochs: int, batch_size: int, width: int, max_steps: int, seed: int
) -> BatchSchedule:
    """Shuffled epochs over the examples, each of them once per epoch; the last batch of an epoch may be smaller.

    Args:
      usable: [n] int, the indices of the examples.
      width: B, at least `batch_size`: the padded batch that the mesh divides.
    """
    rng = np.random.default_rng(seed)
    per_epoch = -(-len(usable) // batch_size)
    slots = np.zeros((max_steps, width), np.int32)
    weight = np.zeros((max_steps, width), np.float32)
    for epoch in range(epochs):
        order = usable[rng.permutation(len(usable))]
        for i in range(per_epoch):
            batch = order[i * batch_size : (i + 1) * batch_size]
            slots[epoch * per_epoch + i, : len(batch)] = batch
            weight[epoch * per_epoch + i, : len(batch)] = 1 / len(batch)
    return BatchSchedule(slots, weight, epochs * per_epoch, per_epoch)
